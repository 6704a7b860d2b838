//! Which part of an image fills the model's input, and the resampling of it.
//!
//! "Resize, then crop" is done in one step: the crop is carried back into the source's coordinates, and only that part is
//! resampled, straight to its final size. The pixels are those of a crop from the resized image (the filter sees the source
//! on both sides of the crop's edge), without computing the others.

use crate::config::raw;
use crate::data::image::room;
use crate::error::{Error, Result};
use crate::model::Shape;
use crate::rng::Rng;
use fast_image_resize::images::{Image as Pixels, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use std::ops::Range;

/// How the shape of an image becomes the model's.
#[derive(Clone, Debug, PartialEq)]
pub struct Framing {
    pub scaling: Scaling,
    pub crop: Crop,
    pub filter: raw::Filter,
}

/// What an image is scaled to before it is cropped.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Nothing: it has the model's size.
    Native,
    /// The shorter side becomes this, as torchvision's Resize does it.
    Shorter(usize),
    /// It just covers the model's size times this.
    Cover(f64),
    /// A random part of it becomes the model's size, as torchvision's RandomResizedCrop: area and ratio are [least, greatest].
    RandomPart { area: [f64; 2], ratio: [f64; 2] },
}

/// What is cut out of the scaled image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Crop {
    Centre,
    /// Anywhere, also up to `padding` pixels over the edge.
    Random {
        padding: usize,
    },
}

/// A part of the source, in its pixels and fractions of them, and the part of the model's input that it fills.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    pub top: f64,
    pub left: f64,
    pub height: f64,
    pub width: f64,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
}

/// Evaluation sees so much more than the model's size of what RandomResizedCrop was trained on: torchvision's 256 of 224.
const EVALUATION_COVER: f64 = 256.0 / 224.0;
/// Draws of RandomResizedCrop before it takes the middle.
const ATTEMPTS: usize = 10;

impl Framing {
    /// Of a training sample.
    pub fn draw(&self, source: Shape, input: Shape, rng: &mut Rng) -> Window {
        let (h, w) = match self.scaling {
            // These two draws stand first whatever is cropped, as a flip is drawn after them.
            Scaling::RandomPart { area, ratio } => return random_part(source, input, area, ratio, rng),
            _ => self.scaled(source, input),
        };
        let padding = match self.crop {
            Crop::Random { padding } => padding,
            Crop::Centre => 0,
        };
        let mut offset = |scaled: usize, size: usize| {
            // Beyond that no draw reaches: an image a million times as wide as it is high.
            let play = (scaled + 2 * padding).saturating_sub(size).min(u32::MAX as usize - 1);
            match self.crop {
                Crop::Random { .. } => i64::from(rng.below(play as u32 + 1)) - padding as i64,
                Crop::Centre => i64::from(rng.below(1)) + play as i64 / 2,
            }
        };
        let (top, left) = (offset(h, input.h), offset(w, input.w));
        cut(source, (h, w), input, (top, left))
    }

    /// Of an evaluation sample: the same without chance.
    pub fn without_randomness(&self) -> Framing {
        let scaling = match self.scaling {
            Scaling::RandomPart { .. } => Scaling::Cover(EVALUATION_COVER),
            ref other => other.clone(),
        };
        Framing { scaling, crop: Crop::Centre, filter: self.filter }
    }

    /// Height and width before the crop.
    fn scaled(&self, source: Shape, input: Shape) -> (usize, usize) {
        match self.scaling {
            Scaling::Shorter(side) => {
                let shorter = source.h.min(source.w);
                (side * source.h / shorter, side * source.w / shorter)
            }
            Scaling::Cover(factor) => {
                let (h, w) = (source.h as f64, source.w as f64);
                let scale = factor * (input.h as f64 / h).max(input.w as f64 / w);
                (((h * scale).round() as usize).max(input.h), ((w * scale).round() as usize).max(input.w))
            }
            Scaling::Native | Scaling::RandomPart { .. } => (source.h, source.w),
        }
    }
}

