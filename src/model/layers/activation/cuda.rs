use super::Activation;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;
use crate::model::{Backward, Forward, Layer, Pass};

static SOURCE: Source = Source { name: "activation", text: include_str!("activation.cu") };

/// x, y, activation, n
type ForwardKernel = Kernel<(Read<T>, Write<T>, u32, u64)>;
/// y, dy, dx, activation, n
type BackwardKernel = Kernel<(Read<T>, Read<T>, Write<T>, u32, u64)>;

pub struct Elementwise {
    gpu: Gpu,
    element: Element,
    activation: Activation,
    forward: ForwardKernel,
    undo: Gradient,
}

impl Elementwise {
    pub fn new(activation: Activation, undo: Activation, element: Element) -> Result<Elementwise> {
        let gpu = Gpu::of_this_rank()?;
        let forward = gpu.module(&SOURCE, element)?.kernel("activation_forward")?;
        Ok(Elementwise { undo: Gradient::new(&gpu, undo, element)?, gpu, element, activation, forward })
    }
}

impl Layer for Elementwise {
    fn forward(&mut self, _: &Pass, mut io: Forward<'_>) -> Result<()> {
        let n = io.output.bytes() / self.element.bytes();
        let arguments = (io.inputs[0].into(), (&mut io.output).into(), self.activation.number(), n as u64);
        // SAFETY: n values each, in the net's arenas.
        unsafe { self.forward.launch(self.gpu.compute(), self.gpu.grid_over(n), arguments) }
    }

    fn backward(&mut self, _: &Pass, io: Backward<'_>) -> Result<()> {
        // SAFETY: all are in the net's arenas.
        unsafe { self.undo.apply(io.output, io.grad_output.as_slice(), io.grad_inputs[0].reborrow()) }
    }
}

/// An activation's forward in place, for layers that fuse it.
pub struct Function {
    gpu: Gpu,
    element: Element,
    activation: Activation,
    forward: ForwardKernel,
}

impl Function {
    pub fn new(gpu: &Gpu, activation: Activation, element: Element) -> Result<Function> {
        let forward = gpu.module(&SOURCE, element)?.kernel("activation_forward")?;
        Ok(Function { gpu: gpu.clone(), element, activation, forward })
    }

    /// `y = f(y)`
    ///
    /// # Safety
    /// y stays allocated, and nobody else touches it, until the compute stream has come past this.
    pub unsafe fn apply(&self, mut y: SliceMut<'_>) -> Result<()> {
        if self.activation == Activation::None {
            return Ok(());
        }
        let n = y.bytes() / self.element.bytes();
        let arguments = ((&y).into(), (&mut y).into(), self.activation.number(), n as u64);
        // SAFETY: n values; the caller vouches for the rest.
        unsafe { self.forward.launch(self.gpu.compute(), self.gpu.grid_over(n), arguments) }
    }
}

/// An activation's backward.
pub struct Gradient {
    gpu: Gpu,
    element: Element,
    activation: Activation,
    backward: BackwardKernel,
}

impl Gradient {
    pub fn new(gpu: &Gpu, activation: Activation, element: Element) -> Result<Gradient> {
        let backward = gpu.module(&SOURCE, element)?.kernel("activation_backward")?;
        Ok(Gradient { gpu: gpu.clone(), element, activation, backward })
    }

    /// `dx = f'(x) dy`, with f'(x) from the output `y = f(x)`, which is empty without an activation. dx may be dy.
    ///
    /// # Safety
    /// All stay allocated, and nobody else writes them, until the compute stream has come past it.
    pub unsafe fn apply(&self, y: Slice<'_>, dy: Slice<'_>, mut dx: SliceMut<'_>) -> Result<()> {
        let (n, stream) = (dx.bytes() / self.element.bytes(), self.gpu.compute());
        match self.activation {
            Activation::None if dx.address() == dy.address() => Ok(()),
            // SAFETY: of one length, and the caller vouches for the rest.
            Activation::None => unsafe { stream.copy(dy, dx) },
            activation => {
                let arguments = (y.into(), dy.into(), (&mut dx).into(), activation.number(), n as u64);
                // SAFETY: n values each, and the caller vouches for the rest.
                unsafe { self.backward.launch(stream, self.gpu.grid_over(n), arguments) }
            }
        }
    }

    /// `dy = f'(x) dy`
    ///
    /// # Safety
    /// As above.
    pub unsafe fn apply_in_place(&self, y: Slice<'_>, dy: SliceMut<'_>) -> Result<()> {
        // SAFETY: the kernel reads each value before it writes it.
        unsafe { self.apply(y, Slice::from_raw(dy.place(), dy.address(), dy.bytes()), dy) }
    }
}
