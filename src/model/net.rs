//! The network with memory: one arena for activations, their gradients and the layers' scratch, planned once; forward and
//! backward walk the nodes and hand each layer its buffers. Nothing is allocated after `new`.

mod plan;

use super::elementwise::Elementwise;
use super::params::{Param, ParamTable};
use super::precision::Precision;
use super::spec::{Activation, DATA, MAX_INPUTS, MAX_PARAMS, NetSpec};
use super::stopwatch::{Part, Stopwatch};
use super::weights::Weights;
use super::{Backward, Build, Forward, GpuScratch, Layer, Pass, Shape};
use crate::device::{self, Arena, Place, Slice, SliceMut};
use crate::error::{Error, Result};
use plan::Plan;
use std::array;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// How a net is built.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Samples at most in one pass.
    pub batch: usize,
    pub place: Place,
    pub threads: usize,
    pub seed: u64,
    pub precision: Precision,
    /// As in `Build`.
    pub tf32: bool,
    pub nondeterministic: bool,
    /// Whether backward will be called; without it activations are given up as soon as they were read.
    pub training: bool,
}

impl Options {
    /// For the layer of this number, whose inputs have these shapes.
    fn build<'a>(&self, spec: &NetSpec, number: usize, inputs: &'a [Shape]) -> Build<'a> {
        let node = &spec.nodes[number];
        Build {
            inputs,
            batch: self.batch,
            tf32: self.tf32,
            nondeterministic: self.nondeterministic,
            training: self.training,
            grad_inputs: node.inputs.iter().any(|&input| spec.needs_gradient(input)),
            threads: self.threads,
            seed: self.seed,
            layer: number,
            masks_input: node.masks_input,
            grad_masked: node.grad_masked,
            sums_input: node.sums_input && self.place == Place::Cuda,
            grad_summed: node.grad_summed && self.place == Place::Cuda,
        }
    }
}

/// Bytes of activations, their gradients and scratch, if the layers need this scratch.
pub fn memory_bytes(spec: &NetSpec, options: &Options, scratch: &[usize]) -> usize {
    Plan::new(spec, options, scratch).bytes
}

/// What the layers' scratch on a GPU takes, by layer, as far as it is known before they are built.
pub fn gpu_scratch(spec: &NetSpec, options: &Options) -> Vec<GpuScratch> {
    let of = |number: usize| {
        let inputs = spec.input_shapes(number);
        spec.nodes[number].spec.gpu_scratch(&options.build(spec, number, &inputs), options.precision.element())
    };
    (0..spec.nodes.len()).map(of).collect()
}

pub struct Net {
    spec: NetSpec,
    precision: Precision,
    elementwise: Elementwise,
    table: ParamTable,
    layers: Vec<Box<dyn Layer>>,
    plan: Plan,
    memory: Arena,
    /// What holds it beside the net changes parameters between passes, or those of layers whose backward is over.
    weights: Arc<Weights>,
    stopwatch: Option<Stopwatch>,
}

/// Values of an activation of a whole batch, at most: the layers' tables address them with 32 bits.
const MAX_VALUES: usize = 1 << 32;

impl Net {
    /// Builds all layers and draws the initial parameters from the seed.
    pub fn new(spec: NetSpec, options: &Options) -> Result<Net> {
        let len = ParamTable::new(&spec).len();
        let weights = Weights::new(len, options.precision, |bytes| device::allocate(options.place, bytes))?;
        Net::with_weights(spec, options, Arc::new(weights))
    }

    /// The same with parameters in memory that is given, as many as `ParamTable::len` says.
    pub fn with_weights(spec: NetSpec, options: &Options, weights: Arc<Weights>) -> Result<Net> {
        refuse_giants(&spec, options.batch)?;
        let spec = spec.on(options.place);
        let table = ParamTable::new(&spec).on(options.place);
        let activations = |error: Error| error.context(format!("activations of {} samples", options.batch));
        // Asked for before layers make tables of its size, and on a GPU time algorithms in as much again; taken when they say
        // how much scratch they need.
        device::check_room(options.place, memory_bytes(&spec, options, &vec![0; spec.nodes.len()]))
            .map_err(activations)?;
        assert_eq!(weights.f32.bytes(), table.len() * size_of::<f32>(), "memory for the parameters");
        let mut layers = Vec::with_capacity(spec.nodes.len());
        for (number, node) in spec.nodes.iter().enumerate() {
            let inputs = spec.input_shapes(number);
            let build = options.build(&spec, number, &inputs);
            let layer = match (options.place, options.precision) {
                (Place::Cuda, precision) => node.spec.build_cuda(&build, precision.element()),
                (Place::Host, Precision::F32) => node.spec.build(&build),
                (Place::Host, _) => node.spec.build_bf16(&build),
            };
            layers.push(layer.map_err(|e| e.context(format!("layer `{}`", node.name)))?);
        }
        let scratch: Vec<usize> = layers.iter().map(|layer| layer.scratch_bytes()).collect();
        let plan = Plan::new(&spec, options, &scratch);
        let memory = device::allocate(options.place, plan.bytes).map_err(activations)?;
        let precision = options.precision;
        let elementwise = Elementwise::new(options.place, precision)?;
        let mut net = Net { spec, precision, elementwise, table, layers, plan, memory, weights, stopwatch: None };
        net.initialise(options.seed)?;
        Ok(net)
    }

