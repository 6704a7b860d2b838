use super::super::window::{DeviceWindow, Window};
use super::super::{check_batch, lanes};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass};

static SOURCE: Source = Source { name: "avg_pool", text: include_str!("avg_pool.cu") };

/// x, y, window, channels, pixels of y
type ForwardKernel = Kernel<(Read<T>, Write<T>, DeviceWindow, u32, u32)>;
/// dy, dx, window, channels, pixels of dx
type BackwardKernel = Kernel<(Read<T>, Write<T>, DeviceWindow, u32, u32)>;

pub struct AvgPool {
    gpu: Gpu,
    element: Element,
    window: Window,
    channels: usize,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl AvgPool {
    pub fn new(window: Window, build: &Build<'_>, element: Element) -> Result<AvgPool> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input, window.output(input.c)])?;
        let module = gpu.module(&SOURCE, element)?;
        Ok(AvgPool {
            gpu,
            element,
            window,
            channels: input.c,
            forward: module.kernel("avg_pool_forward")?,
            backward: module.kernel("avg_pool_backward")?,
        })
    }
}

impl Layer for AvgPool {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (window, c) = (&self.window, self.channels);
        let pixels = pass.batch * window.rows.output * window.columns.output;
        let grid = self.gpu.grid_over(pixels * c / lanes(self.element, &[c]));
        let arguments = (io.inputs[0].into(), (&mut io.output).into(), window.into(), c as u32, pixels as u32);
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe { self.forward.launch(self.gpu.compute(), grid, arguments) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (window, c) = (&self.window, self.channels);
        let pixels = pass.batch * window.rows.input * window.columns.input;
        let grid = self.gpu.grid_over(pixels * c / lanes(self.element, &[c]));
        let (dy, dx) = ((&io.grad_output).into(), (&mut io.grad_inputs[0]).into());
        // SAFETY: as above.
        unsafe { self.backward.launch(self.gpu.compute(), grid, (dy, dx, window.into(), c as u32, pixels as u32)) }
    }
}
