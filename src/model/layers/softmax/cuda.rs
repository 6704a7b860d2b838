use super::super::check_batch;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "softmax", text: include_str!("softmax.cu") };
/// Threads that make a row.
const LANES: usize = 32;

/// x, y, rows, channels
type ForwardKernel = Kernel<(Read<T>, Write<T>, u32, u32)>;
/// y, dy, dx, rows, channels
type BackwardKernel = Kernel<(Read<T>, Read<T>, Write<T>, u32, u32)>;

pub struct Softmax {
    gpu: Gpu,
    input: Shape,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl Softmax {
    pub fn new(build: &Build<'_>, element: Element) -> Result<Softmax> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input])?;
        let module = gpu.module(&SOURCE, element)?;
        let (forward, backward) = (module.kernel("softmax_forward")?, module.kernel("softmax_backward")?);
        Ok(Softmax { gpu, input, forward, backward })
    }

    fn rows(&self, pass: &Pass) -> usize {
        pass.batch * self.input.h * self.input.w
    }
}

impl Layer for Softmax {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (rows, c) = (self.rows(pass), self.input.c as u32);
        let (x, y) = (io.inputs[0].into(), (&mut io.output).into());
        // SAFETY: tensors of the net's arenas, of the shape that the layer was built for.
        unsafe { self.forward.launch(self.gpu.compute(), self.gpu.grid_over(rows * LANES), (x, y, rows as u32, c)) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (rows, c) = (self.rows(pass), self.input.c as u32);
        let (y, dy, dx) = (io.output.into(), (&io.grad_output).into(), (&mut io.grad_inputs[0]).into());
        // SAFETY: as above.
        unsafe {
            self.backward.launch(self.gpu.compute(), self.gpu.grid_over(rows * LANES), (y, dy, dx, rows as u32, c))
        }
    }
}
