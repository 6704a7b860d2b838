//! What each layer must do in each phase of a step, beside the time that it took.
//!
//! Operations are those of a layer's forward; backward does as many again for the gradient by the inputs, and as many for
//! the gradient by the parameters. Bytes are those that a phase must read and write once, however well its caches work:
//!
//! ```text
//! forward            inputs, parameters -> output, what is saved for backward
//! backward data      gradient of the output, parameters, what was saved -> gradients of the inputs
//! backward weights   inputs, gradient of the output -> gradients of the parameters
//! reduce update      1/N of: all ranks' gradients, parameters, optimizer state -> parameters, optimizer state
//! ```
//!
//! The output is read once more where an activation is fused into the layer; in bf16 an update also writes the parameters'
//! rounded copy. Over tcp the bytes of reduce update are those sent, (N - 1)/N of the gradients and of the parameters. A GPU
//! updates all parameters, from one gradient.

use crate::model::params::Param;
use crate::model::precision::Precision;
use crate::model::spec::Node;
use crate::train::bench::Measured;
use std::ops::Add;
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Forward,
    BackwardData,
    BackwardWeights,
    ReduceUpdate,
}

pub const PHASES: [Phase; 4] = [Phase::Forward, Phase::BackwardData, Phase::BackwardWeights, Phase::ReduceUpdate];

/// Of one step on one rank. All zero where there is nothing to do.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    pub seconds: f64,
    pub flops: f64,
    pub bytes: f64,
}

impl Cost {
    /// Whether anything is done; it may have been too short to be measured.
    pub fn is_any(&self) -> bool {
        [self.seconds, self.flops, self.bytes].iter().any(|&count| count > 0.0)
    }

    pub fn gflop_s(&self) -> Option<f64> {
        self.per_second(self.flops)
    }
    pub fn gb_s(&self) -> Option<f64> {
        self.per_second(self.bytes)
    }

    /// None of what there is nothing of, or what was too short to be measured.
    fn per_second(&self, count: f64) -> Option<f64> {
        (count > 0.0 && self.seconds > 0.0).then(|| count / self.seconds / 1e9)
    }
}

pub struct LayerCost<'a> {
    pub node: &'a Node,
    /// In the order of `PHASES`.
    pub phases: [Cost; PHASES.len()],
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        let Cost { seconds, flops, bytes } = other;
        Cost { seconds: self.seconds + seconds, flops: self.flops + flops, bytes: self.bytes + bytes }
    }
}

impl<'a> LayerCost<'a> {
    pub fn of_all(measured: &'a Measured<'a>) -> Vec<LayerCost<'a>> {
        let nodes = &measured.net.spec().nodes;
        let layer = |number: usize| {
            let [forward, data, weights] = passes(measured, number);
            let reduce_update = after_backward(measured, measured.net.table().of_node(number));
            LayerCost { node: &nodes[number], phases: [forward, data, weights, reduce_update] }
        };
        (0..nodes.len()).map(layer).collect()
    }

    pub fn seconds(&self) -> f64 {
        self.phases.iter().map(|phase| phase.seconds).sum()
    }
}

/// Forward, and the two parts of backward.
fn passes(measured: &Measured<'_>, number: usize) -> [Cost; 3] {
    let (spec, time) = (measured.net.spec(), &measured.layers[number]);
    let Node { inputs, inferred, learns, .. } = &spec.nodes[number];
    let samples = measured.plan.local_batch;
    let len = |activation: usize| samples * spec.shape(activation).len();
    let (input, output) = (inputs.iter().map(|&input| len(input)).sum::<usize>(), len(number + 1));
    let grad_input: usize = inputs.iter().filter(|&&input| spec.needs_gradient(input)).map(|&input| len(input)).sum();
    // A pass goes over the parameters, and what is saved whatever the batch, once a micro-batch.
    let micros = measured.plan.micros_per_rank;
    let params = micros * total(measured.net.table().of_node(number));
    let saved = samples * inferred.saved_bytes + micros * inferred.saved_bytes_fixed;
    let again = if inferred.backward_reads_output { output } else { 0 };

    let element = measured.precision.bytes();
    let cost = |seconds: f64, values: usize, bytes: usize| Cost {
        seconds,
        flops: samples as f64 * inferred.forward_flops as f64,
        bytes: (element * values + bytes) as f64,
    };
    // Gradients by parameters are f32 in any case.
    let grad_params = size_of::<f32>() * params;
    let (backward, alone) = (time.backward.as_secs_f64(), time.weights_alone.as_secs_f64());
    let forward = cost(time.forward.as_secs_f64(), input + params + output, saved);
    let (data, weights) = match (grad_input > 0, params > 0) {
        _ if !learns => (Cost::default(), Cost::default()),
        (true, false) => {
            let read = output + again + if inferred.backward_reads_input { input } else { 0 };
            (cost(backward, read + grad_input, saved), Cost::default())
        }
        (false, _) => (Cost::default(), cost(backward, input + output + again, saved + grad_params)),
        (true, true) => {
            let alone = alone.min(backward);
            let data = cost(backward - alone, output + params + grad_input, saved);
            (data, cost(alone, input + output + again, grad_params))
        }
    };
    [forward, data, weights]
}

/// Reduce and update: these tensors' share, by size, of the time of their bucket, and of what had to wait for all buckets.
fn after_backward(measured: &Measured<'_>, params: &[Param]) -> Cost {
    let Some(first) = params.first() else { return Cost::default() };
    let (range, time) = (measured.parts.iter())
        .find(|(range, _)| range.contains(&first.range.start))
        .expect("buckets cover all parameters");
    let all = &measured.net.table().params;
    let in_bucket: usize =
        all.iter().filter(|param| range.contains(&param.range.start)).map(|param| param.spec.len()).sum();
    let share = |time: &Duration, of: usize| time.as_secs_f64() * total(params) as f64 / of as f64;

    let bytes = (size_of::<f32>() * total(params)) as f64;
    let rounded = if measured.precision != Precision::F32 { bytes / 2.0 } else { 0.0 };
    let ranks = measured.plan.ranks as f64;
    let moved = match measured.transport {
        // The time does not say how fast bytes went that were moved behind backward, or also to the other ranks.
        _ if measured.overlap || (measured.gpu.is_some() && ranks > 1.0) => 0.0,
        "tcp" => 2.0 * bytes * (ranks - 1.0) / ranks,
        _ => (bytes * (ranks + 2.0 + 2.0 * measured.state_tensors as f64) + rounded) / ranks,
    };
    Cost { seconds: share(time, in_bucket) + share(&measured.finish, total(all)), flops: 0.0, bytes: moved }
}

fn total(params: &[Param]) -> usize {
    params.iter().map(|param| param.spec.len()).sum()
}
