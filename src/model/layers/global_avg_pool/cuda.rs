use super::super::{check_batch, grid_over_samples, lanes};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "global_avg_pool", text: include_str!("global_avg_pool.cu") };

/// x, y, samples, pixels of a sample, channels
type ForwardKernel = Kernel<(Read<T>, Write<T>, u32, u32, u32)>;
/// dy, dx, samples, pixels of a sample, channels
type BackwardKernel = Kernel<(Read<T>, Write<T>, u32, u32, u32)>;

pub struct GlobalAvgPool {
    gpu: Gpu,
    element: Element,
    input: Shape,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl GlobalAvgPool {
    pub fn new(build: &Build<'_>, element: Element) -> Result<GlobalAvgPool> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input])?;
        let module = gpu.module(&SOURCE, element)?;
        Ok(GlobalAvgPool {
            gpu,
            element,
            input,
            forward: module.kernel("global_avg_pool_forward")?,
            backward: module.kernel("global_avg_pool_backward")?,
        })
    }
}

impl Layer for GlobalAvgPool {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let Shape { h, w, c } = self.input;
        let grid = grid_over_samples(pass.batch, c / lanes(self.element, &[c]));
        let (x, y) = (io.inputs[0].into(), (&mut io.output).into());
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe { self.forward.launch(self.gpu.compute(), grid, (x, y, pass.batch as u32, (h * w) as u32, c as u32)) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let Shape { h, w, c } = self.input;
        let grid = self.gpu.grid_over(pass.batch * self.input.len() / lanes(self.element, &[c]));
        let (dy, dx) = ((&io.grad_output).into(), (&mut io.grad_inputs[0]).into());
        // SAFETY: as above.
        unsafe { self.backward.launch(self.gpu.compute(), grid, (dy, dx, pass.batch as u32, (h * w) as u32, c as u32)) }
    }
}
