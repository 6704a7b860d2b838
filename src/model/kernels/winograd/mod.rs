//! Convolution of stride 1 with fewer multiplications: Winograd's minimal filtering (Winograd 1980; Lavin and Gray 2015,
//! "Fast Algorithms for Convolutional Neural Networks").
//!
//! The image is cut into squares of N x N values that overlap by R - 1, each of which gives M x M outputs, M = N - R + 1.
//! In between a tile is represented by its values at N x N points, and there convolution is multiplication:
//!
//! ```text
//! V(p, t, c) = input transform of the N x N values of tile t              U(p, c, f) = R x R filter, evaluated at p
//! forward            Y(p, t, f)  = sum over c of V(p, t, c) U(p, c, f)    y  = collect Y, add bias, apply ReLU
//! backward, data     the same over dy, with the filter turned around and C and F exchanged
//! backward, weight   dU(p, c, f) = sum over t of V(p, t, c) Z(p, t, f)    Z  = M x M values of dy, evaluated at p
//!                                                                         dW = collect dU
//! ```
//!
//! So each product is N * N matrix products, in all N * N * C * F multiply-adds a tile where the definition takes
//! R * R * M * M * C * F. The transforms (`transform`) cost about 50 N additions and multiplications a value of V and
//! Y, that is per tile and channel, which counts little against C or F from 64 up:
//!
//! | N | R | M | fewer multiply-adds | covering 13 x 13 or 27 x 27 outputs |
//! | --- | --- | --- | --- | --- |
//! | 7 | 3 | 5 | 4.6 | 3.4 (15 x 15) |
//! | 8 | 3 | 6 | 5.1 | 2.6 (18 x 18) |
//! | 7 | 5 | 3 | 4.6 | 4.6 (27 x 27) |
//! | 8 | 5 | 4 | 6.3 | 5.8 (28 x 28) |
//!
//! `Winograd::new` takes the N with the fewest for its shape.
//!
//! **Accuracy.** The price is rounding: sums of large terms of both signs. The points were chosen for it (`transform`).
//! Against sums in f64, with random values, the root mean square error over that of y is about 2e-6 for N = 7 and 4e-6 for
//! N = 8, where direct sums in f32 have 2e-7, and the common choice N = 6 with points 0, +-1, +-2 has 2.3e-6. What the tests
//! hold it to: no error above 2^-24 * 128 (N = 7) or 256 (N = 8) of the largest sum of the terms' magnitudes.
//!
//! **Memory.** U takes N * N / (R * R) times the filter's bytes. V with Y or Z would take far more than the cache for a
//! batch, so tiles are worked on in chunks whose V and Y stay within `CHUNK_BYTES`, while U passes by once a chunk:
//! 2 * tiles FLOP for 4 bytes. Layouts, where a block is 16 channels and a panel is the kernel's nr columns:
//!
//! ```text
//! V   [block] [p] [t] [16]          written block by block, read as a left matrix of (t, c) or (c, t) by tables
//! U   [panel] [p] [1 + c] [nr]      each [1 + c] [nr] a packed right matrix; written panel by panel
//! Y   [p] [t] [f]                   written point by point, read tile by tile
//! Z   [panel] [p] [1 + t] [nr]      packed
//! dU  [p] [panel] [c] [nr]          written point by point
//! ```
//!
//! Every pass is divided among threads by its outermost index, so each value is written by one thread and is the same sum
//! in the same order for any number of threads.

mod passes;
#[cfg(test)]
mod tests;
mod transform;

use super::super::Shape;
use super::gemm::{self, Kernel, Left, Out, Store, offset, strided};
use rayon::prelude::*;
use std::ops::Range;

/// Channels and filters are multiples of this.
pub const BLOCK: usize = 16;
/// Bytes of V and Y of a chunk, about: what leaves room for U in the last level of cache.
const CHUNK_BYTES: usize = 12 << 20;
/// f32 values between the matrices of Y, so that those of different points do not meet in the same sets of a cache.
const GAP: usize = 16;

