//! The kernels of conv2d.cu, on the compute stream.
//!
//! The functions are unsafe as every launch is: the buffers stay allocated, and nobody else touches them, until the stream
//! has come past it.

use super::super::super::Activation;
use super::arrangement::Arrangement;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;

static SOURCE: Source = Source { name: "conv2d", text: include_str!("../conv2d.cu") };

/// The shape of the blocks that sum columns, as in conv2d.cu.
const COLUMNS: usize = 32;
const LANES: usize = 8;
/// Parts of a sum at most, and rows at least of one.
const PARTS: usize = 512;
const PART_ROWS: usize = 64;
/// Rows of blocks that a grid can have.
const MOST_ROWS: usize = 65_535;

/// y, bias, activation, filters, values.
type AddBias = (Write<T>, Read<f32>, u32, u32, u64);
/// dy, y, sums, activation, filters, rows, rows of a part.
type SumParts = (Write<T>, Read<T>, Write<f32>, u32, u32, u64, u64);
/// sums, dbias, filters, parts.
type AddParts = (Read<f32>, Write<f32>, u32, u32);
/// from, to, images, an image's lengths, its blocks, the block, zeros in front.
type Move = (Read<T>, Write<T>, u32, u32, u32, u32, u32, u32, u32, u32, u32);

pub struct Kernels {
    gpu: Gpu,
    element: Element,
    add_bias: Kernel<AddBias>,
    sum_parts: Kernel<SumParts>,
    add_parts: Kernel<AddParts>,
    arrange: Kernel<Move>,
    restore: Kernel<Move>,
    restore_f32: Kernel<Move>,
}

impl Kernels {
    pub fn new(gpu: &Gpu, element: Element) -> Result<Kernels> {
        let module = gpu.module(&SOURCE, element)?;
        Ok(Kernels {
            gpu: gpu.clone(),
            element,
            add_bias: module.kernel("add_bias")?,
            sum_parts: module.kernel("sum_parts")?,
            add_parts: module.kernel("add_parts")?,
            arrange: module.kernel("arrange")?,
            restore: module.kernel("restore")?,
            restore_f32: gpu.module(&SOURCE, Element::F32)?.kernel("restore")?,
        })
    }

    /// `y = activation(y + bias)`
    ///
    /// # Safety
    /// As the module says.
    pub unsafe fn add_bias(&self, mut y: SliceMut<'_>, bias: Slice<'_>, activation: Activation) -> Result<()> {
        let (n, filters) = (y.bytes() / self.element.bytes(), bias.bytes() / size_of::<f32>());
        let arguments = ((&mut y).into(), bias.into(), activation.number(), filters as u32, n as u64);
        // SAFETY: n values in rows of as many as there are filters; the caller vouches for the rest.
        unsafe { self.add_bias.launch(self.gpu.compute(), self.gpu.grid_over(n), arguments) }
    }

    /// Bytes of `sums` for so many rows of dy at most.
    pub fn sums_bytes(rows: usize, filters: usize) -> usize {
        most_parts(rows) * filters * size_of::<f32>()
    }

    /// Undoes the activation in dy, whose output y was, and sums dy over its rows; y is not read without an activation.
    ///
    /// # Safety
    /// As the module says.
    pub unsafe fn bias_gradient(
        &self,
        undo: Activation,
        y: Slice<'_>,
        mut dy: SliceMut<'_>,
        mut sums: SliceMut<'_>,
        mut dbias: SliceMut<'_>,
    ) -> Result<()> {
        let filters = dbias.bytes() / size_of::<f32>();
        let rows = dy.bytes() / self.element.bytes() / filters;
        let (parts, part_rows) = parts(rows);
        assert!(sums.bytes() >= parts * dbias.bytes(), "room for {parts} sums");
        let y = if undo == Activation::None { Read::from(&dy) } else { y.into() };
        let grid = |parts| Grid {
            blocks: [filters.div_ceil(COLUMNS) as u32, parts as u32, 1],
            threads: [COLUMNS as u32, LANES as u32, 1],
            shared_bytes: 0,
        };
        let stream = self.gpu.compute();
        let summing =
            ((&mut dy).into(), y, (&mut sums).into(), undo.number(), filters as u32, rows as u64, part_rows as u64);
        let adding = (Read::from(&sums), (&mut dbias).into(), filters as u32, parts as u32);
        // SAFETY: dy and y have these rows, and there is room for the sums; the caller vouches for the rest.
        unsafe {
            self.sum_parts.launch(stream, grid(parts), summing)?;
            self.add_parts.launch(stream, grid(1), adding)
        }
    }

