//! The update on a GPU: one pass over the flat arenas, whatever the tensors' number and lengths, that also writes the rounded
//! weights which layers in 16 bits read. With S tensors of state an element costs 4 (2 + S) bytes read and 4 (1 + S) written,
//! and 2 for the rounded weight.
//!
//! The arenas are cut into chunks of one tensor each, of 4096 elements at most, a block's work. Every element is computed with
//! the operations of the CPU's rule in their order, each rounded by itself, and norms are summed by the CPU's tree: the
//! results have the bits that `optim::new`'s have.
//!
//! What changes from step to step (learning rate, bias corrections, the factor of clipping, the scale of the loss) lies in device
//! memory, written by `begin` and `measure`; so the launches of `update` are the same at each step, and a CUDA graph may hold them.
//! A step that turns out to be bad is halted there too (`Control`), and so is noted that a parameter is not finite any more.

mod control;
mod numbers;
mod overflow;

pub use control::Control;

use super::loss_scale::{LossScale, Scaling};
use super::{At, Optimizer};
use crate::config::raw::{self, Rule};
use crate::device::cuda::kernels::{Argument, Grid, Kernel, Module, Read, Source, Value, Write};
use crate::device::cuda::{Gpu, Stream};
use crate::device::{Arena, Place, Slice, SliceMut};
use crate::error::Result;
use crate::model::params::{ParamTable, Role};
use crate::model::precision::Precision;
use control::Words;
use numbers::Numbers;
use overflow::Overflow;
use std::ops::Range;
use std::sync::Arc;

static SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

/// Elements of a chunk at most.
const CHUNK: usize = 4096;
const THREADS: u32 = 256;

/// The optimizer of `[optimizer]` over a net's arenas.
pub struct Update {
    gpu: Gpu,
    config: raw::Optimizer,
    states: usize,
    /// Where each chunk begins, and where the last one ends.
    starts: Vec<usize>,
    chunks: Arena,
    /// By tensor: the momentum of a running statistic, or less than 0.
    running: Arena,
    numbers: Arena,
    control: Arc<Control>,
    begin: Kernel<(Write<Numbers>, Numbers, Write<Words>)>,
    rule: Kernel<(Arenas,)>,
    /// Where the loss is scaled.
    overflow: Option<Overflow>,
    norms: Option<Norms>,
}

/// The arenas that an update works on; all but those of the state have all elements of the parameters.
pub struct Buffers<'a> {
    pub params: SliceMut<'a>,
    /// Sums over all ranks.
    pub grads: Slice<'a>,
    /// In the order of `Optimizer::state`, zeros at first.
    pub state: &'a [Arena],
    /// Where in `state` the first of the elements lies that are updated, a multiple of 16.
    pub first_state: usize,
    /// The rounded weights; empty where layers read f32.
    pub rounded: SliceMut<'a>,
}

/// A part of one tensor, as in optim.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Chunk {
    first: u64,
    len: u32,
    tensor: u32,
}

impl Value for Chunk {
    const NAME: &'static str = "Chunk";
}

/// Addresses and bounds, as in optim.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arenas {
    chunks: usize,
    running: usize,
    numbers: usize,
    control: usize,
    params: usize,
    grads: usize,
    state: [usize; 2],
    rounded: usize,
    rates: usize,
    first: u64,
    end: u64,
}

// SAFETY: the same struct in optim.cu: twelve words of 64 bits.
unsafe impl Argument for Arenas {
    fn c_type() -> String {
        "Arenas".to_owned()
    }
}

