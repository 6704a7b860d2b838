use super::super::{check_batch, grid_over_tiles};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "flatten", text: include_str!("flatten.cu") };
/// As in `flatten.cu`.
const SIDE: usize = 32;
const ROWS: u32 = 8;

/// from, to, samples, rows, columns
type TransposeKernel = Kernel<(Read<T>, Write<T>, u32, u32, u32)>;

pub struct Flatten {
    gpu: Gpu,
    input: Shape,
    transpose: TransposeKernel,
}

impl Flatten {
    pub fn new(build: &Build<'_>, element: Element) -> Result<Flatten> {
        let gpu = Gpu::of_this_rank()?;
        check_batch(build, build.inputs)?;
        let transpose = gpu.module(&SOURCE, element)?.kernel("flatten_transpose")?;
        Ok(Flatten { gpu, input: build.inputs[0], transpose })
    }

    /// Transposes every sample from (rows, columns) to (columns, rows).
    fn transpose(&self, pass: &Pass, rows: usize, columns: usize, from: Slice<'_>, mut to: SliceMut<'_>) -> Result<()> {
        if rows == 1 || columns == 1 {
            // SAFETY: tensors of the net's arenas, of one length.
            return unsafe { self.gpu.compute().copy(from, to) };
        }
        let tiles = pass.batch * rows.div_ceil(SIDE) * columns.div_ceil(SIDE);
        let grid = grid_over_tiles(&self.gpu, tiles, [SIDE as u32, ROWS]);
        let arguments = (from.into(), (&mut to).into(), pass.batch as u32, rows as u32, columns as u32);
        // SAFETY: as above, and of the shape that the layer was built for.
        unsafe { self.transpose.launch(self.gpu.compute(), grid, arguments) }
    }
}

impl Layer for Flatten {
    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        self.transpose(pass, self.input.h * self.input.w, self.input.c, io.inputs[0], io.output)
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let (dy, dx) = (io.grad_output.as_slice(), io.grad_inputs[0].reborrow());
        self.transpose(pass, self.input.c, self.input.h * self.input.w, dy, dx)
    }
}
