//! Augmentation and normalisation: from a sample's bytes to the network's floats, in one pass a row.
//!
//! A byte becomes a float through a table of 256 values a channel, which holds scaling and normalisation together, so a
//! value costs one load, rounded once. A crop is where the rows are read, a flip in which direction. The draws of a
//! sample are a function of (seed, epoch, index): no batch, rank or thread changes them.

use super::Dataset;
use crate::config::raw;
use crate::error::{Error, Result};
use crate::model::Shape;
use crate::rng::{Purpose, Rng};
use rayon::prelude::*;

/// Mean and standard deviation of each channel, of bytes scaled to [0, 1].
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

impl Statistics {
    /// Over every pixel of the set, from integer sums: exact, so equal on all ranks and for any number of threads.
    pub fn of(dataset: &dyn Dataset) -> Result<Statistics> {
        let shape = dataset.shape();
        let zero = || (vec![0u8; shape.len()], vec![[0u64; 2]; shape.c]);
        let (_, sums) = (0..dataset.len())
            .into_par_iter()
            .try_fold(zero, |(mut image, mut sums), index| {
                dataset.read(index, &mut image)?;
                add_sums(&image, &mut sums);
                Ok::<_, Error>((image, sums))
            })
            .try_reduce(zero, |(image, mut left), (_, right)| {
                left.iter_mut().zip(right).for_each(|(l, r)| *l = [l[0] + r[0], l[1] + r[1]]);
                Ok((image, left))
            })?;
        let count = (dataset.len() * shape.h * shape.w) as u128;
        let moments = sums.iter().map(|&[sum, squares]| {
            let variance = count * u128::from(squares) - u128::from(sum).pow(2);
            (sum as f64 / count as f64 / 255.0, (variance as f64).sqrt() / count as f64 / 255.0)
        });
        let (mean, std) = moments.unzip();
        Ok(Statistics { mean, std })
    }
}

/// Refuses steps that make no sense for images of this shape.
pub fn check(steps: &[raw::Augment], shape: Shape) -> Result<()> {
    for (number, step) in steps.iter().enumerate() {
        if steps[..number].iter().any(|other| std::mem::discriminant(other) == std::mem::discriminant(step)) {
            return Err(Error::usage(format!("`[data] augment` lists {step:?} twice")));
        }
        let smaller = shape.h.min(shape.w);
        if let raw::Augment::RandomCrop { padding } = *step
            && padding >= smaller
        {
            let Shape { h, w, .. } = shape;
            return Err(Error::usage(format!(
                "random_crop pads by {padding}, which can move a {h}x{w} image out of sight; use at most {}",
                smaller - 1
            )));
        }
    }
    Ok(())
}

/// Adds the sum and the sum of squares of each channel.
fn add_sums(image: &[u8], sums: &mut [[u64; 2]]) {
    for pixel in image.chunks_exact(sums.len()) {
        for (&byte, sum) in pixel.iter().zip(sums.iter_mut()) {
            let value = u64::from(byte);
            *sum = [sum[0] + value, sum[1] + value * value];
        }
    }
}

/// `[data] augment`, made ready for images of one shape.
#[derive(Clone, Debug)]
pub struct Augmenter {
    shape: Shape,
    padding: usize,
    flip: bool,
    /// The float of each byte, a table a channel.
    tables: Vec<[f32; 256]>,
    /// The float of a padded pixel, a channel each.
    border: Vec<f32>,
}

/// What was drawn for one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Draw {
    /// Row and column of the padded image where the crop begins.
    top: usize,
    left: usize,
    mirrored: bool,
}

impl Augmenter {
    /// For training. `train` gives the statistics of `normalize`; it is read whole if that is asked for.
    pub fn new(steps: &[raw::Augment], train: &dyn Dataset) -> Result<Augmenter> {
        let shape = train.shape();
        check(steps, shape)?;
        let mut augmenter = Augmenter {
            shape,
            padding: 0,
            flip: false,
            tables: vec![std::array::from_fn(|byte| byte as f32 / 255.0); shape.c],
            border: vec![0.0; shape.c],
        };
        for step in steps {
            match *step {
                raw::Augment::RandomCrop { padding } => augmenter.padding = padding,
                raw::Augment::HorizontalFlip {} => augmenter.flip = true,
                raw::Augment::Normalize {} => {
                    // What was padded before is normalised like any black pixel; what is padded later is zero.
                    augmenter.normalize(&Statistics::of(train)?);
                    if augmenter.padding > 0 {
                        augmenter.border = augmenter.tables.iter().map(|table| table[0]).collect();
                    }
                }
            }
        }
        Ok(augmenter)
    }

