use super::super::channel_sums::{self, ChannelSums, grid_of_parts, threads};
use super::super::window::{DeviceWindow, Window};
use super::super::{check_batch, grid_over_tiles};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass};

static SOURCE: Source = Source { name: "max_pool", text: include_str!("max_pool.cu") };

/// x, y, winner, window, channels, samples, masks
type ForwardKernel = Kernel<(Read<T>, Write<T>, Write<u8>, DeviceWindow, u32, u32, u32)>;
/// dy, winner, dx, sums, window, channels, samples, whether sums are wanted
type BackwardKernel = Kernel<(Read<T>, Read<u8>, Write<T>, Write<f32>, DeviceWindow, u32, u32, u32)>;

pub struct MaxPool {
    gpu: Gpu,
    element: Element,
    window: Window,
    channels: usize,
    scratch: usize,
    /// Whether the input comes from a ReLU whose backward is done here.
    masks_input: bool,
    /// Where the input's gradient is summed here.
    sums: Option<ChannelSums>,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl MaxPool {
    pub fn new(window: Window, build: &Build<'_>, element: Element) -> Result<MaxPool> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input, window.output(input.c)])?;
        let module = gpu.module(&SOURCE, element)?;
        Ok(MaxPool {
            element,
            window,
            channels: input.c,
            scratch: scratch_bytes(&window, build),
            masks_input: build.masks_input,
            sums: build.sums_input.then(|| ChannelSums::new(&gpu, input.c)).transpose()?,
            forward: module.kernel("max_pool_forward")?,
            backward: module.kernel("max_pool_backward")?,
            gpu,
        })
    }

    /// Rows of windows.
    fn rows(&self, batch: usize) -> usize {
        batch * self.window.rows.output
    }
}

/// For the parts of the input's sums, where they are made.
pub fn scratch_bytes(window: &Window, build: &Build<'_>) -> usize {
    match build.sums_input {
        true => channel_sums::parts_bytes(build.batch * window.rows.output, build.inputs[0].c),
        false => 0,
    }
}

impl Layer for MaxPool {
    fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let [across, pixels, _] = threads(self.channels, self.element);
        let grid = grid_over_tiles(&self.gpu, self.rows(pass.batch), [across, pixels]);
        let (x, y, winner) = (io.inputs[0].into(), (&mut io.output).into(), (&mut io.saved).into());
        let (c, samples, masks) = (self.channels as u32, pass.batch as u32, u32::from(self.masks_input));
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe {
            self.forward.launch(self.gpu.compute(), grid, (x, y, winner, (&self.window).into(), c, samples, masks))
        }
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        let rows = self.rows(pass.batch);
        let grid = grid_of_parts(rows, self.channels, self.element);
        let (dy, winner, [dx]) = ((&io.grad_output).into(), io.saved.into(), io.grad_inputs) else {
            unreachable!("infer takes one input")
        };
        // Without sums the kernel writes none.
        let parts = if self.sums.is_some() { (&mut io.scratch).into() } else { Write::from(&mut *dx) };
        let (c, samples, wants_sums) = (self.channels as u32, pass.batch as u32, u32::from(self.sums.is_some()));
        let arguments = (dy, winner, dx.into(), parts, (&self.window).into(), c, samples, wants_sums);
        // SAFETY: as above.
        unsafe {
            self.backward.launch(self.gpu.compute(), grid, arguments)?;
            self.sums.as_ref().map_or(Ok(()), |sums| sums.add_parts(rows, io.scratch.as_slice(), io.input_sums))
        }
    }
}
