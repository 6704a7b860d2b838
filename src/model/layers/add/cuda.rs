use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::layers::Activation;
use crate::model::layers::activation::cuda::Gradient;
use crate::model::{Backward, Forward, Layer, Pass};

static SOURCE: Source = Source { name: "add", text: include_str!("add.cu") };

/// a, b, y, activation, n
type ForwardKernel = Kernel<(Read<T>, Read<T>, Write<T>, u32, u64)>;

pub struct Add {
    gpu: Gpu,
    element: Element,
    activation: Activation,
    forward: ForwardKernel,
    undo: Gradient,
}

impl Add {
    pub fn new(activation: Activation, undo: Activation, element: Element) -> Result<Add> {
        let gpu = Gpu::of_this_rank()?;
        let forward = gpu.module(&SOURCE, element)?.kernel("add_forward")?;
        Ok(Add { undo: Gradient::new(&gpu, undo, element)?, gpu, element, activation, forward })
    }
}

impl Layer for Add {
    /// One input is added at a time, the activation comes with the last. Of three inputs or more, the sums between are rounded
    /// to the layer's type.
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let n = io.output.bytes() / self.element.bytes();
        let (last, mut sum) = (io.inputs.len() - 1, Read::from(io.inputs[0]));
        for (number, input) in io.inputs.iter().enumerate().skip(1) {
            let activation = if number == last { self.activation } else { Activation::None };
            let arguments = (sum, (*input).into(), (&mut io.output).into(), activation.number(), n as u64);
            // SAFETY: n values each, in the net's arenas.
            unsafe { self.forward.launch(self.gpu.compute(), self.gpu.grid_over(n), arguments) }?;
            sum = Read::from(&io.output);
        }
        Ok(())
    }

    fn backward(&mut self, _: &Pass, io: Backward<'_>) -> Result<()> {
        let mut wanted = io.grad_inputs.iter_mut().filter(|dx| dx.bytes() > 0);
        let Some(first) = wanted.next() else { return Ok(()) };
        // SAFETY: all are in the net's arenas.
        unsafe {
            self.undo.apply(io.output, io.grad_output.as_slice(), first.reborrow())?;
            wanted.try_for_each(|dx| self.gpu.compute().copy(first.as_slice(), dx.reborrow()))
        }
    }
}
