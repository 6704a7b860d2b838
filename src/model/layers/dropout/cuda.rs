use super::super::check_batch;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, T, Write};
use crate::device::{Arena, Slice, SliceMut};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass};
use crate::rng::{Purpose, Rng};

static SOURCE: Source = Source { name: "dropout", text: include_str!("dropout.cu") };
/// Values that a thread makes, as in `dropout.cu`.
const OF_A_BLOCK: usize = 8;

/// from, to, samples, values of a sample, first sample, layer, key, threshold, scale
type MaskKernel = Kernel<(Read<T>, Write<T>, u32, u32, Read<u64>, u32, u32, u32, u32, f32)>;

pub struct Dropout {
    gpu: Gpu,
    values: usize,
    key: [u32; 2],
    layer: u32,
    threshold: u32,
    scale: f32,
    /// The number of the pass's first sample, on the GPU.
    first_sample: Arena,
    begin: Kernel<(Write<u64>, u64)>,
    mask: MaskKernel,
}

impl Dropout {
    pub fn new(rate: f32, build: &Build<'_>, element: Element) -> Result<Dropout> {
        let gpu = Gpu::of_this_rank()?;
        check_batch(build, build.inputs)?;
        let module = gpu.module(&SOURCE, element)?;
        let (begin, mask) = (module.kernel("begin_pass")?, module.kernel("dropout")?);
        let first_sample = gpu.allocate(size_of::<u64>())?;
        let (threshold, scale) = super::threshold_and_scale(rate);
        let (values, key) = (build.inputs[0].len(), Rng::key(build.seed, Purpose::Dropout));
        Ok(Dropout { gpu, values, key, layer: build.layer as u32, threshold, scale, first_sample, begin, mask })
    }

    /// Backward is the same product as forward.
    fn mask(&self, pass: &Pass, from: Slice<'_>, mut to: SliceMut<'_>) -> Result<()> {
        let grid = self.gpu.grid_over(pass.batch * self.values.div_ceil(OF_A_BLOCK));
        let (samples, values, [key_0, key_1]) = (pass.batch as u32, self.values as u32, self.key);
        // SAFETY: written by `begin`, earlier in the stream.
        let first = unsafe { self.first_sample.slice(0..self.first_sample.bytes()) }.into();
        let (layer, threshold, scale) = (self.layer, self.threshold, self.scale);
        let arguments = (from.into(), (&mut to).into(), samples, values, first, layer, key_0, key_1, threshold, scale);
        // SAFETY: tensors of the net's arenas, of the shape that the layer was built for.
        unsafe { self.mask.launch(self.gpu.compute(), grid, arguments) }
    }
}

impl Layer for Dropout {
    fn begin(&mut self, pass: &Pass) -> Result<()> {
        if !pass.training {
            return Ok(());
        }
        let one = Grid { blocks: [1; 3], threads: [1; 3], shared_bytes: 0 };
        // SAFETY: used by the compute stream alone, in its order.
        let mut first = unsafe { self.first_sample.slice_mut(0..self.first_sample.bytes()) };
        // SAFETY: as above.
        unsafe { self.begin.launch(self.gpu.compute(), one, ((&mut first).into(), pass.first_sample)) }
    }

    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        if pass.training {
            return self.mask(pass, io.inputs[0], io.output);
        }
        // SAFETY: as above.
        unsafe { self.gpu.compute().copy(io.inputs[0], io.output) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        self.mask(pass, io.grad_output.as_slice(), io.grad_inputs[0].reborrow())
    }
}
