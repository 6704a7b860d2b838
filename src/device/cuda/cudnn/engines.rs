//! Engines: what cuDNN's heuristics propose for a graph, and which of it we take.
//!
//! An engine's numerical notes say how its results may differ from sums of products in f32. What is refused:
//!
//! - always: inputs rounded to a narrower type (DOWN_CONVERT_INPUTS) and sums in one (REDUCED_PRECISION_REDUCTION);
//! - unless `nondeterministic`: sums in an order of chance (NONDETERMINISTIC);
//! - in f32 unless `tf32`: tensor cores (TENSOR_CORE), which read f32 with 10 bits behind the point;
//! - if `direct`, and for values of 16 bits: Winograd's transforms and Fourier's, whose errors are larger.

use super::descriptor::Descriptor;
use super::graph::Graph;
use super::plan::Plan;
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t as Mode, cudnnBackendNumericalNote_t as Note,
};
use std::fmt::Write as _;
use std::sync::Arc;

/// What an engine may do to be fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    pub nondeterministic: bool,
    pub tf32: bool,
    /// Sums of products only, as the definition has them.
    pub direct: bool,
    /// Bytes of workspace at most.
    pub workspace: usize,
}

/// Configurations at most that are made into plans: heuristics put good ones in front, and a plan may have to be compiled.
const MOST: usize = 10;

/// An engine with its knobs set.
pub struct Configuration {
    descriptor: Descriptor,
    /// `eng5_k2=1_k13=0`: the engine's number and its knobs, the same in every process of one version of cuDNN.
    pub name: String,
}

/// All that keep the rules, the promising ones first.
pub fn configurations(graph: &Graph, rules: Rules) -> Result<Vec<Configuration>> {
    let mut found: Vec<Configuration> = Vec::new();
    for mode in [Mode::CUDNN_HEUR_MODE_B, Mode::CUDNN_HEUR_MODE_A, Mode::CUDNN_HEUR_MODE_FALLBACK] {
        // A mode that knows nothing for the graph fails.
        let proposed = propose(graph, mode).unwrap_or_default();
        for descriptor in proposed {
            let engine = Engine::of(&descriptor)?;
            if !engine.keeps(rules, graph.element) {
                continue;
            }
            let name = engine.name(&descriptor)?;
            if !found.iter().any(|known| known.name == name) {
                found.push(Configuration { descriptor, name });
            }
        }
    }
    Ok(found)
}

/// The plans that can be made of the first configurations, within the rules' workspace.
pub fn plans(graph: &Arc<Graph>, rules: Rules) -> Result<Vec<Plan>> {
    let configurations = configurations(graph, rules)?;
    let plans = configurations.into_iter().filter_map(|configuration| plan(graph, configuration, rules));
    Ok(plans.take(MOST).collect())
}

/// A plan, if the engine supports the graph after all and its workspace is within the rules.
pub fn plan(graph: &Arc<Graph>, configuration: Configuration, rules: Rules) -> Option<Plan> {
    let Configuration { descriptor, name } = configuration;
    let plan = Plan::new(graph, descriptor, name).ok()?;
    (plan.workspace_bytes() <= rules.workspace).then_some(plan)
}

fn propose(graph: &Graph, mode: Mode) -> Result<Vec<Descriptor>> {
    let _alone = graph.handle.lock();
    let heuristics = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[graph.descriptor.link()])?
        .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[mode])?
        .finalized()?;
    let kind = Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR;
    heuristics.descriptors(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, kind, usize::MAX)
}

struct Engine {
    descriptor: Descriptor,
    notes: Vec<i32>,
}

impl Engine {
    fn of(configuration: &Descriptor) -> Result<Engine> {
        let kind = Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR;
        let engines = configuration.descriptors(Name::CUDNN_ATTR_ENGINECFG_ENGINE, kind, 1)?;
        let descriptor = engines.into_iter().next().expect("a configuration has an engine");
        let notes = descriptor.enumeration(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, Type::CUDNN_TYPE_NUMERICAL_NOTE)?;
        Ok(Engine { descriptor, notes })
    }

    fn keeps(&self, rules: Rules, element: Element) -> bool {
        let is = |note: Note| self.notes.contains(&(note as i32));
        let wide = element == Element::F32;
        let refused = is(Note::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS)
            || is(Note::CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION)
            || (is(Note::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) && !rules.nondeterministic)
            || (is(Note::CUDNN_NUMERICAL_NOTE_TENSOR_CORE) && wide && !rules.tf32);
        let transforms = is(Note::CUDNN_NUMERICAL_NOTE_WINOGRAD) || is(Note::CUDNN_NUMERICAL_NOTE_FFT);
        !refused && !(transforms && (rules.direct || !wide))
    }

    fn name(&self, configuration: &Descriptor) -> Result<String> {
        let mut name = format!("eng{}", self.descriptor.integer(Name::CUDNN_ATTR_ENGINE_GLOBAL_INDEX)?);
        let kind = Kind::CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR;
        for knob in configuration.descriptors(Name::CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, kind, usize::MAX)? {
            let types = knob.enumeration(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, Type::CUDNN_TYPE_KNOB_TYPE)?;
            let value = knob.integer(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE)?;
            types.iter().for_each(|number| _ = write!(name, "_k{number}={value}"));
        }
        Ok(name)
    }
}
