//! The gradient of a linear layer from its factors: dW = dy^T x and dbias = the sums of dy's columns, tile by tile, with the
//! bits of `cpu::Linear::backward`.
//!
//! The gradient has inputs * units values, its factors x (batch, inputs) and dy (batch, units) only batch * (inputs + units):
//! 69 times fewer for AlexNet's three linear layers at a batch of 32. A rank that has all ranks' factors can make the whole
//! gradient itself, at 2 * batch * inputs * units operations for each (Chilimbi et al. 2014, "Project Adam", 5.2.1; Zhang et
//! al. 2017, "Poseidon": sufficient factor broadcasting).

use super::super::super::Factors;
use super::super::super::kernels::gemm::{self, Kernel, Left, Out, Right, Store, strided};
use super::cpu::transpose;
use std::ops::Range;

/// Units of a tile.
pub const TILE_UNITS: usize = 48;
/// Panels of packed columns in a tile. With 16 columns each a tile is 96 KiB, so that a few of them fit L2.
const TILE_PANELS: usize = 32;

pub struct FromFactors {
    kernel: &'static Kernel,
    shape: Factors,
    /// Samples at most.
    batch: usize,
    consecutive: Vec<u32>,
    by_inputs: Vec<u32>,
    by_batch: Vec<u32>,
    by_tile: Vec<u32>,
}

impl FromFactors {
    pub fn new(shape: Factors, batch: usize) -> FromFactors {
        let kernel = Kernel::best();
        FromFactors {
            kernel,
            shape,
            batch,
            consecutive: strided(batch, 1),
            by_inputs: strided(batch, shape.inputs),
            by_batch: strided(shape.units, batch),
            by_tile: strided(TILE_UNITS, TILE_PANELS * kernel.nr),
        }
    }

    pub fn shape(&self) -> Factors {
        self.shape
    }

    /// Inputs of a tile, and values of one.
    pub fn tile_inputs(&self) -> usize {
        TILE_PANELS * self.kernel.nr
    }
    pub fn tile_len(&self) -> usize {
        TILE_UNITS * self.tile_inputs()
    }

    /// Values of what `prepare` makes: x packed, and dy^T.
    pub fn prepared_len(&self) -> usize {
        gemm::packed_len(self.kernel, self.batch, self.shape.inputs) + self.shape.units * self.batch
    }

    /// From `factors`, x and dy of `count` samples.
    pub fn prepare(&self, count: usize, factors: &[f32], prepared: &mut [f32]) {
        let Factors { inputs, units, .. } = self.shape;
        let (x, dy) = factors.split_at(self.batch * inputs);
        let (transposed, packed) = prepared.split_at_mut(units * self.batch);
        transpose(&dy[..count * units], units, transposed, self.batch);
        let right = Right { data: x, rows: &self.by_inputs[..count], step: 1, n: inputs };
        gemm::pack(self.kernel, right, None, packed);
    }

    /// A tile of dW, its rows `tile_inputs` long, from what was prepared of `count` samples.
    pub fn weight(&self, count: usize, prepared: &[f32], units: Range<usize>, first_input: usize, tile: &mut [f32]) {
        let (transposed, packed) = prepared.split_at(self.shape.units * self.batch);
        let columns = self.tile_inputs().min(self.shape.inputs - first_input);
        let packed = &packed[gemm::packed_len(self.kernel, count, first_input)..];
        let left = Left { data: transposed, rows: &self.by_batch[units.clone()], cols: &self.consecutive[..count] };
        let out = Out { data: tile, rows: &self.by_tile[..units.len()] };
        gemm::multiply(self.kernel, left, packed, columns, out, Store::default());
    }

    /// Values of dbias.
    pub fn bias(&self, count: usize, prepared: &[f32], units: Range<usize>, sums: &mut [f32]) {
        let rows = prepared[units.start * self.batch..].chunks_exact(self.batch);
        sums[..units.len()].iter_mut().zip(rows).for_each(|(sum, row)| *sum = row[..count].iter().sum());
    }
}