impl Update {
    /// For a net of this precision, whose layers read weights rounded to it.
    pub fn new(config: &raw::Optimizer, table: &ParamTable, precision: Precision) -> Result<Update> {
        let gpu = Gpu::of_this_rank()?;
        let (chunks, firsts) = cut(table);
        let running = table.params.iter().map(|param| match param.spec.role {
            Role::Running { momentum } => momentum,
            Role::Trainable => -1.0,
        });
        let running: Vec<f32> = running.collect();
        let end = chunks.last().map_or(0, |last| last.first as usize + last.len as usize);
        let starts = chunks.iter().map(|chunk| chunk.first as usize).chain([end]).collect();
        let module = gpu.module(&SOURCE, precision.element())?;
        let rule = super::new(config);
        let norms = config.shared.clip_norm.is_some() || rule.needs_norms();
        let scaling = (precision == Precision::Fp16).then(|| Scaling::new(&config.shared));
        let scale = LossScale::at_first(scaling.unwrap_or(Scaling::NONE));
        Ok(Update {
            states: rule.state().len(),
            starts,
            norms: norms.then(|| Norms::new(&gpu, &module, chunks.len(), &firsts, &*rule)).transpose()?,
            chunks: uploaded(&gpu, &chunks)?,
            running: uploaded(&gpu, &running)?,
            numbers: gpu.allocate(size_of::<Numbers>())?,
            control: Arc::new(Control::new(&gpu, scale)?),
            overflow: scaling.map(|scaling| Overflow::new(&module, scaling)).transpose()?,
            begin: module.kernel("begin_step")?,
            rule: module.kernel(kernel_of(&config.rule))?,
            gpu,
            config: config.clone(),
        })
    }

    /// By which kernels of others halt a step, and see the loss's scale.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Whether the loss is scaled: then `measure` is called in each step.
    pub fn scales_loss(&self) -> bool {
        self.overflow.is_some()
    }

    /// Whether the loss is scaled by what the configuration says, in all steps.
    pub fn loss_scale_is_fixed(&self) -> bool {
        self.overflow.as_ref().is_some_and(Overflow::is_fixed)
    }

    /// A step begins, which nothing halts yet: its learning rate and number go to the GPU, in the compute stream.
    pub fn begin(&self, at: At) -> Result<()> {
        let one = Grid { blocks: [1; 3], threads: [1; 3], shared_bytes: 0 };
        let numbers = Numbers::new(&self.config, at);
        let arguments = ((&mut whole_mut(&self.numbers)).into(), numbers, (&mut self.control.words()).into());
        // SAFETY: whoever uses this memory waits for the compute stream, and is waited for by it.
        unsafe { self.begin.launch(self.gpu.compute(), one, arguments) }
    }

    /// Where the update needs all gradients, between `begin` and the first `update` of a step: looks for overflows of a scaled
    /// loss, clips by norm, and sets rates.
    ///
    /// # Safety
    /// The stream has waited for `begin`. All elements of both arenas stay allocated, and nobody else writes them, until the
    /// stream has come past this.
    pub unsafe fn measure(&self, stream: &Stream, grads: Slice<'_>, params: Slice<'_>) -> Result<()> {
        // A net without parameters.
        if self.starts.len() == 1 {
            return Ok(());
        }
        let of = |values| Measured { values, chunks: &self.chunks, running: &self.running, numbers: &self.numbers };
        if let Some(overflow) = &self.overflow {
            // SAFETY: the caller's promise.
            unsafe { overflow.judge(stream, of(grads), &self.control) }?;
        }
        let Some(norms) = &self.norms else { return Ok(()) };
        if self.config.shared.clip_norm.is_some() {
            // SAFETY: the caller's promise.
            unsafe { norms.squares(stream, of(grads), Stage::Unscaled, &norms.gradients) }?;
            norms.clip(stream, &self.numbers)?;
        }
        let Some(rates) = &norms.rates else { return Ok(()) };
        // SAFETY: the caller's promise.
        unsafe {
            norms.squares(stream, of(grads), Stage::Clipped, &norms.gradients)?;
            norms.squares(stream, of(params), Stage::AsIs, &norms.weights)?;
        }
        norms.set_rates(stream, &self.numbers, rates)
    }

