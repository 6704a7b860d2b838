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
use crate::device::cuda::libraries;
use crate::error::{Error, Result};
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
/// Knobs at most of an engine; there are some 30 types of them.
const MOST_KNOBS: usize = 64;

/// An engine with its knobs set.
pub struct Configuration {
    descriptor: Descriptor,
    /// `eng5_k2=1_k13=0`: the engine's number and its knobs, the same in every process of one version of cuDNN.
    pub name: String,
}

/// Why the last of the proposals that fell out did so. It matters where none is left.
#[derive(Default)]
pub struct Reason(Option<Error>);

impl Reason {
    fn unless<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.0 = Some(error)).ok()
    }

    /// The error that there is no plan.
    pub fn no_engine(self, graph: &Graph, rules: Rules) -> Error {
        let library = match libraries::cudnn() {
            Ok(library) => library,
            Err(error) => return error,
        };
        let last = self.0.map_or(String::new(), |error| format!(" (the last one tried: {error})"));
        Error::lacking(format!(
            "cuDNN {} ({}) has no engine for the {graph} that keeps to {rules:?}{last}; install a newer cuDNN, or train on the CPU",
            library.version,
            library.path.display(),
        ))
    }
}

/// All that keep the rules, the promising ones first.
pub fn configurations(graph: &Graph, rules: Rules, reason: &mut Reason) -> Vec<Configuration> {
    let mut found: Vec<Configuration> = Vec::new();
    for mode in [Mode::CUDNN_HEUR_MODE_B, Mode::CUDNN_HEUR_MODE_A, Mode::CUDNN_HEUR_MODE_FALLBACK] {
        // A mode that knows nothing for the graph fails.
        let proposed = reason.unless(propose(graph, mode)).unwrap_or_default();
        for descriptor in proposed {
            let kept = reason.unless(Configuration::kept(descriptor, rules, graph.element)).flatten();
            found.extend(kept.filter(|new| found.iter().all(|known| known.name != new.name)));
        }
    }
    found
}

/// The plans that can be made of the first configurations, within the rules' workspace.
pub fn plans(graph: &Arc<Graph>, rules: Rules, reason: &mut Reason) -> Vec<Plan> {
    let configurations = configurations(graph, rules, reason);
    let plans = configurations.into_iter().filter_map(|configuration| plan(graph, configuration, rules, reason));
    plans.take(MOST).collect()
}

/// A plan, if the engine supports the graph after all and its workspace is within the rules.
pub fn plan(graph: &Arc<Graph>, configuration: Configuration, rules: Rules, reason: &mut Reason) -> Option<Plan> {
    let Configuration { descriptor, name } = configuration;
    let plan = Plan::new(graph, descriptor, name).and_then(|plan| match plan.workspace_bytes() {
        bytes if bytes <= rules.workspace => Ok(plan),
        bytes => Err(Error::device(format!("{} wants {bytes} bytes of workspace", plan.name()))),
    });
    reason.unless(plan)
}

fn propose(graph: &Graph, mode: Mode) -> Result<Vec<Descriptor>> {
    let _alone = graph.handle.lock()?;
    let heuristics = (graph.handle.of_heuristics(Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?)?)
        .with(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[graph.descriptor.link()])?
        .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[mode])?
        .finalized()?;
    let kind = Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR;
    let results = Name::CUDNN_ATTR_ENGINEHEUR_RESULTS;
    heuristics.descriptors(results, kind, heuristics.count(results)?)
}

impl Configuration {
    /// Nothing if it breaks a rule.
    fn kept(descriptor: Descriptor, rules: Rules, element: Element) -> Result<Option<Configuration>> {
        let engine = Engine::of(&descriptor)?;
        if !engine.keeps(rules, element) {
            return Ok(None);
        }
        let name = engine.name(&descriptor)?;
        Ok(Some(Configuration { descriptor, name }))
    }
}

struct Engine {
    descriptor: Descriptor,
    notes: Vec<i32>,
}

impl Engine {
    fn of(configuration: &Descriptor) -> Result<Engine> {
        let kind = Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR;
        let engines = configuration.descriptors(Name::CUDNN_ATTR_ENGINECFG_ENGINE, kind, 1)?;
        let none = || Error::device("cuDNN proposed a configuration without an engine");
        let descriptor = engines.into_iter().next().ok_or_else(none)?;
        let notes = descriptor.enumerators(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, Type::CUDNN_TYPE_NUMERICAL_NOTE)?;
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
        for knob in configuration.descriptors(Name::CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, kind, MOST_KNOBS)? {
            let number = knob.enumerator(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, Type::CUDNN_TYPE_KNOB_TYPE)?;
            let value = knob.integer(Name::CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE)?;
            _ = write!(name, "_k{number}={value}");
        }
        Ok(name)
    }
}
