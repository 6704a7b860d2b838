use super::super::{check_batch, lanes};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "concat", text: include_str!("concat.cu") };

/// from, to, rows, channels copied, channels and first of `from`, channels and first of `to`
type CopyKernel = Kernel<(Read<T>, Write<T>, u32, u32, u32, u32, u32, u32)>;

pub struct Concat {
    gpu: Gpu,
    element: Element,
    /// Channels of each input.
    inputs: Vec<usize>,
    /// Of a sample.
    pixels: usize,
    copy: CopyKernel,
}

/// Channels in the rows of a tensor: how many the rows have, and the first of those meant.
type Place = (usize, usize);

impl Concat {
    pub fn new(build: &Build<'_>, element: Element) -> Result<Concat> {
        let gpu = Gpu::of_this_rank()?;
        let inputs: Vec<usize> = build.inputs.iter().map(|shape| shape.c).collect();
        let Shape { h, w, .. } = build.inputs[0];
        check_batch(build, &[Shape::new(h, w, inputs.iter().sum())])?;
        let copy = gpu.module(&SOURCE, element)?.kernel("concat_copy")?;
        Ok(Concat { gpu, element, inputs, pixels: h * w, copy })
    }

    /// Copies `c` channels of each row.
    fn copy(&self, pass: &Pass, c: usize, from: (Read<T>, Place), to: (Write<T>, Place)) -> Result<()> {
        let (rows, ((from, (from_c, from_start)), (to, (to_c, to_start)))) = (pass.batch * self.pixels, (from, to));
        let grid = self.gpu.grid_over(rows * c / lanes(self.element, &[c, from_c, from_start, to_c, to_start]));
        let [rows, c, from_c, from_start, to_c, to_start] =
            [rows, c, from_c, from_start, to_c, to_start].map(|count| count as u32);
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe { self.copy.launch(self.gpu.compute(), grid, (from, to, rows, c, from_c, from_start, to_c, to_start)) }
    }
}

impl Layer for Concat {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (total, mut start) = (self.inputs.iter().sum(), 0);
        for (x, &c) in io.inputs.iter().zip(&self.inputs) {
            self.copy(pass, c, ((*x).into(), (c, 0)), ((&mut io.output).into(), (total, start)))?;
            start += c;
        }
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (total, mut start) = (self.inputs.iter().sum(), 0);
        for (dx, &c) in io.grad_inputs.iter_mut().zip(&self.inputs) {
            if dx.bytes() > 0 {
                self.copy(pass, c, ((&io.grad_output).into(), (total, start)), (dx.into(), (c, 0)))?;
            }
            start += c;
        }
        Ok(())
    }
}