/// The input's size cut out of the source scaled to `scaled`, from `corner` on, which may lie outside.
fn cut(source: Shape, scaled: (usize, usize), input: Shape, corner: (i64, i64)) -> Window {
    let seen = |corner: i64, scaled: usize, size: usize| {
        let first = (-corner).clamp(0, size as i64);
        let end = (scaled as i64 - corner).clamp(first, size as i64);
        (first as usize..end as usize, (first + corner) as f64, (end - first) as f64)
    };
    let (rows, top, height) = seen(corner.0, scaled.0, input.h);
    let (columns, left, width) = seen(corner.1, scaled.1, input.w);
    let (down, right) = (source.h as f64 / scaled.0 as f64, source.w as f64 / scaled.1 as f64);
    Window { top: top * down, left: left * right, height: height * down, width: width * right, rows, columns }
}

/// RandomResizedCrop: area uniform, logarithm of the aspect ratio uniform, place uniform.
fn random_part(source: Shape, input: Shape, area: [f64; 2], ratio: [f64; 2], rng: &mut Rng) -> Window {
    let mut uniform = |[low, high]: [f64; 2]| low + (high - low) * f64::from(rng.uniform());
    let pixels = (source.h * source.w) as f64;
    let size = (0..ATTEMPTS).find_map(|_| {
        let area = pixels * uniform(area);
        let ratio = uniform(ratio.map(f64::ln)).exp();
        let (h, w) = ((area / ratio).sqrt().round() as usize, (area * ratio).sqrt().round() as usize);
        ((1..=source.h).contains(&h) && (1..=source.w).contains(&w)).then_some((h, w))
    });
    let (h, w, top, left) = match size {
        Some((h, w)) => {
            let mut offset = |play: usize| rng.below(play as u32 + 1) as usize;
            (h, w, offset(source.h - h), offset(source.w - w))
        }
        None => {
            let (h, w) = within(source, ratio);
            (h, w, (source.h - h) / 2, (source.w - w) / 2)
        }
    };
    Window {
        top: top as f64,
        left: left as f64,
        height: h as f64,
        width: w as f64,
        rows: 0..input.h,
        columns: 0..input.w,
    }
}

/// Height and width of the largest part whose aspect ratio is allowed.
fn within(source: Shape, [least, greatest]: [f64; 2]) -> (usize, usize) {
    let (h, w) = (source.h as f64, source.w as f64);
    match w / h {
        ratio if ratio < least => (((w / least).round() as usize).clamp(1, source.h), source.w),
        ratio if ratio > greatest => (source.h, ((h * greatest).round() as usize).clamp(1, source.w)),
        _ => (source.h, source.w),
    }
}

impl Window {
    /// Whether it shows the source's pixels as they are; then its numbers are whole.
    pub fn is_native(&self) -> bool {
        self.height == self.rows.len() as f64 && self.width == self.columns.len() as f64 && self.is_whole()
    }

    fn is_whole(&self) -> bool {
        self.top.fract() == 0.0 && self.left.fract() == 0.0
    }

    /// Resamples what the window shows into the first bytes of `out`. source (H, W, C), out (rows, columns, C).
    pub fn resample<'o>(
        &self,
        (source, shape): (&[u8], Shape),
        filter: raw::Filter,
        resizer: &mut Resizer,
        out: &'o mut Vec<u8>,
    ) -> Result<&'o [u8]> {
        let pixels = match shape.c {
            1 => PixelType::U8,
            2 => PixelType::U8x2,
            3 => PixelType::U8x3,
            _ => PixelType::U8x4,
        };
        let filter = match filter {
            raw::Filter::Bilinear => FilterType::Bilinear,
            raw::Filter::Lanczos3 => FilterType::Lanczos3,
        };
        // In double precision the last pixel may end a hair beyond the image.
        let (width, height) = (self.width.min(shape.w as f64 - self.left), self.height.min(shape.h as f64 - self.top));
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(filter))
            .crop(self.left, self.top, width, height)
            .use_alpha(false);
        let out = room(out, self.rows.len() * self.columns.len() * shape.c);
        let failed = |error: &dyn std::fmt::Display| Error::internal(format!("resizing {shape} to {self:?}: {error}"));
        let source = ImageRef::new(shape.w as u32, shape.h as u32, source, pixels).map_err(|error| failed(&error))?;
        let (columns, rows) = (self.columns.len() as u32, self.rows.len() as u32);
        let mut target = Pixels::from_slice_u8(columns, rows, out, pixels).map_err(|error| failed(&error))?;
        resizer.resize(&source, &mut target, &options).map_err(|error| failed(&error))?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests;
