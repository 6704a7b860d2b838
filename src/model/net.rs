//! The network with memory: one arena for activations and activation gradients, planned once, and one of scratch, which
//! all layers use in turn; forward and backward walk the nodes and hand each layer its buffers. Nothing is allocated
//! after `new`.
//!
//! Time runs over one step: node i works at time i in forward and at time 2 L - i in backward (L nodes, the loss at time
//! L). A buffer lives from its first writer to its last reader on that line, and buffers that never live together share
//! bytes (`memory::plan`).

use super::memory::{self, Lifetime};
use super::params::ParamTable;
use super::spec::{Activation, DATA, MAX_INPUTS, MAX_PARAMS, NetSpec};
use super::{Backward, Build, Forward, Layer, Pass};
use crate::device::{self, Arena, Place, Slice, SliceMut};
use crate::error::{Error, Result};
use std::array;
use std::ops::Range;
use std::sync::Arc;

/// How a net is built.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Samples at most in one pass.
    pub batch: usize,
    pub place: Place,
    pub threads: usize,
    pub seed: u64,
    /// Whether backward will be called; without it activations are given up as soon as they were read.
    pub training: bool,
}

pub struct Net {
    spec: NetSpec,
    table: ParamTable,
    layers: Vec<Box<dyn Layer>>,
    plan: Plan,
    memory: Arena,
    scratch: Arena,
    /// What holds it beside the net changes parameters between passes, or those of layers whose backward is over.
    params: Arc<Arena>,
}

/// Values of an activation of a whole batch, at most: the layers' tables address them with 32 bits.
const MAX_VALUES: usize = 1 << 32;

/// Byte offsets in the memory arena. A range of no bytes means that the buffer does not exist.
#[derive(Debug)]
struct Plan {
    /// Output of node i at i + 1; the data itself lies outside.
    activations: Vec<Range<usize>>,
    /// Gradient of each activation.
    gradients: Vec<Range<usize>>,
    /// For each node and input: where its contribution goes when another consumer has already written the gradient.
    extra: Vec<Vec<Option<Range<usize>>>>,
    saved: Vec<Range<usize>>,
    bytes: usize,
}

impl Net {
    /// Builds all layers and draws the initial parameters from the seed.
    pub fn new(spec: NetSpec, options: &Options) -> Result<Net> {
        let len = ParamTable::new(&spec).len();
        let params = device::allocate(options.place, len * size_of::<f32>())
            .map_err(|e| e.context(format!("{len} parameters")))?;
        Net::with_params(spec, options, Arc::new(params))
    }

    /// The same with parameters in memory that is given, as much as `ParamTable::len` says.
    pub fn with_params(spec: NetSpec, options: &Options, params: Arc<Arena>) -> Result<Net> {
        refuse_giants(&spec, options.batch)?;
        let table = ParamTable::new(&spec);
        let plan = Plan::new(&spec, options);
        // The largest memory first: where it is not to be had, that is said before layers make tables of its size.
        let memory =
            Arena::host(plan.bytes).map_err(|e| e.context(format!("activations of {} samples", options.batch)))?;
        assert_eq!(params.bytes(), table.len() * size_of::<f32>(), "memory for the parameters");
        let mut layers = Vec::with_capacity(spec.nodes.len());
        for (number, node) in spec.nodes.iter().enumerate() {
            let inputs = spec.input_shapes(number);
            let build = Build {
                inputs: &inputs,
                batch: options.batch,
                place: options.place,
                threads: options.threads,
                seed: options.seed,
                layer: number,
            };
            layers.push(node.spec.build(&build).map_err(|e| e.context(format!("layer `{}`", node.name)))?);
        }
        let scratch = layers.iter().map(|layer| layer.scratch_bytes()).max().unwrap_or(0);
        let scratch = Arena::host(scratch).map_err(|e| e.context("scratch of the layers"))?;
        let mut net = Net { spec, table, layers, plan, memory, scratch, params };
        net.initialise(options.seed);
        Ok(net)
    }

