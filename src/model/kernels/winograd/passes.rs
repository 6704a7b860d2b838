//! The passes between images, filters and points: each loops over tiles (or over a filter's channels), `LANES` channels at
//! a time, and does nothing but load, transform and store.

use super::super::super::Shape;
use super::super::super::simd::{prefetch, vectorized};
use super::transform::{Columns, LANES, Lanes, both_axes, collect, evaluate, input, scales};
use super::{BLOCK, Filter, Finish, Winograd};
use rayon::prelude::*;
use std::ops::Range;

/// Tiles ahead of which their cache lines are asked for.
const AHEAD: usize = 2;

/// Calls a function with N, R and M as constants.
macro_rules! dispatch {
    ($self:ident.$function:ident($($argument:expr),*)) => {
        match ($self.points, $self.taps) {
            (7, 3) => $self.$function::<7, 3, 5>($($argument),*),
            (8, 3) => $self.$function::<8, 3, 6>($($argument),*),
            (7, 5) => $self.$function::<7, 5, 3>($($argument),*),
            (8, 5) => $self.$function::<8, 5, 4>($($argument),*),
            (points, taps) => unreachable!("{points} points for {taps} taps"),
        }
    };
}

impl Winograd {
    /// U, packed.
    pub fn pack(&self, filter: Filter<'_>, packed: &mut [f32]) {
        let panels = packed[..self.filter_len()].par_chunks_mut(self.filter_panel_len()).enumerate();
        panels.for_each(|(panel, packed)| dispatch!(self.pack_panel(filter, panel * self.kernel.nr, packed)));
    }

    fn pack_panel<const N: usize, const R: usize, const M: usize>(
        &self,
        filter: Filter<'_>,
        first: usize,
        packed: &mut [f32],
    ) {
        let nr = self.kernel.nr;
        let matrix_len = packed.len() / (N * N);
        let plane = self.input.c * self.output.c;
        packed.chunks_exact_mut(matrix_len).for_each(|matrix| matrix[..nr].fill(0.0));
        vectorized(
            #[inline(always)]
            || {
                let mut columns: Columns<R, N> = [[Lanes::ZERO; R]; N];
                for k in 0..self.input.c {
                    for column in (first..self.output.c.min(first + nr)).step_by(LANES) {
                        let load = |i: usize, j: usize| {
                            let tap = if filter.turned { R * R - 1 - (i * R + j) } else { i * R + j };
                            let place = tap * plane + k * filter.row + column * filter.column;
                            Lanes::gather(&filter.data[place..], filter.column)
                        };
                        let to = (1 + k) * nr + column - first;
                        let store = |i: usize, j: usize, value: Lanes| {
                            let scale = const { scales::<N>() }[i] * const { scales::<N>() }[j];
                            (value * scale).store(&mut packed[(i * N + j) * matrix_len + to..]);
                        };
                        both_axes(&mut columns, load, evaluate, store);
                    }
                }
            },
        );
    }

    pub(super) fn transform_input(&self, rows: Range<usize>, x: &[f32], v: &mut [f32]) {
        let blocks = v.par_chunks_mut(self.input_block_len()).enumerate();
        blocks.for_each(|(block, v)| match self.points {
            7 => self.transform_input_block::<7>(rows.clone(), x, block * BLOCK, v),
            _ => self.transform_input_block::<8>(rows.clone(), x, block * BLOCK, v),
        });
    }

    fn transform_input_block<const N: usize>(&self, rows: Range<usize>, x: &[f32], channel: usize, v: &mut [f32]) {
        let point_len = self.tile_places.len() * BLOCK;
        vectorized(
            #[inline(always)]
            || {
                let mut columns: Columns<N, N> = [[Lanes::ZERO; N]; N];
                for (tile, image, [top, left]) in self.each_tile(rows) {
                    let image = &x[image * self.input.len()..][..self.input.len()];
                    let place = [top.wrapping_sub(self.before[0]), left.wrapping_sub(self.before[1])];
                    for lane in (0..BLOCK).step_by(LANES) {
                        let load = |i, j| pixel(image, self.input, place, [i, j], channel + lane);
                        let to = tile * BLOCK + lane;
                        let store = |i: usize, j: usize, value: Lanes| {
                            let to = (i * N + j) * point_len + to;
                            prefetch(v, to + AHEAD * BLOCK);
                            value.store(&mut v[to..]);
                        };
                        both_axes(&mut columns, load, input, store);
                    }
                }
            },
        );
    }