    /// Updates the parameters, the state and the rounded weights at `elements`, which begin at a multiple of 16; if the step
    /// was halted, none of it changes.
    ///
    /// # Safety
    /// The stream has waited for `begin`. All stay allocated, and nobody else touches these elements, until the stream has come
    /// past this.
    pub unsafe fn update(&self, stream: &Stream, elements: Range<usize>, buffers: Buffers<'_>) -> Result<()> {
        assert!(elements.start.is_multiple_of(16), "an update from element {} on", elements.start);
        assert_eq!(buffers.state.len(), self.states, "tensors of state");
        assert!(buffers.first_state.is_multiple_of(16), "state from element {} on", buffers.first_state);
        let bytes = elements.end * size_of::<f32>();
        assert!([buffers.params.bytes(), buffers.grads.bytes()].into_iter().all(|arena| arena >= bytes));
        let held = (buffers.first_state + elements.len()) * size_of::<f32>();
        assert!(buffers.state.iter().all(|arena| arena.bytes() >= held), "state of {elements:?}");
        assert_eq!(buffers.params.place(), Place::Cuda, "a CUDA kernel was given memory of the CPU");
        let chunks = self.starts.len() - 1;
        let first = self.starts[1..].partition_point(|&end| end <= elements.start).min(chunks);
        let last = self.starts[..chunks].partition_point(|&start| start < elements.end);
        if first >= last {
            return Ok(());
        }
        // Kernels count from the first of all elements, which may not be there.
        let shift = (elements.start * size_of::<f32>()).wrapping_sub(buffers.first_state * size_of::<f32>());
        let state = |number: usize| buffers.state.get(number).map_or(0, |arena| arena.address().wrapping_sub(shift));
        let rates = self.norms.as_ref().and_then(|norms| norms.rates.as_ref());
        let arenas = Arenas {
            chunks: self.chunks.address() + first * size_of::<Chunk>(),
            running: self.running.address(),
            numbers: self.numbers.address(),
            control: self.control.words().address(),
            params: buffers.params.address(),
            grads: buffers.grads.address(),
            state: [state(0), state(1)],
            rounded: if buffers.rounded.bytes() > 0 { buffers.rounded.address() } else { 0 },
            rates: rates.map_or(0, Arena::address),
            first: elements.start as u64,
            end: elements.end as u64,
        };
        // SAFETY: the chunks that the elements are in, and arenas that reach so far; the caller vouches for the rest.
        unsafe { self.rule.launch(stream, blocks(last - first), (arenas,)) }
    }
}

/// The chunks of all tensors, in order, and the number of each tensor's first, and of all.
fn cut(table: &ParamTable) -> (Vec<Chunk>, Vec<u32>) {
    let (mut chunks, mut firsts) = (Vec::new(), vec![0]);
    for (tensor, param) in table.params.iter().enumerate() {
        for first in param.range.clone().step_by(CHUNK) {
            let len = CHUNK.min(param.range.end - first);
            chunks.push(Chunk { first: first as u64, len: len as u32, tensor: tensor as u32 });
        }
        firsts.push(chunks.len() as u32);
    }
    (chunks, firsts)
}

fn kernel_of(rule: &Rule) -> &'static str {
    match rule {
        Rule::Sgd { momentum: 0.0, .. } => "update_sgd",
        Rule::Sgd { nesterov: true, .. } => "update_nesterov",
        Rule::Sgd { .. } => "update_momentum",
        Rule::Adam { .. } | Rule::Adamw { .. } => "update_adam",
        Rule::Adagrad { .. } => "update_adagrad",
        Rule::Adadelta { .. } => "update_adadelta",
        Rule::Lars { .. } => "update_lars",
    }
}

/// L2 norms of whole tensors, and what is made of them.
struct Norms {
    tensors: usize,
    /// Numbers of the tensors' first chunks.
    firsts: Arena,
    /// f64 by chunk.
    sums: Arena,
    /// f64 by tensor.
    gradients: Arena,
    weights: Arena,
    /// Learning rates by tensor, where the rule makes them.
    rates: Option<Arena>,
    chunk_squares: ChunkSquares,
    tensor_squares: TensorSquares,
    clip_by_norm: Kernel<(Read<f64>, Write<Numbers>, u32)>,
    lars_rates: LarsRates,
}

/// values, chunks, numbers, stage, sums
type ChunkSquares = Kernel<(Read<f32>, Read<Chunk>, Read<Numbers>, u32, Write<f64>)>;
/// sums, chunks, firsts, running, squares
type TensorSquares = Kernel<(Write<f64>, Read<Chunk>, Read<u32>, Read<f32>, Write<f64>)>;
/// gradients, weights, numbers, rates, tensors
type LarsRates = Kernel<(Read<f64>, Read<f64>, Read<Numbers>, Write<f32>, u32)>;

/// What is measured of the values: of gradients, what they are after so much of their way. As in optim.cu.
#[derive(Clone, Copy)]
enum Stage {
    AsIs = 0,
    Unscaled = 1,
    Clipped = 2,
}