    pub fn spec(&self) -> &NetSpec {
        &self.spec
    }
    pub fn table(&self) -> &ParamTable {
        &self.table
    }
    /// Bytes of activations, their gradients and scratch.
    pub fn memory_bytes(&self) -> usize {
        self.plan.bytes + self.scratch.bytes()
    }
    /// All parameters, in the order of the table.
    pub fn params(&self) -> &[f32] {
        // SAFETY: parameters are written through `params_mut`, and by others at no time at which someone asks for all.
        unsafe { self.params.slice(0..self.params.bytes()) }.f32()
    }
    pub fn params_mut(&mut self) -> &mut [f32] {
        self.table_and_params_mut().1
    }
    pub fn table_and_params_mut(&mut self) -> (&ParamTable, &mut [f32]) {
        // SAFETY: `&mut self`.
        (&self.table, unsafe { self.params.slice_mut(0..self.params.bytes()) }.into_f32())
    }

    /// Output of the last forward: (batch, outputs).
    pub fn output(&self, pass: &Pass) -> Slice<'_> {
        self.activation(self.spec.nodes.len(), pass, Slice::empty())
    }
    /// The output, and the gradient of the loss by it, which the loss writes before backward.
    pub fn output_and_gradient(&mut self, pass: &Pass) -> (Slice<'_>, SliceMut<'_>) {
        let last = self.spec.nodes.len();
        (self.activation(last, pass, Slice::empty()), self.gradient(last, pass))
    }

    /// `images` (batch, H, W, C) to `output`.
    pub fn forward(&mut self, pass: &Pass, images: &[f32]) -> Result<()> {
        (0..self.layers.len()).try_for_each(|node| self.forward_node(node, pass, images.into()))
    }

    /// Walks from the gradient of the output to the gradient of every parameter, which it writes into `grads` in the
    /// table's order. `done(n)` is called as soon as the first n elements of `grads` are final.
    pub fn backward(
        &mut self,
        pass: &Pass,
        images: &[f32],
        grads: &Arena,
        mut done: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        for node in (0..self.layers.len()).rev() {
            if self.spec.nodes[node].learns {
                self.backward_node(node, pass, images.into(), grads)?;
            }
            if let Some(last) = self.table.of_node(node).last() {
                done(last.end_of_line())?;
            }
        }
        Ok(())
    }

    /// Looks for the place where a non-finite value arose: runs forward again and checks parameters and outputs in order.
    pub fn find_non_finite(&mut self, pass: &Pass, images: &[f32]) -> Result<String> {
        let bad = |values: &[f32]| values.iter().any(|x| !x.is_finite());
        if bad(images) {
            return Ok("the input data hold a value that is not finite".into());
        }
        for node in 0..self.layers.len() {
            let weights = self.table.of_node(node).iter().find(|p| bad(&self.params()[p.range.clone()]));
            if let Some(param) = weights {
                return Ok(format!("parameter `{}` is not finite: an earlier update broke it", param.name));
            }
            self.forward_node(node, pass, images.into())?;
            if bad(self.activation(node + 1, pass, Slice::empty()).f32()) {
                let node = &self.spec.nodes[node];
                return Ok(format!("it arose in the output of layer `{}` ({})", node.name, node.kind));
            }
        }
        Ok("every layer's output is finite: it arose in the loss".into())
    }

    fn initialise(&mut self, seed: u64) {
        let (table, params) = self.table_and_params_mut();
        for param in &table.params {
            param.spec.initialise(seed, param.number, &mut params[param.range.clone()]);
        }
    }

    fn forward_node(&mut self, node: usize, pass: &Pass, images: Slice<'_>) -> Result<()> {
        let entry = &self.spec.nodes[node];
        let inputs: [Slice; MAX_INPUTS] =
            array::from_fn(|i| entry.inputs.get(i).map_or(Slice::empty(), |&a| self.activation(a, pass, images)));
        let params = self.node_params(node);
        let io = Forward {
            inputs: &inputs[..entry.inputs.len()],
            output: self.cut(&self.plan.activations[node + 1], self.activation_bytes(node + 1, pass)),
            params: &params[..entry.inferred.params.len()],
            saved: self.whole(&self.plan.saved[node]),
            scratch: self.scratch(),
        };
        self.layers[node].forward(pass, io)
    }

    fn backward_node(&mut self, node: usize, pass: &Pass, images: Slice<'_>, grads: &Arena) -> Result<()> {
        let entry = &self.spec.nodes[node];
        let inferred = &entry.inferred;
        let inputs: [Slice; MAX_INPUTS] = array::from_fn(|i| match entry.inputs.get(i) {
            Some(&activation) if inferred.backward_reads_input => self.activation(activation, pass, images),
            _ => Slice::empty(),
        });
        let mut grad_inputs: [SliceMut; MAX_INPUTS] = array::from_fn(|i| match entry.inputs.get(i) {
            Some(&activation) => match &self.plan.extra[node][i] {
                Some(extra) => self.cut(extra, self.activation_bytes(activation, pass)),
                None => self.gradient(activation, pass),
            },
            None => SliceMut::empty(),
        });
        let params = self.node_params(node);
        let tensors = self.table.of_node(node);
        let mut grad_params: [SliceMut; MAX_PARAMS] = array::from_fn(|i| match tensors.get(i) {
            // SAFETY: tensors do not overlap, and the caller lent `grads` to this backward.
            Some(param) => unsafe { grads.slice_mut(bytes_of(&param.range)) },
            None => SliceMut::empty(),
        });
        let io = Backward {
            inputs: &inputs[..entry.inputs.len()],
            output: match inferred.backward_reads_output {
                true => self.activation(node + 1, pass, Slice::empty()),
                false => Slice::empty(),
            },
            grad_output: self.gradient(node + 1, pass),
            grad_inputs: &mut grad_inputs[..entry.inputs.len()],
            params: &params[..tensors.len()],
            grad_params: &mut grad_params[..tensors.len()],
            saved: self.whole(&self.plan.saved[node]).into_shared(),
            scratch: self.scratch(),
        };
        self.layers[node].backward(pass, io)?;
        for (i, &activation) in self.spec.nodes[node].inputs.iter().enumerate() {
            if let Some(extra) = &self.plan.extra[node][i] {
                let contribution = self.cut(extra, self.activation_bytes(activation, pass));
                device::add(self.gradient(activation, pass), contribution.into_shared());
            }
        }
        Ok(())
    }

    fn node_params(&self, node: usize) -> [Slice<'static>; MAX_PARAMS] {
        let tensors = self.table.of_node(node);
        array::from_fn(|i| match tensors.get(i) {
            // SAFETY: nobody writes parameters while a pass runs.
            Some(param) => unsafe { self.params.slice(bytes_of(&param.range)) },
            None => Slice::empty(),
        })
    }

    fn activation_bytes(&self, activation: Activation, pass: &Pass) -> usize {
        pass.batch * self.spec.shape(activation).len() * size_of::<f32>()
    }

    fn activation<'a>(&self, activation: Activation, pass: &Pass, images: Slice<'a>) -> Slice<'a> {
        if activation == DATA {
            return images;
        }
        self.cut(&self.plan.activations[activation], self.activation_bytes(activation, pass)).into_shared()
    }

    /// Empty for the activations whose gradient nobody needs.
    fn gradient<'a>(&self, activation: Activation, pass: &Pass) -> SliceMut<'a> {
        match self.plan.gradients[activation].is_empty() {
            true => SliceMut::empty(),
            false => self.cut(&self.plan.gradients[activation], self.activation_bytes(activation, pass)),
        }
    }

    fn scratch<'a>(&self) -> SliceMut<'a> {
        // SAFETY: one node works at a time, and only that one is handed the scratch.
        unsafe { self.scratch.slice_mut(0..self.scratch.bytes()) }
    }

    fn whole<'a>(&self, range: &Range<usize>) -> SliceMut<'a> {
        self.cut(range, range.len())
    }

    /// The first `bytes` of a planned buffer.
    fn cut<'a>(&self, range: &Range<usize>, bytes: usize) -> SliceMut<'a> {
        assert!(bytes <= range.len(), "a pass of more samples than the net was built for");
        // SAFETY: the plan gives buffers that live at the same time disjoint ranges (tested in memory.rs), and a node is
        // handed only buffers that live at its time.
        unsafe { self.memory.slice_mut(range.start..range.start + bytes) }
    }
}