/// Correlation of images (H, W, C) with R x R filters to (OH, OW, F), with zeros outside the images.
pub struct Winograd {
    kernel: &'static Kernel,
    input: Shape,
    output: Shape,
    /// Zeros above and to the left of the image.
    before: [usize; 2],
    /// R, N, M.
    taps: usize,
    points: usize,
    outputs: usize,
    /// Tiles along each axis.
    tiles: [usize; 2],
    /// Rows of tiles in a chunk.
    chunk: usize,
    /// In V, from the first value of a point on: of each channel, of each tile.
    channel_places: Vec<u32>,
    tile_places: Vec<u32>,
    /// Rows of Y, and of a panel of dU.
    product_rows: Vec<u32>,
    grad_rows: Vec<u32>,
}

/// A filter: W(kh, kw, k, n) = data[(kh * R + kw) * plane + k * row + n * column]; `turned` exchanges (kh, kw) with
/// (R - 1 - kh, R - 1 - kw).
#[derive(Clone, Copy)]
pub struct Filter<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub column: usize,
    pub turned: bool,
}

impl Winograd {
    /// For `batch` images at most. `taps` is 3 or 5; channels and filters are multiples of `BLOCK`.
    pub fn new(input: Shape, output: Shape, taps: usize, before: [usize; 2], batch: usize) -> Winograd {
        Winograd::with_chunks(input, output, taps, before, batch, CHUNK_BYTES)
    }

    fn with_chunks(
        input: Shape,
        output: Shape,
        taps: usize,
        before: [usize; 2],
        batch: usize,
        chunk_bytes: usize,
    ) -> Winograd {
        assert!(matches!(taps, 3 | 5) && [input.c, output.c].iter().all(|count| count.is_multiple_of(BLOCK)));
        let tiles = |points: usize| [output.h, output.w].map(|length| length.div_ceil(points + 1 - taps));
        let area = |points: usize| tiles(points).map(|count| count * points).iter().product::<usize>();
        let points = if area(8) < area(7) { 8 } else { 7 };
        let (tiles, kernel) = (tiles(points), Kernel::best());

        let rows = batch.max(1) * tiles[0];
        let row_bytes = 4 * tiles[1] * points * points * (input.c + output.c);
        let chunk = rows.div_ceil((rows * row_bytes).div_ceil(chunk_bytes));
        let block_len = points * points * chunk * tiles[1] * BLOCK;
        Winograd {
            kernel,
            input,
            output,
            before,
            taps,
            points,
            outputs: points + 1 - taps,
            tiles,
            chunk,
            channel_places: (0..input.c).map(|c| offset(c / BLOCK * block_len + c % BLOCK)).collect(),
            tile_places: strided(chunk * tiles[1], BLOCK),
            product_rows: strided(chunk * tiles[1], output.c),
            grad_rows: strided(input.c, kernel.nr),
        }
    }

    /// Multiply-adds for an image and a pair of channel and filter.
    pub fn multiplications(&self) -> usize {
        self.tiles.map(|count| count * self.points).iter().product()
    }

    /// Tiles of an image.
    pub fn tiles(&self) -> usize {
        self.tiles[0] * self.tiles[1]
    }