    pub fn place(&self) -> Place {
        self.memory.place()
    }
    pub fn spec(&self) -> &NetSpec {
        &self.spec
    }
    pub fn table(&self) -> &ParamTable {
        &self.table
    }
    /// Bytes of activations, their gradients and scratch.
    pub fn memory_bytes(&self) -> usize {
        self.plan.bytes
    }
    /// All parameters, in the order of the table.
    pub fn params(&self) -> Result<Cow<'_, [f32]>> {
        // SAFETY: parameters are written through `edit_params`, and by others at no time at which someone asks for all.
        unsafe { self.weights.to_host() }
    }
    /// Lends all parameters for writing.
    pub fn edit_params<T>(&mut self, edit: impl FnOnce(&ParamTable, &mut [f32]) -> T) -> Result<T> {
        // SAFETY: `&mut self`.
        unsafe { self.weights.edit(|params| edit(&self.table, params)) }
    }

    /// From `Some` to `None` its layers are timed.
    pub fn stopwatch_mut(&mut self) -> &mut Option<Stopwatch> {
        &mut self.stopwatch
    }

    pub fn is_timed(&self) -> bool {
        self.stopwatch.is_some()
    }

    /// Output of the last forward, in f32: (batch, outputs).
    pub fn output(&self, pass: &Pass) -> Slice<'_> {
        self.cut(&self.plan.output, self.output_bytes(pass)).into_shared()
    }
    /// The same for the CPU to read.
    pub fn output_to_host(&self, pass: &Pass) -> Result<Cow<'_, [f32]>> {
        self.elementwise.to_host(self.output(pass))
    }
    /// The output, and the gradient of the loss by it, which the loss writes before backward; both in f32.
    pub fn output_and_gradient(&mut self, pass: &Pass) -> (Slice<'_>, SliceMut<'_>) {
        (self.output(pass), self.cut(&self.plan.output_gradient, self.output_bytes(pass)))
    }

    /// `images` (batch, H, W, C), on the net's device, in f32 or, on a GPU, in the net's precision, to `output`.
    pub fn forward(&mut self, pass: &Pass, images: Slice<'_>) -> Result<()> {
        self.begin(pass)?;
        self.forward_begun(pass, images)
    }

    /// What of `forward` differs from pass to pass though the batches are alike.
    pub fn begin(&mut self, pass: &Pass) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.begin(pass))
    }

    /// The rest of it.
    pub fn forward_begun(&mut self, pass: &Pass, images: Slice<'_>) -> Result<()> {
        self.take_images(pass, images)?;
        (0..self.layers.len())
            .try_for_each(|node| self.timed(node, Part::Forward, |net| net.forward_node(node, pass, images)))?;
        if self.precision != Precision::F32 {
            let output = self.activation(self.spec.nodes.len(), pass, Slice::empty());
            // SAFETY: the net's own memory, in the order of its stream.
            unsafe { self.elementwise.widen(output, self.cut(&self.plan.output, self.output_bytes(pass))) }?;
        }
        Ok(())
    }

    /// Walks from the gradient of the output to the gradient of every parameter, which it writes into `grads` in the
    /// table's order. `done(n)` is called as soon as the first n elements of `grads` are final.
    pub fn backward(
        &mut self,
        pass: &Pass,
        images: Slice<'_>,
        grads: &Arena,
        done: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        self.backward_with_factors(pass, images, grads, |_| SliceMut::empty(), done)
    }

    /// The same, but a layer for whose number `factors` gives memory leaves its factors there and no gradient in `grads`.
    pub fn backward_with_factors<'a>(
        &mut self,
        pass: &Pass,
        images: Slice<'_>,
        grads: &Arena,
        factors: impl Fn(usize) -> SliceMut<'a>,
        mut done: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        if self.precision != Precision::F32 {
            let gradient = self.cut(&self.plan.output_gradient, self.output_bytes(pass)).into_shared();
            // SAFETY: the net's own memory, in the order of its stream.
            unsafe { self.elementwise.narrow(gradient, self.gradient(self.spec.nodes.len(), pass)) }?;
        }
        for node in (0..self.layers.len()).rev() {
            if self.spec.nodes[node].learns {
                if self.stopwatch.as_ref().is_some_and(|stopwatch| stopwatch.apart)
                    && self.spec.has_both_gradients(node)
                {
                    self.timed(node, Part::WeightsAlone, |net| {
                        net.backward_node(node, pass, images, grads, factors(node), Wanted::Parameters)
                    })?;
                }
                self.timed(node, Part::Backward, |net| {
                    net.backward_node(node, pass, images, grads, factors(node), Wanted::All)
                })?;
            }
            if let Some(last) = self.table.of_node(node).last() {
                done(last.end_of_line())?;
            }
        }
        Ok(())
    }

    /// Looks for the place where a non-finite value arose: runs forward again and checks parameters and outputs in order.
    pub fn find_non_finite(&mut self, pass: &Pass, images: Slice<'_>) -> Result<String> {
        let bad = |values: &[f32]| values.iter().any(|x| !x.is_finite());
        let finite = match self.place() {
            Place::Host => !bad(images.f32()),
            Place::Cuda => self.elementwise.is_finite(images)?,
        };
        if !finite {
            return Ok("the input data hold a value that is not finite".into());
        }
        self.begin(pass)?;
        self.take_images(pass, images)?;
        let params = self.params()?;
        let broken: Vec<usize> = (0..self.table.params.len())
            .filter(|&param| bad(&params[self.table.params[param].range.clone()]))
            .collect();
        drop(params);
        for node in 0..self.layers.len() {
            let broken = broken.iter().map(|&param| &self.table.params[param]).find(|param| param.node == node);
            if let Some(param) = broken {
                return Ok(format!("parameter `{}` is not finite: an earlier update broke it", param.name));
            }
            self.forward_node(node, pass, images)?;
            if !self.elementwise.is_finite(self.activation(node + 1, pass, Slice::empty()))? {
                let node = &self.spec.nodes[node];
                return Ok(format!("it arose in the output of layer `{}` ({})", node.name, node.kind));
            }
        }
        Ok("every layer's output is finite: it arose in the loss".into())
    }

    fn initialise(&mut self, seed: u64) -> Result<()> {
        self.edit_params(|table, params| {
            for param in &table.params {
                param.spec.initialise(seed, param.number, &mut params[param.range.clone()]);
            }
        })
    }

    /// In 16 bits the CPU's layers read a copy of the images. To a GPU they come in 16 bits.
    fn take_images(&mut self, pass: &Pass, images: Slice<'_>) -> Result<()> {
        if !self.copies_images() {
            assert_eq!(images.bytes(), self.activation_bytes(DATA, pass), "images of another precision");
            return Ok(());
        }
        let copy = self.cut(&self.plan.activations[DATA], self.activation_bytes(DATA, pass));
        // SAFETY: the net's own memory, in the order of its stream; the caller lends the images for the whole pass.
        unsafe { self.elementwise.narrow(images, copy) }
    }

    fn timed(&mut self, node: usize, part: Part, work: impl FnOnce(&mut Net) -> Result<()>) -> Result<()> {
        let Some(stopwatch) = &self.stopwatch else { return work(self) };
        let (mark, start) = (stopwatch.mark()?, Instant::now());
        work(self)?;
        let host = start.elapsed();
        self.stopwatch.as_mut().map_or(Ok(()), |stopwatch| stopwatch.add(node, part, host, mark))
    }

    fn forward_node(&mut self, node: usize, pass: &Pass, images: Slice<'_>) -> Result<()> {
        let entry = &self.spec.nodes[node];
        let inputs: [Slice; MAX_INPUTS] =
            array::from_fn(|i| entry.inputs.get(i).map_or(Slice::empty(), |&a| self.activation(a, pass, images)));
        let (params, params_rounded) = self.node_params(node);
        let count = entry.inferred.params.len();
        let io = Forward {
            inputs: &inputs[..entry.inputs.len()],
            output: self.cut(&self.plan.activations[node + 1], self.activation_bytes(node + 1, pass)),
            params: &params[..count],
            params_rounded: &params_rounded[..count],
            saved: self.whole(&self.plan.saved[node]),
            scratch: self.whole(&self.plan.scratch[node][0]),
        };
        self.layers[node].forward(pass, io)
    }

    fn backward_node(
        &mut self,
        node: usize,
        pass: &Pass,
        images: Slice<'_>,
        grads: &Arena,
        factors: SliceMut<'_>,
        wanted: Wanted,
    ) -> Result<()> {
        let entry = &self.spec.nodes[node];
        let inferred = &entry.inferred;
        let inputs: [Slice; MAX_INPUTS] = array::from_fn(|i| match entry.inputs.get(i) {
            Some(&activation) if inferred.backward_reads_input => self.activation(activation, pass, images),
            _ => Slice::empty(),
        });
        let mut grad_inputs: [SliceMut; MAX_INPUTS] = array::from_fn(|i| match entry.inputs.get(i) {
            Some(&activation) if wanted == Wanted::All => match &self.plan.extra[node][i] {
                Some(extra) => self.cut(extra, self.activation_bytes(activation, pass)),
                None => self.gradient(activation, pass),
            },
            _ => SliceMut::empty(),
        });
        let (params, params_rounded) = self.node_params(node);
        let tensors = self.table.of_node(node);
        // SAFETY: tensors do not overlap, and the caller lent `grads` to this backward.
        let grad_of = |param: &Param| unsafe { grads.slice_mut(Precision::F32.bytes_of(&param.range)) };
        let mut grad_params: [SliceMut; MAX_PARAMS] =
            array::from_fn(|i| tensors.get(i).map_or(SliceMut::empty(), grad_of));
        let input_sums = match entry.sums_input && self.place() == Place::Cuda {
            true => grad_of(&self.table.of_node(entry.inputs[0] - 1)[1]),
            false => SliceMut::empty(),
        };
        let io = Backward {
            inputs: &inputs[..entry.inputs.len()],
            output: match inferred.backward_reads_output {
                true => self.activation(node + 1, pass, Slice::empty()),
                false => Slice::empty(),
            },
            grad_output: self.gradient(node + 1, pass),
            grad_inputs: &mut grad_inputs[..entry.inputs.len()],
            params: &params[..tensors.len()],
            params_rounded: &params_rounded[..tensors.len()],
            grad_params: &mut grad_params[..tensors.len()],
            factors,
            input_sums,
            saved: self.whole(&self.plan.saved[node]).into_shared(),
            scratch: self.whole(&self.plan.scratch[node][1]),
        };
        self.layers[node].backward(pass, io)?;
        if wanted == Wanted::Parameters {
            return Ok(());
        }
        for (i, &activation) in self.spec.nodes[node].inputs.iter().enumerate() {
            if let Some(extra) = &self.plan.extra[node][i] {
                let contribution = self.cut(extra, self.activation_bytes(activation, pass));
                // SAFETY: the net's own memory, in the order of its stream.
                unsafe { self.elementwise.add(self.gradient(activation, pass), contribution.into_shared()) }?;
            }
        }
        Ok(())
    }

    /// A node's parameters in f32 and, if layers read them so, rounded.
    fn node_params(&self, node: usize) -> ([Slice<'static>; MAX_PARAMS], [Slice<'static>; MAX_PARAMS]) {
        let tensors = self.table.of_node(node);
        let of = |arena: &Arena, precision: Precision| {
            array::from_fn(|i| match tensors.get(i) {
                // SAFETY: nobody writes parameters while a pass runs.
                Some(param) if arena.bytes() > 0 => unsafe { arena.slice(precision.bytes_of(&param.range)) },
                _ => Slice::empty(),
            })
        };
        (of(&self.weights.f32, Precision::F32), of(&self.weights.rounded, self.precision))
    }

    fn activation_bytes(&self, activation: Activation, pass: &Pass) -> usize {
        pass.batch * self.spec.shape(activation).len() * self.precision.bytes()
    }

    /// Bytes of the output as the loss sees it.
    fn output_bytes(&self, pass: &Pass) -> usize {
        pass.batch * self.spec.output().len() * size_of::<f32>()
    }

    fn copies_images(&self) -> bool {
        !self.plan.activations[DATA].is_empty()
    }

    fn activation<'a>(&self, activation: Activation, pass: &Pass, images: Slice<'a>) -> Slice<'a> {
        if activation == DATA && !self.copies_images() {
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

/// The gradients that a node's backward is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    All,
    Parameters,
}

/// What passes keeps every sum of the memory plan far from overflow.
fn refuse_giants(spec: &NetSpec, batch: usize) -> Result<()> {
    let fits = |activation| batch.checked_mul(spec.shape(activation).len()).is_some_and(|values| values <= MAX_VALUES);
    let Some(giant) = (DATA..=spec.nodes.len()).find(|&activation| !fits(activation)) else { return Ok(()) };
    let place = match giant.checked_sub(1) {
        None => "the input".to_owned(),
        Some(node) => format!("layer `{}`", spec.nodes[node].name),
    };
    Err(Error::lacking(format!(
        "activations of {batch} samples hold more than 2^32 values in {place}; use a smaller batch, or batch.micro"
    )))
}