fn bytes_of(elements: &Range<usize>) -> Range<usize> {
    elements.start * size_of::<f32>()..elements.end * size_of::<f32>()
}

/// What passes keeps every sum of the memory plan far from overflow.
fn refuse_giants(spec: &NetSpec, batch: usize) -> Result<()> {
    let fits = |activation| batch.checked_mul(spec.shape(activation).len()).is_some_and(|values| values <= MAX_VALUES);
    let Some(giant) = (DATA..=spec.nodes.len()).find(|&activation| !fits(activation)) else { return Ok(()) };
    let place = match giant.checked_sub(1) {
        None => "the input".to_owned(),
        Some(node) => format!("layer `{}`", spec.nodes[node].name),
    };
    Err(Error::device(format!(
        "activations of {batch} samples hold more than 2^32 values in {place}; use a smaller batch, or batch.micro"
    )))
}

impl Plan {
    fn new(spec: &NetSpec, options: &Options) -> Plan {
        let mut planner = Planner::default();
        let activations = Self::activations(spec, options, &mut planner);
        let (gradients, extra) = match options.training {
            true => Self::gradients(spec, options, &mut planner),
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

        let plan = memory::plan(&planner.buffers, device::ALIGN);
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
            bytes: plan.bytes,
        }
    }

    /// An activation lives from its node to its last reader, in forward or in backward.
    fn activations(spec: &NetSpec, options: &Options, planner: &mut Planner) -> Vec<Option<usize>> {
        let (last, end) = (spec.nodes.len(), 2 * spec.nodes.len());
        let mut buffers = vec![None];
        for (i, node) in spec.nodes.iter().enumerate() {
            let mut to = if i + 1 == last { last } else { i };
            for (j, reader) in spec.nodes.iter().enumerate().filter(|(_, reader)| reader.inputs.contains(&(i + 1))) {
                let in_backward = options.training && reader.inferred.backward_reads_input;
                to = to.max(if in_backward { end - j } else { j });
            }
            if options.training && node.inferred.backward_reads_output {
                to = to.max(end - i);
            }
            buffers.push(planner.add(options.batch * node.inferred.output.len() * size_of::<f32>(), i, to));
        }
        buffers
    }

