//! Convolutions of 3x3 and 5x5 filters with stride 1 through Winograd's transforms (`kernels::winograd`), where these save
//! enough: which ones depends on shapes alone, so all ranks and all runs choose alike.

use super::super::super::kernels::winograd::{BLOCK, Filter, Finish, Winograd};
use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::Activation;
use super::Geometry;
use crate::error::Result;

/// Channels and filters from which the transforms, whose cost is for a tile and channel, are small beside the products.
const LEAST_CHANNELS: usize = 32;
/// Tiles in a batch for which it pays to transform the filter, at a cost of about that many tiles.
const LEAST_TILES: usize = 64;
/// Values of a tile, at most.
const LARGEST_TILE: usize = 64;
/// The least quotient of the multiplications of the definition and those of the tiles.
const LEAST_SAVING: usize = 2;

pub struct Conv2d {
    geometry: Geometry,
    activation: Activation,
    /// What backward has to undo of it.
    undo: Activation,
    bias: bool,
    forward: Winograd,
    /// From dy to dx.
    data: Winograd,
}

/// What keeps a convolution from these transforms, in words.
pub fn obstacle(geometry: &Geometry) -> Option<&'static str> {
    let Geometry { input, output, rows, columns, groups } = geometry;
    if rows.size != columns.size || !matches!(rows.size, 3 | 5) {
        Some("needs a 3x3 or 5x5 kernel")
    } else if rows.stride != 1 || columns.stride != 1 {
        Some("needs a stride of 1")
    } else if *groups != 1 {
        Some("needs groups = 1")
    } else if !input.c.is_multiple_of(BLOCK) || !output.c.is_multiple_of(BLOCK) {
        Some("needs channels and filters in multiples of 16")
    } else if input.w.max(output.w).saturating_mul(input.c + output.c) > u32::MAX as usize / LARGEST_TILE {
        Some("needs narrower images: a row of its tiles would be more than 2^32 values")
    } else {
        None
    }
}

/// Whether they are the faster way for a batch.
pub fn pays(geometry: &Geometry, batch: usize) -> bool {
    let Geometry { input, output, rows, .. } = geometry;
    if obstacle(geometry).is_some() || input.c.min(output.c) < LEAST_CHANNELS {
        return false;
    }
    let forward = Winograd::new(*input, *output, rows.size, before(geometry), batch);
    let definition = output.h * output.w * rows.size * rows.size;
    definition >= LEAST_SAVING * forward.multiplications() && batch * forward.tiles() >= LEAST_TILES
}

/// Zeros above and to the left.
fn before(geometry: &Geometry) -> [usize; 2] {
    [geometry.rows.before, geometry.columns.before]
}

impl Conv2d {
    pub fn new(geometry: Geometry, bias: bool, activation: Activation, build: &Build<'_>) -> Conv2d {
        let Geometry { input, output, rows, .. } = geometry;
        let before = before(&geometry);
        // dx(h) meets dy(h + before - kh): dy correlated with the filter turned around, behind R - 1 - before zeros.
        let behind = before.map(|before| rows.size - 1 - before);
        Conv2d {
            activation,
            undo: activation.to_undo(build),
            bias,
            forward: Winograd::new(input, output, rows.size, before, build.batch),
            data: Winograd::new(output, input, rows.size, behind, build.batch),
            geometry,
        }
    }
}

impl Layer for Conv2d {
    fn scratch_bytes(&self) -> usize {
        let [forward, data] = [&self.forward, &self.data].map(|pass| pass.filter_len() + pass.forward_len());
        4 * forward.max(data).max(self.forward.gradient_len() + self.geometry.output.c)
    }

    fn forward(&mut self, pass: &Pass, io: Forward<'_>) -> Result<()> {
        let filters = self.geometry.output.c;
        let (packed, scratch) = io.scratch.into_f32().split_at_mut(self.forward.filter_len());
        let filter = Filter { data: io.params[0].f32(), row: filters, column: 1, turned: false };
        self.forward.pack(filter, packed);

        let bias = self.bias.then(|| io.params[1].f32());
        let (relu, y) = (self.activation == Activation::Relu, io.output.into_f32());
        self.forward.forward(pass.batch, io.inputs[0].f32(), packed, Finish { bias, relu }, y, scratch);
        if !relu {
            self.activation.apply(y);
        }
        Ok(())
    }

    /// First both gradients of the parameters, with the activation's backward on each chunk of dy before it is read; then
    /// the data's, in the same scratch.
    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let filters = self.geometry.output.c;
        let (x, y, dy) = (io.inputs[0].f32(), io.output.f32(), io.grad_output.into_f32());
        let scratch = io.scratch.into_f32();
        let (sums, gradient) = scratch.split_at_mut(filters);
        for rows in self.forward.chunks(pass.batch) {
            let outputs = self.forward.output_range(&rows);
            if self.undo != Activation::None {
                self.undo.backward(&y[outputs.clone()], &mut dy[outputs]);
            }
            let accumulate = rows.start > 0;
            self.forward.gradient(rows, x, dy, accumulate, sums, gradient);
        }
        self.forward.finish_gradient(io.grad_params[0].f32(), gradient);
        if self.bias {
            io.grad_params[1].f32().copy_from_slice(sums);
        }

        let [grad_input] = io.grad_inputs else { unreachable!("infer takes one input") };
        let dx = grad_input.f32();
        if !dx.is_empty() {
            let (packed, scratch) = scratch.split_at_mut(self.data.filter_len());
            self.data.pack(Filter { data: io.params[0].f32(), row: 1, column: filters, turned: true }, packed);
            self.data.forward(pass.batch, dy, packed, Finish::default(), dx, scratch);
        }
        Ok(())
    }
}
