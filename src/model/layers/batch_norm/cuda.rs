use super::super::lanes::MOST_BLOCKS_ACROSS;
use super::super::{check_batch, lanes};
use super::Activation;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "batch_norm", text: include_str!("batch_norm.cu") };
/// As in `batch_norm.cu`.
const THREADS: usize = 256;
const LANES: usize = 32;
/// Chunks of rows at most: several for each multiprocessor of any GPU. Sums over the rows of a chunk are in f32.
const MOST_CHUNKS: usize = 1024;

pub struct BatchNorm {
    gpu: Gpu,
    element: Element,
    input: Shape,
    epsilon: f32,
    activation: Activation,
    /// What backward has to undo of it.
    undo: Activation,
    /// Threads of a block: over packs of channels, over rows.
    threads: [usize; 2],
    /// Rows of a chunk.
    chunk: usize,
    scratch: usize,
    kernels: Kernels,
}

struct Kernels {
    moments: MomentsKernel,
    statistics: StatisticsKernel,
    forward: ForwardKernel,
    sums: SumsKernel,
    gradients: GradientsKernel,
    backward: BackwardKernel,
}

/// x, partial, rows, channels, chunk
type MomentsKernel = Kernel<(Read<T>, Write<f32>, u32, u32, u32)>;
/// partial, saved, rows, channels, chunk, epsilon
type StatisticsKernel = Kernel<(Read<f32>, Write<f32>, u32, u32, u32, f32)>;
/// x, y, dy, mean, partial, rows, channels, chunk, activation
type SumsKernel = Kernel<(Read<T>, Read<T>, Read<T>, Read<f32>, Write<f32>, u32, u32, u32, u32)>;
/// partial, saved, dweight, dbias, dmean, dvar, share, channels, chunks
type GradientsKernel = Kernel<(Read<f32>, Read<f32>, Write<f32>, Write<f32>, Write<f32>, Write<f32>, f32, u32, u32)>;
/// x, mean, spread, weight, bias, y, rows, channels, chunk, epsilon, is_variance, activation
type ForwardKernel = Kernel<(Read<T>, F32, F32, F32, F32, Write<T>, u32, u32, u32, f32, u32, u32)>;
/// x, y, dy, saved, weight, dweight, dbias, dx, rows, channels, chunk, activation
type BackwardKernel = Kernel<(Read<T>, Read<T>, Read<T>, F32, F32, F32, F32, Write<T>, u32, u32, u32, u32)>;
type F32 = Read<f32>;

/// How the rows of a batch are cut into chunks, a block of threads each.
pub struct Chunks {
    /// Of a block: over packs of channels, over rows.
    threads: [usize; 2],
    /// Of a chunk.
    rows: usize,
    count: usize,
    channels: usize,
}

impl Chunks {
    pub fn new(build: &Build<'_>, element: Element) -> Chunks {
        let input = build.inputs[0];
        let across = (input.c / lanes(element, &[input.c])).min(LANES);
        let threads = [across, THREADS / across];
        let all = build.batch * input.h * input.w;
        let rows = all.div_ceil(MOST_CHUNKS).max(4 * threads[1]);
        Chunks { threads, rows, count: all.div_ceil(rows), channels: input.c }
    }

    /// Two sums of each channel, by chunk.
    pub fn scratch_bytes(&self) -> usize {
        2 * size_of::<f32>() * self.channels * self.count
    }
}

impl BatchNorm {
    pub fn new(epsilon: f32, activation: Activation, build: &Build<'_>, element: Element) -> Result<BatchNorm> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input])?;
        let chunks = Chunks::new(build, element);
        let module = gpu.module(&SOURCE, element)?;
        let kernels = Kernels {
            moments: module.kernel("batch_norm_moments")?,
            statistics: module.kernel("batch_norm_statistics")?,
            forward: module.kernel("batch_norm_forward")?,
            sums: module.kernel("batch_norm_sums")?,
            gradients: module.kernel("batch_norm_gradients")?,
            backward: module.kernel("batch_norm_backward")?,
        };
        Ok(BatchNorm {
            gpu,
            element,
            input,
            epsilon,
            activation,
            undo: activation.to_undo(build),
            threads: chunks.threads,
            chunk: chunks.rows,
            scratch: chunks.scratch_bytes(),
            kernels,
        })
    }

    fn rows(&self, pass: &Pass) -> usize {
        pass.batch * self.input.h * self.input.w
    }