    /// Z, packed, and the sums of dy.
    pub(super) fn transform_grad_output(
        &self,
        rows: Range<usize>,
        dy: &[f32],
        accumulate: bool,
        sums: &mut [f32],
        z: &mut [f32],
    ) {
        dispatch!(self.transform_grad_output_of(rows, dy, accumulate, sums, z));
    }

    fn transform_grad_output_of<const N: usize, const R: usize, const M: usize>(
        &self,
        rows: Range<usize>,
        dy: &[f32],
        accumulate: bool,
        sums: &mut [f32],
        z: &mut [f32],
    ) {
        let nr = self.kernel.nr;
        let matrix_len = self.output_panel_len() / self.squares();
        let panels = z.par_chunks_mut(self.output_panel_len()).zip(sums.par_chunks_mut(nr)).enumerate();
        panels.for_each(|(panel, (z, sums))| {
            z.chunks_exact_mut(matrix_len).for_each(|matrix| matrix[..nr].fill(0.0));
            if !accumulate {
                sums.fill(0.0);
            }
            vectorized(
                #[inline(always)]
                || {
                    let mut columns: Columns<M, N> = [[Lanes::ZERO; M]; N];
                    for lane in (0..sums.len()).step_by(LANES) {
                        let mut sum = Lanes::ZERO;
                        for (tile, image, place) in self.each_tile(rows.clone()) {
                            let image = &dy[image * self.output.len()..][..self.output.len()];
                            let load = |i, j| {
                                let value = pixel(image, self.output, place, [i, j], panel * nr + lane);
                                sum += value;
                                value
                            };
                            let to = (1 + tile) * nr + lane;
                            let store = |i: usize, j: usize, value: Lanes| {
                                let to = (i * N + j) * matrix_len + to;
                                prefetch(z, to + AHEAD * nr);
                                value.store(&mut z[to..]);
                            };
                            both_axes(&mut columns, load, evaluate, store);
                        }
                        (Lanes::load(&sums[lane..]) + sum).store(&mut sums[lane..]);
                    }
                },
            );
        });
    }

    /// y of some rows of tiles; the tiles of Y begin with row `first`.
    pub(super) fn transform_output(
        &self,
        first: usize,
        rows: Range<usize>,
        product: &[f32],
        finish: Finish<'_>,
        y: &mut [f32],
    ) {
        if rows.len() == 1 {
            return dispatch!(self.transform_output_row(rows.start - first, rows.start, product, finish, y));
        }
        let middle = rows.start + rows.len() / 2;
        let (upper, lower) = y.split_at_mut(self.output_range(&(rows.start..middle)).len());
        rayon::join(
            || self.transform_output(first, rows.start..middle, product, finish, upper),
            || self.transform_output(first, middle..rows.end, product, finish, lower),
        );
    }

    fn transform_output_row<const N: usize, const R: usize, const M: usize>(
        &self,
        number: usize,
        row: usize,
        product: &[f32],
        finish: Finish<'_>,
        y: &mut [f32],
    ) {
        let Shape { h, w, c } = self.output;
        let height = M.min(h - row % self.tiles[0] * M);
        vectorized(
            #[inline(always)]
            || {
                let mut columns: Columns<N, M> = [[Lanes::ZERO; N]; M];
                for column in 0..self.tiles[1] {
                    let tile = number * self.tiles[1] + column;
                    let width = M.min(w - column * M);
                    for f in (0..c).step_by(LANES) {
                        let load = |i: usize, j: usize| {
                            let from = (i * N + j) * self.product_len() + tile * c + f;
                            prefetch(product, from + 2 * BLOCK);
                            Lanes::load(&product[from..])
                        };
                        let bias = finish.bias.map_or(Lanes::ZERO, |bias| Lanes::load(&bias[f..]));
                        let store = |i: usize, j: usize, value: Lanes| {
                            if i < height && j < width {
                                let value = value + bias;
                                let value = if finish.relu { value.relu() } else { value };
                                value.store(&mut y[(i * w + column * M + j) * c + f..]);
                            }
                        };
                        both_axes(&mut columns, load, collect, store);
                    }
                }
            },
        );
    }

