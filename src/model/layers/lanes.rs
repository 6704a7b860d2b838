//! How CUDA kernels share out the channels of an activation: `lanes.cuh`.

use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid};
use crate::error::{Error, Result};
use crate::model::{Build, Shape};

/// Channels that a thread works on together: as many as 16 bytes hold, where all of these lengths are multiples of that.
pub fn lanes(element: Element, lengths: &[usize]) -> usize {
    let wide = 16 / element.bytes();
    if lengths.iter().all(|length| length % wide == 0) { wide } else { 1 }
}

/// Refuses a batch of which kernels could not number the values, of any of these shapes, with 32 bits.
pub fn check_batch(build: &Build<'_>, shapes: &[Shape]) -> Result<()> {
    let Some(shape) = shapes.iter().find(|shape| u32::try_from(shape.len() * build.batch).is_err()) else {
        return Ok(());
    };
    Err(Error::usage(format!(
        "a batch of {} samples of {shape} has more than 2^32 values, too many for one pass on a GPU: use a smaller batch.local",
        build.batch
    )))
}

/// For a kernel whose blocks work on tiles of their own, one after the other: a block a tile, or as many as run at once.
pub fn grid_over_tiles(gpu: &Gpu, tiles: usize, threads: [u32; 2]) -> Grid {
    let at_once = gpu.grid_over(usize::MAX).blocks[0];
    let blocks = u32::try_from(tiles).unwrap_or(u32::MAX).clamp(1, at_once);
    Grid { blocks: [blocks, 1, 1], threads: [threads[0], threads[1], 1], shared_bytes: 0 }
}

/// For the kernels of global pooling: blocks over samples, and over their packs of channels.
pub fn grid_over_samples(samples: usize, packs: usize) -> Grid {
    const COLUMNS: u32 = 32;
    const ROWS: u32 = 8;
    let groups = packs.div_ceil(COLUMNS as usize).clamp(1, MOST_BLOCKS_ACROSS) as u32;
    Grid { blocks: [samples.max(1) as u32, groups, 1], threads: [COLUMNS, ROWS, 1], shared_bytes: 0 }
}

/// CUDA's limit of a grid's second and third dimension.
pub const MOST_BLOCKS_ACROSS: usize = 65535;
