use super::super::window::{DeviceWindow, Window};
use super::super::{check_batch, lanes};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass};

static SOURCE: Source = Source { name: "max_pool", text: include_str!("max_pool.cu") };

/// x, y, winner, window, channels, pixels of y, masks
type ForwardKernel = Kernel<(Read<T>, Write<T>, Write<u8>, DeviceWindow, u32, u32, u32)>;
/// dy, winner, dx, window, channels, pixels of dx
type BackwardKernel = Kernel<(Read<T>, Read<u8>, Write<T>, DeviceWindow, u32, u32)>;

pub struct MaxPool {
    gpu: Gpu,
    element: Element,
    window: Window,
    channels: usize,
    /// Whether the input comes from a ReLU whose backward is done here.
    masks_input: bool,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl MaxPool {
    pub fn new(window: Window, build: &Build<'_>, element: Element) -> Result<MaxPool> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input, window.output(input.c)])?;
        let module = gpu.module(&SOURCE, element)?;
        Ok(MaxPool {
            gpu,
            element,
            window,
            channels: input.c,
            masks_input: build.masks_input,
            forward: module.kernel("max_pool_forward")?,
            backward: module.kernel("max_pool_backward")?,
        })
    }
}

impl Layer for MaxPool {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (window, c) = (&self.window, self.channels);
        let pixels = pass.batch * window.rows.output * window.columns.output;
        let grid = self.gpu.grid_over(pixels * c / lanes(self.element, &[c]));
        let (x, y, winner) = (io.inputs[0].into(), (&mut io.output).into(), (&mut io.saved).into());
        let arguments = (x, y, winner, window.into(), c as u32, pixels as u32, u32::from(self.masks_input));
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe { self.forward.launch(self.gpu.compute(), grid, arguments) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (window, c) = (&self.window, self.channels);
        let pixels = pass.batch * window.rows.input * window.columns.input;
        let grid = self.gpu.grid_over(pixels * c / lanes(self.element, &[c]));
        let (dy, winner, dx) = ((&io.grad_output).into(), io.saved.into(), (&mut io.grad_inputs[0]).into());
        let arguments = (dy, winner, dx, window.into(), c as u32, pixels as u32);
        // SAFETY: as above.
        unsafe { self.backward.launch(self.gpu.compute(), grid, arguments) }
    }
}