    /// The gradient by the filter (R, R, C, F) from dU, after `gradient` has seen all tiles.
    pub fn finish_gradient(&self, filter: &mut [f32], scratch: &[f32]) {
        dispatch!(self.collect_filter(filter, &scratch[..self.squares() * self.grad_len()]));
    }

    fn collect_filter<const N: usize, const R: usize, const M: usize>(&self, filter: &mut [f32], grad: &[f32]) {
        let mut planes = filter.chunks_exact_mut(self.input.c * self.output.c);
        let planes: Planes<'_, R> =
            std::array::from_fn(|_| std::array::from_fn(|_| planes.next().expect("R * R planes")));
        self.collect_channels::<N, R>(0..self.input.c, planes, grad);
    }

    /// The gradient's planes (C, F) for some channels.
    fn collect_channels<const N: usize, const R: usize>(
        &self,
        channels: Range<usize>,
        planes: Planes<'_, R>,
        grad: &[f32],
    ) {
        let filters = self.output.c;
        if channels.len() > BLOCK {
            let middle = channels.start + channels.len() / 2;
            let (upper, lower) = split_planes(planes, (middle - channels.start) * filters);
            rayon::join(
                || self.collect_channels::<N, R>(channels.start..middle, upper, grad),
                || self.collect_channels::<N, R>(middle..channels.end, lower, grad),
            );
            return;
        }
        let (nr, mut planes) = (self.kernel.nr, planes);
        vectorized(
            #[inline(always)]
            || {
                let mut columns: Columns<N, R> = [[Lanes::ZERO; N]; R];
                for (row, c) in channels.enumerate() {
                    for f in (0..filters).step_by(LANES) {
                        let from = (f / nr * self.input.c + c) * nr + f % nr;
                        let load = |i: usize, j: usize| {
                            let scale = const { scales::<N>() }[i] * const { scales::<N>() }[j];
                            Lanes::load(&grad[(i * N + j) * self.grad_len() + from..]) * scale
                        };
                        let store = |i: usize, j: usize, value: Lanes| {
                            value.store(&mut planes[i][j][row * filters + f..]);
                        };
                        both_axes(&mut columns, load, collect, store);
                    }
                }
            },
        );
    }
}

type Planes<'a, const R: usize> = [[&'a mut [f32]; R]; R];

/// Each plane's first `len` values, and the rest.
fn split_planes<const R: usize>(planes: Planes<'_, R>, len: usize) -> (Planes<'_, R>, Planes<'_, R>) {
    let mut lower: Planes<'_, R> = std::array::from_fn(|_| std::array::from_fn(|_| Default::default()));
    let mut kh = 0;
    let upper = planes.map(|row| {
        let mut kw = 0;
        let row = row.map(|plane| {
            let (head, tail) = plane.split_at_mut(len);
            lower[kh][kw] = tail;
            kw += 1;
            head
        });
        kh += 1;
        row
    });
    (upper, lower)
}

/// `LANES` channels of the pixel (i, j) behind `place`, zeros outside the image; `place` may have wrapped below zero.
#[inline(always)]
fn pixel(image: &[f32], shape: Shape, place: [usize; 2], [i, j]: [usize; 2], channel: usize) -> Lanes {
    let (h, w) = (place[0].wrapping_add(i), place[1].wrapping_add(j));
    if h < shape.h && w < shape.w { Lanes::load(&image[(h * shape.w + w) * shape.c + channel..]) } else { Lanes::ZERO }
}
