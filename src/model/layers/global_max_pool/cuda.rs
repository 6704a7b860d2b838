use super::super::{check_batch, grid_over_samples, lanes};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "global_max_pool", text: include_str!("global_max_pool.cu") };

/// x, y, winner, samples, pixels of a sample, channels
type ForwardKernel = Kernel<(Read<T>, Write<T>, Write<u32>, u32, u32, u32)>;
/// dy, winner, dx, samples, pixels of a sample, channels
type BackwardKernel = Kernel<(Read<T>, Read<u32>, Write<T>, u32, u32, u32)>;

pub struct GlobalMaxPool {
    gpu: Gpu,
    element: Element,
    input: Shape,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl GlobalMaxPool {
    pub fn new(build: &Build<'_>, element: Element) -> Result<GlobalMaxPool> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input])?;
        let module = gpu.module(&SOURCE, element)?;
        Ok(GlobalMaxPool {
            gpu,
            element,
            input,
            forward: module.kernel("global_max_pool_forward")?,
            backward: module.kernel("global_max_pool_backward")?,
        })
    }
}

impl Layer for GlobalMaxPool {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let Shape { h, w, c } = self.input;
        let grid = grid_over_samples(pass.batch, c / lanes(self.element, &[c]));
        let (x, y, winner) = (io.inputs[0].into(), (&mut io.output).into(), (&mut io.saved).into());
        let arguments = (x, y, winner, pass.batch as u32, (h * w) as u32, c as u32);
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe { self.forward.launch(self.gpu.compute(), grid, arguments) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let Shape { h, w, c } = self.input;
        let grid = self.gpu.grid_over(pass.batch * self.input.len() / lanes(self.element, &[c]));
        let (dy, winner, dx) = ((&io.grad_output).into(), io.saved.into(), (&mut io.grad_inputs[0]).into());
        let arguments = (dy, winner, dx, pass.batch as u32, (h * w) as u32, c as u32);
        // SAFETY: as above.
        unsafe { self.backward.launch(self.gpu.compute(), grid, arguments) }
    }
}
