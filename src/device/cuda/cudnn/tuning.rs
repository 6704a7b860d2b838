//! Which of several plans runs: the fastest, by the GPU's clock, over buffers of the real lengths.
//!
//! Two plans may be so close that now one and now the other comes out first, and their sums are in different orders. For two
//! runs to give the same bits the choice is written down (`choices`), and later runs, and the other ranks of the host, take it
//! from there.

use super::engines::{self, Reason, Rules, configurations};
use super::graph::Graph;
use super::plan::Plan;
use crate::device::Arena;
use crate::device::cuda::choices::{self, untimed};
use crate::device::cuda::{Gpu, libraries};
use crate::error::Result;
use std::sync::Arc;

/// Runs before those that count, which load code and fill caches, and those.
const WARM_UP: usize = 2;
const RUNS: usize = 5;

/// The error may be that no engine supports the graph within the rules.
pub fn fastest(gpu: &Gpu, graph: &Arc<Graph>, rules: Rules) -> Result<Plan> {
    let key = format!(
        "cuDNN {} on {} ({}): {graph}, {:?}, {:?}, {rules:?}",
        libraries::cudnn()?.version,
        gpu.device().name,
        gpu.device().architecture(),
        graph.convolution,
        graph.product,
    );
    if let Some(plan) = choices::read(&key).and_then(|name| named(graph, rules, &name)) {
        return Ok(plan);
    }
    let mut reason = Reason::default();
    let mut plans = engines::plans(graph, rules, &mut reason);
    if plans.is_empty() {
        return Err(reason.no_engine(graph, rules));
    }
    let Some(stage) = Stage::new(gpu, graph, &mut plans)? else {
        tracing::warn!("{}", untimed(gpu.device(), graph, "the engine"));
        let least = (0..plans.len()).min_by_key(|&plan| plans[plan].workspace_bytes()).expect("there are plans");
        return Ok(plans.swap_remove(least));
    };
    let times = stage.times(&mut plans)?;
    let best = (0..plans.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).expect("there are plans");
    tracing::debug!("{graph}: {} takes {:.3} ms, the fastest of {}", plans[best].name(), times[best], plans.len());
    let number = |name: &str| plans.iter().position(|plan| plan.name() == name);
    let standing = choices::keep_first(&key, plans[best].name(), |name| number(name).is_some());
    let chosen = number(&standing).unwrap_or(best);
    Ok(plans.swap_remove(chosen))
}

/// The plan that heuristics find most promising, without a run. The error is that no engine supports the graph within the
/// rules.
pub fn first(graph: &Arc<Graph>, rules: Rules) -> Result<Plan> {
    let mut reason = Reason::default();
    let mut found = configurations(graph, rules, &mut reason).into_iter();
    let plan = found.find_map(|configuration| engines::plan(graph, configuration, rules, &mut reason));
    plan.ok_or_else(|| reason.no_engine(graph, rules))
}

/// Nothing where the plan cannot be made; others are tried then.
fn named(graph: &Arc<Graph>, rules: Rules, name: &str) -> Option<Plan> {
    let reason = &mut Reason::default();
    let known = configurations(graph, rules, reason).into_iter().find(|configuration| configuration.name == name)?;
    engines::plan(graph, known, rules, reason)
}

/// Memory in which plans are tried.
struct Stage<'a> {
    gpu: &'a Gpu,
    memory: Vec<Arena>,
    workspace: Arena,
}

impl Stage<'_> {
    /// None where there is no room for it. Plans that want more workspace than there is are taken out, if others are left.
    fn new<'a>(gpu: &'a Gpu, graph: &Graph, plans: &mut Vec<Plan>) -> Result<Option<Stage<'a>>> {
        let buffers = graph.buffers().iter().map(|&bytes| gpu.allocate_if_free(bytes));
        let Some(memory) = buffers.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
        let free = gpu.memory()?.free;
        let fits = |plan: &Plan| plan.workspace_bytes() <= free;
        if !plans.iter().any(fits) {
            return Ok(None);
        }
        plans.retain(fits);
        let workspace = plans.iter().map(Plan::workspace_bytes).max().unwrap_or(0);
        Ok(gpu.allocate_if_free(workspace)?.map(|workspace| Stage { gpu, memory, workspace }))
    }

    /// Milliseconds of each plan, the median of its runs. An engine that fails has been proposed by mistake: it is taken out.
    fn times(&self, plans: &mut Vec<Plan>) -> Result<Vec<f32>> {
        let (mut times, mut failure) = (Vec::new(), None);
        plans.retain_mut(|plan| match self.median(plan) {
            Ok(time) => {
                times.push(time);
                true
            }
            Err(error) => {
                failure = Some(error);
                false
            }
        });
        match failure {
            Some(error) if plans.is_empty() => Err(error),
            _ => Ok(times),
        }
    }

    fn median(&self, plan: &mut Plan) -> Result<f32> {
        let buffers: Vec<usize> = self.memory.iter().map(Arena::address).collect();
        let (stream, start, end) = (self.gpu.compute(), self.gpu.timer()?, self.gpu.timer()?);
        let mut times = Vec::with_capacity(WARM_UP + RUNS);
        for _ in 0..WARM_UP + RUNS {
            stream.record(&start)?;
            // SAFETY: memory of these lengths, which nobody else knows, and the wait is over before it is freed.
            unsafe { plan.run(&buffers, self.workspace.address()) }?;
            stream.record(&end)?;
            end.wait()?;
            times.push(end.ms_since(&start)?);
        }
        let counted = &mut times[WARM_UP..];
        counted.sort_by(f32::total_cmp);
        Ok(counted[RUNS / 2])
    }
}
