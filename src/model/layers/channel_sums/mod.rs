//! Sums of a gradient over its pixels, by channel: what the bias of a convolution gets. They are made on a GPU by the pass that
//! writes or changes the gradient anyway, so that it is not read once more for them.
//!
//! In two steps, whose order depends on the shapes alone: each block of the pass sums a part of the rows of pixels
//! (`store_part` in channel_sums.cuh), and `add_parts` sums the parts. The first costs no memory but 4 bytes a channel and part.

use super::lanes::lanes;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;

static SOURCE: Source = Source { name: "channel_sums", text: include_str!("channel_sums.cu") };

/// The shape of the blocks of `add_parts`, as in channel_sums.cu.
const COLUMNS: usize = 32;
const TURNS: usize = 32;
/// Threads of a block that makes a part at most, as in channel_sums.cuh.
const THREADS: usize = 256;
/// Parts at most: several for each multiprocessor of any GPU.
const MOST_PARTS: usize = 1024;

/// parts, sums, channels, number of parts
type AddParts = Kernel<(Read<f32>, Write<f32>, u32, u32)>;

pub struct ChannelSums {
    gpu: Gpu,
    channels: usize,
    add_parts: AddParts,
}

impl ChannelSums {
    pub fn new(gpu: &Gpu, channels: usize) -> Result<ChannelSums> {
        let add_parts = gpu.module(&SOURCE, Element::F32)?.kernel("add_parts")?;
        Ok(ChannelSums { gpu: gpu.clone(), channels, add_parts })
    }

    /// `sums = the sums of the parts`, which a pass over `grid_of_parts` of as many rows has left.
    ///
    /// # Safety
    /// Both stay allocated, and nobody else touches them, until the compute stream has come past this.
    pub unsafe fn add_parts(&self, rows: usize, parts_of_rows: Slice<'_>, mut sums: SliceMut<'_>) -> Result<()> {
        assert!(parts_of_rows.bytes() >= parts_bytes(rows, self.channels), "room for the parts of {rows} rows");
        assert_eq!(sums.bytes(), self.channels * size_of::<f32>());
        let grid = Grid {
            blocks: [self.channels.div_ceil(COLUMNS) as u32, 1, 1],
            threads: [COLUMNS as u32, TURNS as u32, 1],
            shared_bytes: 0,
        };
        let arguments = (parts_of_rows.into(), (&mut sums).into(), self.channels as u32, parts(rows) as u32);
        // SAFETY: as many parts of as many channels; the caller vouches for the rest.
        unsafe { self.add_parts.launch(self.gpu.compute(), grid, arguments) }
    }
}

/// Of the parts of so many rows at most.
pub fn parts_bytes(rows: usize, channels: usize) -> usize {
    parts(rows) * channels * size_of::<f32>()
}

/// For a pass over rows that leaves a part a block: threads over packs of channels, then over pixels.
pub fn grid_of_parts(rows: usize, channels: usize, element: Element) -> Grid {
    Grid { blocks: [parts(rows) as u32, 1, 1], threads: threads(channels, element), shared_bytes: 0 }
}

/// Threads of a block: over packs of channels, then over pixels.
pub fn threads(channels: usize, element: Element) -> [u32; 3] {
    let across = (channels / lanes(element, &[channels])).min(THREADS);
    [across as u32, (THREADS / across) as u32, 1]
}

fn parts(rows: usize) -> usize {
    rows.clamp(1, MOST_PARTS)
}
