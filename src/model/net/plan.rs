//! Where a net's buffers lie.
//!
//! Time runs over one step: node i works at time i in forward and at time 2 L - i in backward (L nodes, the loss at time
//! L). A buffer lives from its first writer to its last reader on that line, and buffers that never live together share
//! bytes (`memory::plan`).

use super::super::Shape;
use super::super::memory::{self, Lifetime};
use super::super::precision::Precision;
use super::super::spec::{Activation, DATA, NetSpec};
use super::Options;
use crate::device::Place;
use std::ops::Range;

/// Byte offsets in the memory arena. A range of no bytes means that the buffer does not exist.
#[derive(Debug)]
pub struct Plan {
    /// Output of node i at i + 1. The data lie outside, in f32; at 0 is their copy in 16 bits.
    pub activations: Vec<Range<usize>>,
    /// Gradient of each activation.
    pub gradients: Vec<Range<usize>>,
    /// For each node and input: where its contribution goes when another consumer has already written the gradient.
    pub extra: Vec<Vec<Option<Range<usize>>>>,
    pub saved: Vec<Range<usize>>,
    /// For each node: what it works in, in forward and in backward. Nothing of it outlives the call.
    pub scratch: Vec<[Range<usize>; 2]>,
    /// What the loss reads and writes, in f32: in 16 bits copies of the output and its gradient, else these themselves.
    pub output: Range<usize>,
    pub output_gradient: Range<usize>,
    pub bytes: usize,
}

impl Plan {
    /// For nodes that need this scratch, in bytes.
    pub fn new(spec: &NetSpec, options: &Options, scratch: &[usize]) -> Plan {
        let mut planner = Planner { precision: options.precision, batch: options.batch, ..Planner::default() };
        let activations = Self::activations(spec, options, &mut planner);
        let (gradients, extra) = match options.training {
            true => Self::gradients(spec, &mut planner),
            false => {
                let none = spec.nodes.iter().map(|node| vec![None; node.inputs.len()]).collect();
                (vec![None; spec.nodes.len() + 1], none)
            }
        };
        let end = 2 * spec.nodes.len();
        let saved: Vec<_> = (spec.nodes.iter().enumerate())
            .map(|(i, node)| {
                let bytes = node.inferred.saved_bytes * options.batch + node.inferred.saved_bytes_fixed;
                planner.add(bytes, i, if options.training { end - i } else { i })
            })
            .collect();

        let scratch: Vec<_> = (spec.nodes.iter().zip(scratch).enumerate())
            .map(|(i, (node, &bytes))| {
                let backward = if options.training && node.learns { bytes } else { 0 };
                [planner.add(bytes, i, i), planner.add(backward, end - i, end - i)]
            })
            .collect();

        let last = spec.nodes.len();
        let (output, output_gradient) = match options.precision {
            Precision::F32 => (activations[last], gradients[last]),
            Precision::Bf16 | Precision::Fp16 => {
                let bytes = options.batch * spec.output().len() * size_of::<f32>();
                let gradient = if options.training { planner.add(bytes, last, last) } else { None };
                (planner.add(bytes, last, last), gradient)
            }
        };

        let plan = memory::plan(&planner.buffers, options.place.align());
        let place = |buffer: &Option<usize>| match *buffer {
            Some(b) => plan.offsets[b]..plan.offsets[b] + planner.buffers[b].bytes,
            None => 0..0,
        };
        Plan {
            activations: activations.iter().map(place).collect(),
            gradients: gradients.iter().map(place).collect(),
            extra: (extra.iter())
                .map(|inputs| inputs.iter().map(|b| b.is_some().then(|| place(b))).collect())
                .collect(),
            saved: saved.iter().map(place).collect(),
            scratch: scratch.iter().map(|directions| directions.each_ref().map(place)).collect(),
            output: place(&output),
            output_gradient: place(&output_gradient),
            bytes: plan.bytes,
        }
    }

    /// An activation lives from its node to its last reader, in forward or in backward.
    fn activations(spec: &NetSpec, options: &Options, planner: &mut Planner) -> Vec<Option<usize>> {
        let (last, end) = (spec.nodes.len(), 2 * spec.nodes.len());
        let last_reader = |activation: Activation, from: usize| {
            let readers = spec.nodes.iter().enumerate().filter(|(_, reader)| reader.inputs.contains(&activation));
            let times = readers.map(|(j, reader)| match options.training && reader.inferred.backward_reads_input {
                true => end - j,
                false => j,
            });
            times.fold(from, usize::max)
        };
        let data = match (options.precision, options.place) {
            (Precision::F32, _) | (_, Place::Cuda) => None,
            (Precision::Bf16 | Precision::Fp16, Place::Host) => {
                planner.add_activation(spec.input, 0, last_reader(DATA, 0))
            }
        };
        let mut buffers = vec![data];
        for (i, node) in spec.nodes.iter().enumerate() {
            let mut to = last_reader(i + 1, if i + 1 == last { last } else { i });
            if options.training && node.inferred.backward_reads_output {
                to = to.max(end - i);
            }
            buffers.push(planner.add_activation(node.inferred.output, i, to));
        }
        buffers
    }

    /// A gradient lives from the first backward that writes it (the loss for the output) to its own node's. Consumers
    /// after the first write beside it and are added.
    #[allow(clippy::type_complexity)]
    fn gradients(spec: &NetSpec, planner: &mut Planner) -> (Vec<Option<usize>>, Vec<Vec<Option<usize>>>) {
        let (last, end) = (spec.nodes.len(), 2 * spec.nodes.len());
        let mut gradients = vec![None; last + 1];
        gradients[last] = planner.add_activation(spec.output(), last, end - (last - 1));
        let mut extra: Vec<Vec<Option<usize>>> = spec.nodes.iter().map(|node| vec![None; node.inputs.len()]).collect();
        for (j, reader) in spec.nodes.iter().enumerate().rev().filter(|(_, reader)| reader.learns) {
            for (k, &activation) in reader.inputs.iter().enumerate() {
                if !spec.needs_gradient(activation) {
                    continue;
                }
                let shape = spec.shape(activation);
                match gradients[activation] {
                    None => gradients[activation] = planner.add_activation(shape, end - j, end - (activation - 1)),
                    Some(_) => extra[j][k] = planner.add_activation(shape, end - j, end - j),
                }
            }
        }
        (gradients, extra)
    }
}

#[derive(Default)]
struct Planner {
    batch: usize,
    precision: Precision,
    buffers: Vec<Lifetime>,
}

impl Planner {
    fn add_activation(&mut self, shape: Shape, from: usize, to: usize) -> Option<usize> {
        self.add(self.batch * shape.len() * self.precision.bytes(), from, to)
    }

    fn add(&mut self, bytes: usize, from: usize, to: usize) -> Option<usize> {
        if bytes == 0 {
            return None;
        }
        self.buffers.push(Lifetime { bytes, from, to });
        Some(self.buffers.len() - 1)
    }
}
