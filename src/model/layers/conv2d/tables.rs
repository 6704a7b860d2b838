//! Where the values of a convolution's implicit matrices lie: in images with zeros around them, the sum of what a row and a
//! column contribute (`cpu`).

use super::super::super::kernels::gemm::{offset, strided};
use super::Geometry;
use super::padded::Padded;

pub struct Tables {
    /// The input with zeros around it.
    pub input: Padded,
    /// In the padded input: of each output pixel of a block (its first tap), of each tap relative to that.
    pub pixels: Vec<u32>,
    pub taps: Vec<u32>,
    /// Rows of (pixels, F) and of (taps, F).
    pub output_rows: Vec<u32>,
    pub weight_rows: Vec<u32>,
    /// dy with zeros around it.
    pub grad: Padded,
    /// The input pixels of a unit.
    pub phases: Vec<Phase>,
}

impl Tables {
    /// For `block` images in the products over x, `unit` in that over dy.
    pub fn new(geometry: &Geometry, block: usize, unit: usize) -> Tables {
        let Geometry { input, output, rows, columns, .. } = *geometry;
        let (padded, grad) = (Padded::of_input(geometry), Padded::of_grad(geometry));
        let (mut pixels, mut taps) = (Vec::new(), Vec::new());
        for (image, oh, ow) in each(block, output.h, output.w) {
            pixels.push(padded.at(image, oh * rows.stride, ow * columns.stride, 0));
        }
        for (kh, kw, c) in each(rows.size, columns.size, geometry.channels()) {
            taps.push(padded.at(0, kh, kw, c));
        }
        let phases = each(1, rows.stride.min(input.h), columns.stride.min(input.w));
        Tables {
            output_rows: strided(pixels.len(), output.c),
            weight_rows: strided(taps.len(), output.c),
            phases: phases.map(|(_, first_h, first_w)| Phase::new(geometry, &grad, unit, first_h, first_w)).collect(),
            input: padded,
            pixels,
            taps,
            grad,
        }
    }
}

/// The input pixels of a block that meet the same taps.
pub struct Phase {
    /// In the padded dy: of each input pixel (its first tap), of each (tap, filter) relative to that.
    pub pixels: Vec<u32>,
    pub taps: Vec<u32>,
    /// In the weight: of each (tap, filter), for channel 0.
    pub weights: Vec<u32>,
    /// In dx: of each input pixel.
    pub input_rows: Vec<u32>,
}

impl Phase {
    /// Of the input pixels (first_h + i * sh, first_w + j * sw). Pixel ih meets the taps kh = (ih + before) % sh + t * sh
    /// under the output (ih + before) / sh - t: the last of them sees the first row of dy, so the kernel runs backwards.
    fn new(geometry: &Geometry, grad: &Padded, block: usize, first_h: usize, first_w: usize) -> Phase {
        let Geometry { input, output, rows, columns, .. } = *geometry;
        let (kh, kw) = ((first_h + rows.before) % rows.stride, (first_w + columns.before) % columns.stride);
        let count = |size: usize, first: usize, stride: usize| size.saturating_sub(first).div_ceil(stride);
        let (taps_h, taps_w) = (count(rows.size, kh, rows.stride), count(columns.size, kw, columns.stride));

        let (mut pixels, mut input_rows) = (Vec::new(), Vec::new());
        let counts = (count(input.h, first_h, rows.stride), count(input.w, first_w, columns.stride));
        for (image, i, j) in each(block, counts.0, counts.1) {
            let (ih, iw) = (first_h + i * rows.stride, first_w + j * columns.stride);
            input_rows.push(offset(((image * input.h + ih) * input.w + iw) * input.c));
            // With no taps at all the product is zero and this place is never read.
            let h = (grad.top + (ih + rows.before) / rows.stride + 1).saturating_sub(taps_h.max(1));
            let w = (grad.left + (iw + columns.before) / columns.stride + 1).saturating_sub(taps_w.max(1));
            pixels.push(grad.at(image, h, w, 0));
        }
        let (mut taps, mut weights) = (Vec::new(), Vec::new());
        for (i, j, f) in each(taps_h, taps_w, geometry.filters()) {
            taps.push(grad.at(0, i, j, f));
            let (h, w) = (kh + (taps_h - 1 - i) * rows.stride, kw + (taps_w - 1 - j) * columns.stride);
            weights.push(offset((h * columns.size + w) * geometry.channels() * output.c + f));
        }
        Phase { pixels, taps, weights, input_rows }
    }
}

/// All (a, b, c) below the three bounds, the last running fastest.
fn each(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}
