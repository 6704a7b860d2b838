//! The kernels of conv2d.cu, on the compute stream.
//!
//! The functions are unsafe as every launch is: the buffers stay allocated, and nobody else touches them, until the stream
//! has come past it.

use super::super::super::channel_sums::{ChannelSums, grid_of_parts, threads};
use super::super::super::{Activation, grid_over_tiles, lanes};
use super::arrangement::Arrangement;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;

static SOURCE: Source = Source { name: "conv2d", text: include_str!("../conv2d.cu") };

/// y, bias, activation, filters, rows.
type AddBias = (Write<T>, Read<f32>, u32, u32, u64);
/// dy, y, sums, activation, filters, rows.
type SumParts = (Write<T>, Read<T>, Write<f32>, u32, u32, u64);
/// from, to, images, an image's lengths, its blocks, the block, zeros in front.
type Move = (Read<T>, Write<T>, u32, u32, u32, u32, u32, u32, u32, u32, u32);

pub struct Kernels {
    gpu: Gpu,
    element: Element,
    filters: usize,
    add_bias: Kernel<AddBias>,
    sum_parts: Kernel<SumParts>,
    sums: ChannelSums,
    arrange: Kernel<Move>,
    restore: Kernel<Move>,
    restore_f32: Kernel<Move>,
}

impl Kernels {
    pub fn new(gpu: &Gpu, element: Element, filters: usize) -> Result<Kernels> {
        let module = gpu.module(&SOURCE, element)?;
        Ok(Kernels {
            gpu: gpu.clone(),
            element,
            filters,
            add_bias: module.kernel("add_bias")?,
            sum_parts: module.kernel("sum_parts")?,
            sums: ChannelSums::new(gpu, filters)?,
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
        let (rows, filters) = self.rows_and_filters(&y);
        let threads = threads(filters, self.element);
        let grid = grid_over_tiles(&self.gpu, rows.div_ceil(threads[1] as usize), [threads[0], threads[1]]);
        let arguments = ((&mut y).into(), bias.into(), activation.number(), filters as u32, rows as u64);
        // SAFETY: rows of as many values as there are filters; the caller vouches for the rest.
        unsafe { self.add_bias.launch(self.gpu.compute(), grid, arguments) }
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
        mut parts: SliceMut<'_>,
        dbias: SliceMut<'_>,
    ) -> Result<()> {
        let (rows, filters) = self.rows_and_filters(&dy);
        let y = if undo == Activation::None { Read::from(&dy) } else { y.into() };
        let grid = grid_of_parts(rows, filters, self.element);
        let summing = ((&mut dy).into(), y, (&mut parts).into(), undo.number(), filters as u32, rows as u64);
        // SAFETY: dy and y have these rows, and there is room for the parts; the caller vouches for the rest.
        unsafe {
            self.sum_parts.launch(self.gpu.compute(), grid, summing)?;
            self.sums.add_parts(rows, parts.as_slice(), dbias)
        }
    }

    /// Of y, or of its gradient.
    fn rows_and_filters(&self, y: &SliceMut<'_>) -> (usize, usize) {
        (y.bytes() / self.element.bytes() / self.filters, self.filters)
    }

    /// Images, each a block after the other; filters are the images of `Images::filters`.
    ///
    /// # Safety
    /// As the module says.
    pub unsafe fn arrange(&self, images: Images, from: Slice<'_>, mut to: SliceMut<'_>) -> Result<()> {
        images.check(from.bytes(), to.bytes(), self.element);
        let (grid, from, to) = (self.grid(images, images.packs(self.element)), from.into(), (&mut to).into());
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

    /// Columns of blocks for the places in an image, and as many rows, which take images in turn, as run at once.
    fn grid(&self, images: Images, places: usize) -> Grid {
        let grid = self.gpu.grid_over(places);
        let at_once = self.gpu.grid_over(usize::MAX).blocks[0];
        let rows = (at_once / grid.blocks[0]).clamp(1, images.count.max(1) as u32);
        Grid { blocks: [grid.blocks[0], rows, 1], ..grid }
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
        self.blocks[0] * self.blocks[1] * self.arranged_channels()
    }

    fn arranged_channels(self) -> usize {
        self.block * self.block * self.lengths[2]
    }

    /// Of an arranged image: what a thread writes together.
    fn packs(self, of: Element) -> usize {
        self.arranged_len() / lanes(of, &[self.arranged_channels()])
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