    /// Images, each a block after the other; filters are the images of `Images::filters`.
    ///
    /// # Safety
    /// As the module says.
    pub unsafe fn arrange(&self, images: Images, from: Slice<'_>, mut to: SliceMut<'_>) -> Result<()> {
        images.check(from.bytes(), to.bytes(), self.element);
        let (grid, from, to) = (self.grid(images, images.arranged_len()), from.into(), (&mut to).into());
        // SAFETY: as many values as the images have; the caller vouches for the rest.
        unsafe { self.arrange.launch(self.gpu.compute(), grid, images.arguments(from, to)) }
    }

    /// Gradients, back from blocks: of images in the layer's type, of filters in f32.
    ///
    /// # Safety
    /// As the module says.
    pub unsafe fn restore(&self, images: Images, from: Slice<'_>, mut to: SliceMut<'_>, of: Element) -> Result<()> {
        images.check(to.bytes(), from.bytes(), of);
        let kernel = if of == Element::F32 { &self.restore_f32 } else { &self.restore };
        let (grid, from, to) = (self.grid(images, images.len()), from.into(), (&mut to).into());
        // SAFETY: as above.
        unsafe { kernel.launch(self.gpu.compute(), grid, images.arguments(from, to)) }
    }

    /// A row of blocks for each image, as far as a grid has rows.
    fn grid(&self, images: Images, len: usize) -> Grid {
        let grid = self.gpu.grid_over(len);
        Grid { blocks: [grid.blocks[0], images.count.min(MOST_ROWS) as u32, 1], ..grid }
    }
}

/// Images, or filters, that are arranged.
#[derive(Clone, Copy)]
pub struct Images {
    pub count: usize,
    /// Height, width and channels of one.
    pub lengths: [usize; 3],
    pub block: usize,
    /// Of an arranged one.
    pub blocks: [usize; 2],
    /// Rows and columns of zeros in front.
    pub before: [usize; 2],
}

impl Images {
    /// Filters have no zeros in front.
    pub fn filters(arrangement: &Arrangement, count: usize, lengths: [usize; 3]) -> Images {
        Images { count, lengths, block: arrangement.block, blocks: arrangement.filter, before: [0; 2] }
    }

    fn len(self) -> usize {
        self.lengths.iter().product()
    }

    pub fn arranged_bytes(self, of: Element) -> usize {
        self.count * self.arranged_len() * of.bytes()
    }

    fn arranged_len(self) -> usize {
        self.blocks[0] * self.blocks[1] * self.block * self.block * self.lengths[2]
    }

    fn check(self, bytes: usize, arranged_bytes: usize, of: Element) {
        assert_eq!(bytes, self.count * self.len() * of.bytes());
        assert_eq!(arranged_bytes, self.arranged_bytes(of));
    }

    fn arguments(self, from: Read<T>, to: Write<T>) -> Move {
        let [h, w, c] = self.lengths.map(|length| length as u32);
        let ([blocks_h, blocks_w], [top, left]) = (self.blocks.map(|n| n as u32), self.before.map(|n| n as u32));
        (from, to, self.count as u32, h, w, c, blocks_h, blocks_w, self.block as u32, top, left)
    }
}

/// How many parts the sum of so many rows has, and the rows of one. By shapes alone, so that sums have one order.
fn parts(rows: usize) -> (usize, usize) {
    let part_rows = rows.div_ceil(PARTS).max(PART_ROWS);
    (rows.div_ceil(part_rows).max(1), part_rows)
}

/// Parts at most of sums of as many rows, or of fewer, which may have more parts.
fn most_parts(rows: usize) -> usize {
    rows.div_ceil(PART_ROWS).clamp(1, PARTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_and_fewer_rows_find_room_for_theirs() {
        for rows in (0..200).chain(PARTS * PART_ROWS - 100..PARTS * PART_ROWS + 100).chain([1_000_000, 99_999_999]) {
            let (count, part_rows) = parts(rows);
            assert!(count * part_rows >= rows && (count - 1) * part_rows <= rows, "{rows} rows");
            for fewer in rows.saturating_sub(150)..=rows {
                assert!(parts(fewer).0 <= most_parts(rows), "{fewer} rows, with room for {rows}");
            }
        }
    }
}