    /// A gradient lives from the first backward that writes it (the loss for the output) to its own node's. Consumers
    /// after the first write beside it and are added.
    #[allow(clippy::type_complexity)]
    fn gradients(
        spec: &NetSpec,
        options: &Options,
        planner: &mut Planner,
    ) -> (Vec<Option<usize>>, Vec<Vec<Option<usize>>>) {
        let (last, end) = (spec.nodes.len(), 2 * spec.nodes.len());
        let bytes = |activation| options.batch * spec.shape(activation).len() * size_of::<f32>();
        let mut gradients = vec![None; last + 1];
        gradients[last] = planner.add(bytes(last), last, end - (last - 1));
        let mut extra: Vec<Vec<Option<usize>>> = spec.nodes.iter().map(|node| vec![None; node.inputs.len()]).collect();
        for (j, reader) in spec.nodes.iter().enumerate().rev().filter(|(_, reader)| reader.learns) {
            for (k, &activation) in reader.inputs.iter().enumerate() {
                if !spec.needs_gradient(activation) {
                    continue;
                }
                match gradients[activation] {
                    None => gradients[activation] = planner.add(bytes(activation), end - j, end - (activation - 1)),
                    Some(_) => extra[j][k] = planner.add(bytes(activation), end - j, end - j),
                }
            }
        }
        (gradients, extra)
    }
}

#[derive(Default)]
struct Planner {
    buffers: Vec<Lifetime>,
}

impl Planner {
    fn add(&mut self, bytes: usize, from: usize, to: usize) -> Option<usize> {
        if bytes == 0 {
            return None;
        }
        self.buffers.push(Lifetime { bytes, from, to });
        Some(self.buffers.len() - 1)
    }
}
