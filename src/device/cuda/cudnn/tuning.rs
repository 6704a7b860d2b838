//! Which of several plans runs: the fastest, by the GPU's clock, over buffers of the real lengths.
//!
//! Two plans may be so close that now one and now the other comes out first, and their sums are in different orders. For two
//! runs to give the same bits the choice is written down (`choices`), and later runs, and the other ranks of the host, take it
//! from there.

use super::engines::{self, Rules, configurations};
use super::graph::Graph;
use super::plan::Plan;
use crate::device::cuda::{Gpu, choices, libraries};
use crate::error::{Error, Result};
use std::sync::Arc;

/// Runs before those that count, which load code and fill caches, and those.
const WARM_UP: usize = 2;
const RUNS: usize = 5;

/// None if no engine supports the graph within the rules.
pub fn fastest(gpu: &Gpu, graph: &Arc<Graph>, rules: Rules) -> Result<Option<Plan>> {
    let key = format!(
        "cuDNN {} on {} ({}): {graph}, {:?}, {:?}, {rules:?}",
        libraries::cudnn()?.version,
        gpu.device().name,
        gpu.device().architecture(),
        graph.convolution,
        graph.product,
    );
    if let Some(plan) = choices::read(&key).map(|name| named(graph, rules, &name)).transpose()?.flatten() {
        return Ok(Some(plan));
    }
    let mut plans = engines::plans(graph, rules)?;
    if plans.is_empty() {
        return Ok(None);
    }
    let times = Stage::new(gpu, graph, &plans)?.times(&mut plans)?;
    let best = fastest_of(&times).ok_or_else(|| Error::device(format!("cuDNN can run no plan for the {graph}")))?;
    tracing::debug!("{graph}: {} takes {:.3} ms, the fastest of {}", plans[best].name(), times[best], plans.len());
    let chosen = choices::keep_first(&key, plans[best].name());
    let chosen = plans.iter().position(|plan| plan.name() == chosen).unwrap_or(best);
    Ok(Some(plans.swap_remove(chosen)))
}

/// The plan that heuristics find most promising, without a run. None if no engine supports the graph within the rules.
pub fn first(graph: &Arc<Graph>, rules: Rules) -> Result<Option<Plan>> {
    let mut found = configurations(graph, rules)?.into_iter();
    Ok(found.find_map(|configuration| engines::plan(graph, configuration, rules)))
}

fn named(graph: &Arc<Graph>, rules: Rules, name: &str) -> Result<Option<Plan>> {
    let known = configurations(graph, rules)?.into_iter().find(|configuration| configuration.name == name);
    Ok(known.and_then(|configuration| engines::plan(graph, configuration, rules)))
}

/// Of times that are not infinite.
fn fastest_of(times: &[f32]) -> Option<usize> {
    let finite = (0..times.len()).filter(|&plan| times[plan].is_finite());
    finite.min_by(|&a, &b| times[a].total_cmp(&times[b]))
}

/// Memory in which plans are tried.
struct Stage<'a> {
    gpu: &'a Gpu,
    memory: Vec<crate::device::Arena>,
    workspace: crate::device::Arena,
}

impl Stage<'_> {
    fn new<'a>(gpu: &'a Gpu, graph: &Graph, plans: &[Plan]) -> Result<Stage<'a>> {
        let room = |error: Error| error.context(format_args!("buffers to time the {graph}"));
        let memory =
            graph.buffers().iter().map(|&bytes| gpu.allocate(bytes)).collect::<Result<Vec<_>>>().map_err(room)?;
        let workspace = plans.iter().map(Plan::workspace_bytes).max().unwrap_or(0);
        Ok(Stage { gpu, memory, workspace: gpu.allocate(workspace).map_err(room)? })
    }

    /// Milliseconds of each plan, the median of its runs; infinite for one that fails.
    fn times(&self, plans: &mut [Plan]) -> Result<Vec<f32>> {
        let (start, end) = (self.gpu.timer()?, self.gpu.timer()?);
        let buffers: Vec<usize> = self.memory.iter().map(|memory| memory.address()).collect();
        let stream = self.gpu.compute();
        let run = |plan: &mut Plan| -> Result<f32> {
            stream.record(&start)?;
            // SAFETY: memory of these lengths, which nobody else knows, and the wait is over before it is freed.
            unsafe { plan.run(&buffers, self.workspace.address()) }?;
            stream.record(&end)?;
            end.wait()?;
            end.ms_since(&start)
        };
        let median = |plan: &mut Plan| -> Result<f32> {
            let mut times = (0..WARM_UP + RUNS).map(|_| run(plan)).collect::<Result<Vec<f32>>>()?.split_off(WARM_UP);
            times.sort_by(f32::total_cmp);
            Ok(times[RUNS / 2])
        };
        Ok(plans.iter_mut().map(|plan| median(plan).unwrap_or(f32::INFINITY)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_never_the_fastest() {
        assert_eq!(fastest_of(&[3.0, f32::INFINITY, 2.0, 2.5]), Some(2));
        assert_eq!(fastest_of(&[2.0, 2.0]), Some(0));
        assert_eq!(fastest_of(&[f32::INFINITY]), None);
    }
}