/// An arena that is measured, and how it is cut.
struct Measured<'a> {
    values: Slice<'a>,
    chunks: &'a Arena,
    running: &'a Arena,
    numbers: &'a Arena,
}

impl Norms {
    fn new(gpu: &Gpu, module: &Arc<Module>, chunks: usize, firsts: &[u32], rule: &dyn Optimizer) -> Result<Norms> {
        let tensors = firsts.len() - 1;
        let rates = rule.needs_norms().then(|| gpu.allocate(tensors * size_of::<f32>()));
        Ok(Norms {
            tensors,
            firsts: uploaded(gpu, firsts)?,
            sums: gpu.allocate(chunks * size_of::<f64>())?,
            gradients: gpu.allocate(tensors * size_of::<f64>())?,
            weights: gpu.allocate(tensors * size_of::<f64>())?,
            rates: rates.transpose()?,
            chunk_squares: module.kernel("chunk_squares")?,
            tensor_squares: module.kernel("tensor_squares")?,
            clip_by_norm: module.kernel("clip_by_norm")?,
            lars_rates: module.kernel("lars_rates")?,
        })
    }

    /// The squares of each tensor.
    ///
    /// # Safety
    /// The values stay allocated, and nobody else writes them, until the stream has come past this.
    unsafe fn squares(&self, stream: &Stream, of: Measured<'_>, stage: Stage, to: &Arena) -> Result<()> {
        let (mut sums, mut squares) = (whole_mut(&self.sums), whole_mut(to));
        let by_chunk =
            (of.values.into(), whole(of.chunks).into(), whole(of.numbers).into(), stage as u32, (&mut sums).into());
        let by_tensor = (
            (&mut sums).into(),
            whole(of.chunks).into(),
            whole(&self.firsts).into(),
            whole(of.running).into(),
            (&mut squares).into(),
        );
        let chunks = self.sums.bytes() / size_of::<f64>();
        // SAFETY: lengths as the kernels' comments say; the caller vouches for the values.
        unsafe {
            self.chunk_squares.launch(stream, blocks(chunks), by_chunk)?;
            self.tensor_squares.launch(stream, blocks(self.tensors), by_tensor)
        }
    }

    /// Sets the factor of all gradients.
    fn clip(&self, stream: &Stream, numbers: &Arena) -> Result<()> {
        let one = Grid { blocks: [1; 3], threads: [1; 3], shared_bytes: 0 };
        let arguments = (whole(&self.gradients).into(), (&mut whole_mut(numbers)).into(), self.tensors as u32);
        // SAFETY: a square for each tensor.
        unsafe { self.clip_by_norm.launch(stream, one, arguments) }
    }

    fn set_rates(&self, stream: &Stream, numbers: &Arena, rates: &Arena) -> Result<()> {
        let arguments = (
            whole(&self.gradients).into(),
            whole(&self.weights).into(),
            whole(numbers).into(),
            (&mut whole_mut(rates)).into(),
            self.tensors as u32,
        );
        // SAFETY: a square of each kind and a rate for each tensor.
        unsafe { self.lars_rates.launch(stream, blocks(self.tensors.div_ceil(THREADS as usize)), arguments) }
    }
}

/// A block for each of so many.
fn blocks(count: usize) -> Grid {
    Grid { blocks: [count as u32, 1, 1], threads: [THREADS, 1, 1], shared_bytes: 0 }
}

fn uploaded<V: bytemuck::Pod>(gpu: &Gpu, values: &[V]) -> Result<Arena> {
    let arena = gpu.allocate(size_of_val(values))?;
    // SAFETY: the values' own bytes, whose alignment is at least 4, for the time of the call.
    let from = unsafe { Slice::from_raw(Place::Host, values.as_ptr() as usize, size_of_val(values)) };
    gpu.compute().copy_and_wait(from, whole_mut(&arena))?;
    Ok(arena)
}

/// Memory that is used by work of one step after the other.
fn whole(arena: &Arena) -> Slice<'_> {
    // SAFETY: as the comment says.
    unsafe { arena.slice(0..arena.bytes()) }
}

fn whole_mut(arena: &Arena) -> SliceMut<'_> {
    // SAFETY: as above.
    unsafe { arena.slice_mut(0..arena.bytes()) }
}