    /// A block a chunk of rows, and across it as many as the channels take.
    fn grid_over_chunks(&self, pass: &Pass) -> Grid {
        let packs = self.input.c / lanes(self.element, &[self.input.c]);
        let across = packs.div_ceil(self.threads[0]).min(MOST_BLOCKS_ACROSS);
        let chunks = self.rows(pass).div_ceil(self.chunk);
        Grid {
            blocks: [chunks as u32, across as u32, 1],
            threads: [self.threads[0] as u32, self.threads[1] as u32, 1],
            shared_bytes: 0,
        }
    }

    /// A warp a channel, all at once.
    fn grid_over_channels(&self) -> Grid {
        let blocks = (self.input.c * LANES).div_ceil(THREADS) as u32;
        Grid { blocks: [blocks, 1, 1], threads: [THREADS as u32, 1, 1], shared_bytes: 0 }
    }

    /// saved (3, C): mean, inverse standard deviation, unbiased variance.
    fn batch_statistics(
        &self,
        pass: &Pass,
        x: Slice<'_>,
        mut partial: SliceMut<'_>,
        mut saved: SliceMut<'_>,
    ) -> Result<()> {
        let [rows, c, chunk] = [self.rows(pass), self.input.c, self.chunk].map(|count| count as u32);
        let stream = self.gpu.compute();
        let moments = (x.into(), (&mut partial).into(), rows, c, chunk);
        let statistics = ((&partial).into(), (&mut saved).into(), rows, c, chunk, self.epsilon);
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe {
            self.kernels.moments.launch(stream, self.grid_over_chunks(pass), moments)?;
            self.kernels.statistics.launch(stream, self.grid_over_channels(), statistics)
        }
    }
}

impl Layer for BatchNorm {
    fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let [rows, c, chunk] = [self.rows(pass), self.input.c, self.chunk].map(|count| count as u32);
        let [weight, bias, running_mean, running_var] = [0, 1, 2, 3].map(|i| io.params[i]);
        let x = io.inputs[0];
        let (mean, spread) = if pass.training {
            self.batch_statistics(pass, x, io.scratch, io.saved.reborrow())?;
            self.statistics(io.saved.as_slice())
        } else {
            (running_mean, running_var)
        };
        let [mean, spread, weight, bias] = [mean, spread, weight, bias].map(Read::from);
        let (is_variance, activation) = (u32::from(!pass.training), self.activation.number());
        let y = (&mut io.output).into();
        let arguments =
            (x.into(), mean, spread, weight, bias, y, rows, c, chunk, self.epsilon, is_variance, activation);
        // SAFETY: as above.
        unsafe { self.kernels.forward.launch(self.gpu.compute(), self.grid_over_chunks(pass), arguments) }
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        let [rows, c, chunk] = [self.rows(pass), self.input.c, self.chunk].map(|count| count as u32);
        let (stream, undo) = (self.gpu.compute(), self.undo.number());
        let [grad_weight, grad_bias, grad_mean, grad_var] = io.grad_params else { panic!("four parameters") };
        let (x, dy) = (Read::from(io.inputs[0]), Read::from(&io.grad_output));
        // Without an activation to undo nobody reads the output, and there may be none.
        let y = if self.undo == Activation::None { x } else { io.output.into() };
        let (mean, _) = self.statistics(io.saved);
        let sums = (x, y, dy, mean.into(), (&mut io.scratch).into(), rows, c, chunk, undo);
        let (partial, chunks) = ((&io.scratch).into(), rows.div_ceil(chunk));
        let [dweight, dbias, dmean, dvar] = [&mut *grad_weight, grad_bias, grad_mean, grad_var].map(Write::from);
        let gradients = (partial, io.saved.into(), dweight, dbias, dmean, dvar, pass.share, c, chunks);
        // SAFETY: as above.
        unsafe {
            self.kernels.sums.launch(stream, self.grid_over_chunks(pass), sums)?;
            self.kernels.gradients.launch(stream, self.grid_over_channels(), gradients)?;
        }
        let dx = &mut io.grad_inputs[0];
        if dx.bytes() == 0 {
            return Ok(());
        }
        let (weight, dweight, dbias) = (io.params[0].into(), (&*grad_weight).into(), (&*grad_bias).into());
        let arguments = (x, y, dy, io.saved.into(), weight, dweight, dbias, dx.into(), rows, c, chunk, undo);
        // SAFETY: as above.
        unsafe { self.kernels.backward.launch(stream, self.grid_over_chunks(pass), arguments) }
    }
}

impl BatchNorm {
    /// Mean and inverse standard deviation of what forward has saved.
    fn statistics<'a>(&self, saved: Slice<'a>) -> (Slice<'a>, Slice<'a>) {
        let bytes = self.input.c * size_of::<f32>();
        (saved.cut(0..bytes), saved.cut(bytes..2 * bytes))
    }
}
