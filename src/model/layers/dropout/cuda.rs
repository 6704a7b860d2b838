use super::super::check_batch;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass};
use crate::rng::{Purpose, Rng};

static SOURCE: Source = Source { name: "dropout", text: include_str!("dropout.cu") };
/// Values that a thread makes, as in `dropout.cu`.
const OF_A_BLOCK: usize = 8;

/// from, to, samples, values of a sample, first sample, layer, key, threshold, scale
type MaskKernel = Kernel<(Read<T>, Write<T>, u32, u32, u64, u32, u32, u32, u32, f32)>;

pub struct Dropout {
    gpu: Gpu,
    values: usize,
    key: [u32; 2],
    layer: u32,
    threshold: u32,
    scale: f32,
    mask: MaskKernel,
}

impl Dropout {
    pub fn new(rate: f32, build: &Build<'_>, element: Element) -> Result<Dropout> {
        let gpu = Gpu::of_this_rank()?;
        check_batch(build, build.inputs)?;
        let mask = gpu.module(&SOURCE, element)?.kernel("dropout")?;
        let (threshold, scale) = super::threshold_and_scale(rate);
        let (values, key) = (build.inputs[0].len(), Rng::key(build.seed, Purpose::Dropout));
        Ok(Dropout { gpu, values, key, layer: build.layer as u32, threshold, scale, mask })
    }

    /// Backward is the same product as forward.
    fn mask(&self, pass: &Pass, from: Slice<'_>, mut to: SliceMut<'_>) -> Result<()> {
        let grid = self.gpu.grid_over(pass.batch * self.values.div_ceil(OF_A_BLOCK));
        let (samples, values, [key_0, key_1]) = (pass.batch as u32, self.values as u32, self.key);
        let (first, layer, threshold, scale) = (pass.first_sample, self.layer, self.threshold, self.scale);
        let arguments = (from.into(), (&mut to).into(), samples, values, first, layer, key_0, key_1, threshold, scale);
        // SAFETY: tensors of the net's arenas, of the shape that the layer was built for.
        unsafe { self.mask.launch(self.gpu.compute(), grid, arguments) }
    }
}

impl Layer for Dropout {
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