    /// Ranges of rows of tiles, numbered over all images, that are worked on together.
    pub fn chunks(&self, images: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, chunk) = (images * self.tiles[0], self.chunk);
        (0..rows).step_by(chunk).map(move |first| first..rows.min(first + chunk))
    }

    /// The outputs of some rows of tiles: a range of y (images, OH, OW, F).
    pub fn output_range(&self, rows: &Range<usize>) -> Range<usize> {
        let place = |row: usize| {
            let (image, row) = (row / self.tiles[0], row % self.tiles[0]);
            (image * self.output.h + row * self.outputs) * self.output.w * self.output.c
        };
        place(rows.start)..place(rows.end)
    }

    /// f32 values of the packed filter U.
    pub fn filter_len(&self) -> usize {
        self.panels() * self.filter_panel_len()
    }
    /// Of V and Y.
    pub fn forward_len(&self) -> usize {
        self.input_len() + self.squares() * self.product_len()
    }
    /// Of dU, V and Z.
    pub fn gradient_len(&self) -> usize {
        self.squares() * self.grad_len() + self.input_len() + self.panels() * self.output_panel_len()
    }

    /// N * N.
    fn squares(&self) -> usize {
        self.points * self.points
    }
    fn panels(&self) -> usize {
        self.output.c.div_ceil(self.kernel.nr)
    }
    fn filter_panel_len(&self) -> usize {
        self.squares() * gemm::packed_len(self.kernel, self.input.c, self.kernel.nr)
    }
    fn output_panel_len(&self) -> usize {
        self.squares() * gemm::packed_len(self.kernel, self.tile_places.len(), self.kernel.nr)
    }
    fn input_block_len(&self) -> usize {
        self.squares() * self.tile_places.len() * BLOCK
    }
    fn input_len(&self) -> usize {
        self.input.c / BLOCK * self.input_block_len()
    }
    /// Of one point's matrix in Y, and in dU.
    fn product_len(&self) -> usize {
        self.tile_places.len() * self.output.c + GAP
    }
    fn grad_len(&self) -> usize {
        self.panels() * self.input.c * self.kernel.nr
    }

    /// The tiles of some rows, numbered from 0: (number, image, place of the first output).
    fn each_tile(&self, rows: Range<usize>) -> impl Iterator<Item = (usize, usize, [usize; 2])> + use<> {
        let ([height, width], outputs) = (self.tiles, self.outputs);
        rows.flat_map(move |row| (0..width).map(move |column| (row, column)))
            .enumerate()
            .map(move |(number, (row, column))| (number, row / height, [row % height * outputs, column * outputs]))
    }

    /// y = filter * x + bias, over `images` images, with U from `pack` and `forward_len` values of scratch.
    pub fn forward(
        &self,
        images: usize,
        x: &[f32],
        filter: &[f32],
        finish: Finish<'_>,
        y: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (v, product) = scratch[..self.forward_len()].split_at_mut(self.input_len());
        for rows in self.chunks(images) {
            self.transform_input(rows.clone(), x, v);
            let tiles = rows.len() * self.tiles[1];
            product.par_chunks_mut(self.product_len()).enumerate().for_each(|(point, product)| {
                self.multiply_point(point, tiles, v, filter, product);
            });
            let y = &mut y[self.output_range(&rows)];
            self.transform_output(rows.start, rows, product, finish, y);
        }
    }

    /// Y(point) = V(point) U(point)
    fn multiply_point(&self, point: usize, tiles: usize, v: &[f32], filter: &[f32], product: &mut [f32]) {
        let nr = self.kernel.nr;
        let matrix_len = self.filter_panel_len() / self.squares();
        let left = Left {
            data: &v[point * self.tile_places.len() * BLOCK..],
            rows: &self.tile_places[..tiles],
            cols: &self.channel_places,
        };
        for (panel, column) in (0..self.output.c).step_by(nr).enumerate() {
            let packed = &filter[panel * self.filter_panel_len() + point * matrix_len..][..matrix_len];
            let out = Out { data: &mut product[column..], rows: &self.product_rows[..tiles] };
            gemm::multiply(self.kernel, left, packed, nr.min(self.output.c - column), out, Store::default());
        }
    }

    /// Begins the gradient by the filter, or with `accumulate` adds to it, what some rows of tiles contribute: to dU in
    /// `scratch` (`gradient_len` values, kept between calls), and the sums of dy over all pixels to `sums` (F).
    pub fn gradient(
        &self,
        rows: Range<usize>,
        x: &[f32],
        dy: &[f32],
        accumulate: bool,
        sums: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (grad, rest) = scratch[..self.gradient_len()].split_at_mut(self.squares() * self.grad_len());
        let (v, z) = rest.split_at_mut(self.input_len());
        self.transform_input(rows.clone(), x, v);
        self.transform_grad_output(rows.clone(), dy, accumulate, sums, z);

        let (v, z, tiles) = (&*v, &*z, rows.len() * self.tiles[1]);
        let nr = self.kernel.nr;
        let matrix_len = self.output_panel_len() / self.squares();
        grad.par_chunks_mut(self.grad_len()).enumerate().for_each(|(point, grad)| {
            let left = Left {
                data: &v[point * self.tile_places.len() * BLOCK..],
                rows: &self.channel_places,
                cols: &self.tile_places[..tiles],
            };
            for (panel, grad) in grad.chunks_exact_mut(self.input.c * nr).enumerate() {
                let packed = &z[panel * self.output_panel_len() + point * matrix_len..][..matrix_len];
                let n = nr.min(self.output.c - panel * nr);
                let out = Out { data: grad, rows: &self.grad_rows };
                gemm::multiply(self.kernel, left, packed, n, out, Store { accumulate, relu: false });
            }
        });
    }
}

/// What happens to an output at the end.
#[derive(Clone, Copy, Default)]
pub struct Finish<'a> {
    pub bias: Option<&'a [f32]>,
    pub relu: bool,
}