    /// For evaluation: the same normalisation and nothing random.
    pub fn without_randomness(&self) -> Augmenter {
        Augmenter { padding: 0, flip: false, ..self.clone() }
    }

    /// A channel that never varies is only centred.
    fn normalize(&mut self, statistics: &Statistics) {
        for (table, (mean, std)) in self.tables.iter_mut().zip(statistics.mean.iter().zip(&statistics.std)) {
            let std = if *std > 0.0 { *std } else { 1.0 };
            *table = std::array::from_fn(|byte| ((byte as f64 / 255.0 - mean) / std) as f32);
        }
    }

    /// Writes one sample's floats: image, out (H, W, C).
    pub fn apply(&self, image: &[u8], out: &mut [f32], seed: u64, epoch: u32, index: u32) {
        let draw = self.draw(seed, epoch, index);
        let row = self.shape.w * self.shape.c;
        for (y, out) in out.chunks_exact_mut(row).enumerate() {
            // Row y of the crop is row `y + top` of the padded image.
            match (y + draw.top).checked_sub(self.padding) {
                Some(source) if source < self.shape.h => self.row(&image[source * row..][..row], out, draw),
                _ => self.fill_border(out),
            }
        }
    }

    fn draw(&self, seed: u64, epoch: u32, index: u32) -> Draw {
        let mut rng = Rng::new(seed, Purpose::Augment, epoch, index.into());
        let offsets = 2 * self.padding as u32 + 1;
        let (top, left) = (rng.below(offsets) as usize, rng.below(offsets) as usize);
        Draw { top, left, mirrored: self.flip && rng.below(2) == 1 }
    }

    /// One row of the crop: border, the part of the image's row that is seen, border; then mirrored as a whole.
    fn row(&self, row: &[u8], out: &mut [f32], draw: Draw) {
        let Shape { w, c, .. } = self.shape;
        // Column x of the crop is column `x + left - padding` of the image.
        let first = self.padding.saturating_sub(draw.left);
        let skipped = draw.left.saturating_sub(self.padding);
        let seen = w - first - skipped;
        let start = if draw.mirrored { w - first - seen } else { first };
        let (before, rest) = out.split_at_mut(start * c);
        let (middle, after) = rest.split_at_mut(seen * c);
        self.fill_border(before);
        self.fill_border(after);
        let source = &row[skipped * c..(skipped + seen) * c];
        match c {
            1 => convert::<1>(&self.tables, source, middle, draw.mirrored),
            3 => convert::<3>(&self.tables, source, middle, draw.mirrored),
            _ => convert_any(&self.tables, source, middle, draw.mirrored),
        }
    }

    fn fill_border(&self, out: &mut [f32]) {
        for pixel in out.chunks_exact_mut(self.border.len()) {
            pixel.copy_from_slice(&self.border);
        }
    }
}

/// Pixels of C channels, known to the compiler.
fn convert<const C: usize>(tables: &[[f32; 256]], source: &[u8], out: &mut [f32], mirrored: bool) {
    let tables: &[[f32; 256]; C] = tables.try_into().expect("a table a channel");
    let (pixels, out) = (source.as_chunks::<C>().0, out.as_chunks_mut::<C>().0);
    let write = |(out, pixel): (&mut [f32; C], &[u8; C])| {
        *out = std::array::from_fn(|channel| tables[channel][usize::from(pixel[channel])]);
    };
    match mirrored {
        false => out.iter_mut().zip(pixels).for_each(write),
        true => out.iter_mut().zip(pixels.iter().rev()).for_each(write),
    }
}

fn convert_any(tables: &[[f32; 256]], source: &[u8], out: &mut [f32], mirrored: bool) {
    let (channels, pixels) = (tables.len(), source.len() / tables.len());
    for (x, out) in out.chunks_exact_mut(channels).enumerate() {
        let x = if mirrored { pixels - 1 - x } else { x };
        let pixel = &source[x * channels..];
        for channel in 0..channels {
            out[channel] = tables[channel][usize::from(pixel[channel])];
        }
    }
}

#[cfg(test)]
mod tests;
