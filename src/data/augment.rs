//! From an image to the network's floats: framing, then one pass a row that mirrors, lights and normalises.
//!
//! Pixels stay bytes up to that last pass. There a byte becomes a float through a table of 256 values a channel, which holds
//! scaling and normalisation together, so a value costs one load, rounded once; a lighting shifts the table before the pass.
//! A crop is where the rows are read, a flip in which direction. The draws of a sample are a function of
//! (seed, epoch, index): no batch, rank or thread changes them.

pub mod cuda;
mod frame;
mod statistics;

pub use statistics::Statistics;

use super::Dataset;
use super::image::Image;
use crate::config::raw::{self, Augment};
use crate::error::{Error, Result};
use crate::model::Shape;
use crate::rng::{Purpose, Rng};
use fast_image_resize::Resizer;
use frame::{Crop, Framing, Scaling, Window};

/// Refuses steps that make no sense for a model of this input and images of this shape, or of any where none is given.
pub fn check(steps: &[Augment], shape: Option<Shape>, input: Shape) -> Result<()> {
    for (number, step) in steps.iter().enumerate() {
        let before = |is: fn(&Augment) -> bool| steps[..number].iter().any(is);
        if steps[..number].iter().any(|other| std::mem::discriminant(other) == std::mem::discriminant(step)) {
            return refuse(format!("lists {step:?} twice"));
        }
        match step {
            Augment::RandomCrop { padding } => check_padding(*padding, input)?,
            Augment::Resize { shorter, .. } if *shorter < input.h.max(input.w) => {
                return refuse(format!(
                    "has resize with shorter = {shorter}, out of which no {}x{} can be cut; use at least {}",
                    input.h,
                    input.w,
                    input.h.max(input.w)
                ));
            }
            Augment::RandomResizedCrop { scale, ratio, .. } if scale[0] > scale[1] || ratio[0] > ratio[1] => {
                return refuse(
                    "has random_resized_crop with a pair that is not [least, greatest]; for example \
                     scale = [0.08, 1.0], ratio = [0.75, 1.333]",
                );
            }
            Augment::Lighting { .. } if input.c != 3 => {
                return refuse(format!("has lighting, which is of colours; model.input has {} channels", input.c));
            }
            Augment::Lighting { .. } if before(|other| matches!(other, Augment::Normalize { .. })) => {
                return refuse("has lighting behind normalize; it is added to values from 0 to 1, so it comes first");
            }
            Augment::Normalize { mean, std, statistics } => check_normalize(*statistics, mean, std, input.c)?,
            _ => {}
        }
    }
    check_framing(steps, shape, input)
}

fn check_padding(padding: usize, input: Shape) -> Result<()> {
    let smaller = input.h.min(input.w);
    if padding < smaller {
        return Ok(());
    }
    Err(Error::usage(format!(
        "random_crop pads by {padding}, which can move a {}x{} image out of sight; use at most {}",
        input.h,
        input.w,
        smaller - 1
    )))
}

fn check_normalize(
    statistics: raw::Statistics,
    mean: &Option<Vec<f64>>,
    std: &Option<Vec<f64>>,
    channels: usize,
) -> Result<()> {
    if mean.is_some() != std.is_some() {
        return refuse("has normalize with one of mean and std; give both or neither");
    }
    match Statistics::given(statistics, mean.as_deref(), std.as_deref()) {
        Some(Statistics { mean, std }) if mean.len() != channels || std.len() != channels => refuse(format!(
            "has normalize with {} means and {} standard deviations; model.input has {channels} channels",
            mean.len(),
            std.len()
        )),
        _ => Ok(()),
    }
}

/// One way to the model's size at most; and where all images have one shape, a way only if it is wanted.
fn check_framing(steps: &[Augment], shape: Option<Shape>, input: Shape) -> Result<()> {
    let has = |is: fn(&Augment) -> bool| steps.iter().any(is);
    let resize = has(|step| matches!(step, Augment::Resize { .. }));
    let part = has(|step| matches!(step, Augment::RandomResizedCrop { .. }));
    if part && (resize || has(|step| matches!(step, Augment::RandomCrop { .. }))) {
        return refuse("has random_resized_crop beside another crop or resize; keep one of them");
    }
    match shape {
        Some(shape) if shape != input && (shape.c != input.c || !(resize || part)) => Err(Error::usage(format!(
            "model.input is {input}, but the images of this data set are {shape}; write input = [{}, {}, {}]{}",
            shape.h,
            shape.w,
            shape.c,
            if shape.c == input.c { ", or add a resize or random_resized_crop to data.augment" } else { "" }
        ))),
        Some(shape) if shape != input && shape.c > 4 => {
            refuse(format!("resizes images of {} channels; at most 4 can be", shape.c))
        }
        _ => Ok(()),
    }
}

/// Whether images of this shape, or of any where none is given, are scaled to become the model's input.
pub fn scales(steps: &[Augment], shape: Option<Shape>, input: Shape) -> bool {
    framing(steps, shape, input).scaling != Scaling::Native
}

fn refuse<T>(what: impl std::fmt::Display) -> Result<T> {
    Err(Error::usage(format!("`[data] augment` {what}")))
}

/// `[data] augment`, made ready for one model.
#[derive(Clone, Debug)]
pub struct Augmenter {
    /// What comes out.
    input: Shape,
    framing: Framing,
    flip: bool,
    /// Standard deviation of the multiples of each principal component.
    lighting: Option<f32>,
    /// What a shift by 1 of a value between 0 and 1 is after normalisation, a channel each.
    scale: Vec<f32>,
    /// The float of each byte, a table a channel.
    tables: Vec<[f32; 256]>,
    /// The float of a padded pixel, a channel each.
    border: Vec<f32>,
}

/// What was drawn for one sample.
#[derive(Clone, Debug, PartialEq)]
struct Draw {
    window: Window,
    mirrored: bool,
    /// Multiples of the principal components.
    lighting: Option<[f32; 3]>,
}

/// A worker's own: buffers that go from sample to sample.
#[derive(Default)]
pub struct Workspace {
    resizer: Resizer,
    resampled: Vec<u8>,
    tables: Vec<[f32; 256]>,
}

/// Of ImageNet's colours, values from 0 to 1: standard deviations along the principal components, and the components' red,
/// green and blue. Krizhevsky et al. 2012 describe them; the numbers are those of Facebook's fb.resnet.torch.
const DEVIATIONS: [f32; 3] = [0.2175, 0.0188, 0.0045];
const COMPONENTS: [[f32; 3]; 3] = [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]];

impl Augmenter {
    /// For training. `train` gives the statistics of a `normalize` that names none; it is then read whole.
    pub fn new(steps: &[Augment], train: &dyn Dataset, input: Shape) -> Result<Augmenter> {
        check(steps, train.shape(), input)?;
        let mut augmenter = Augmenter {
            input,
            framing: framing(steps, train.shape(), input),
            flip: false,
            lighting: None,
            scale: vec![1.0; input.c],
            tables: vec![std::array::from_fn(|byte| byte as f32 / 255.0); input.c],
            border: vec![0.0; input.c],
        };
        let mut padded = false;
        for step in steps {
            match step {
                Augment::RandomCrop { .. } => padded = true,
                Augment::HorizontalFlip {} => augmenter.flip = true,
                Augment::Lighting { std } => augmenter.lighting = Some(*std),
                Augment::Normalize { statistics, mean, std } => {
                    match Statistics::given(*statistics, mean.as_deref(), std.as_deref()) {
                        Some(given) => augmenter.normalize(&given),
                        None => augmenter.normalize(&Statistics::of(train, input.c)?),
                    }
                    // What was padded before is normalised like any black pixel; what is padded later is zero.
                    if padded {
                        augmenter.border = augmenter.tables.iter().map(|table| table[0]).collect();
                    }
                }
                Augment::Resize { .. } | Augment::RandomResizedCrop { .. } => {}
            }
        }
        Ok(augmenter)
    }

    /// For evaluation: the same size and normalisation, and nothing random.
    pub fn without_randomness(&self) -> Augmenter {
        Augmenter { framing: self.framing.without_randomness(), flip: false, lighting: None, ..self.clone() }
    }

    /// Shape of what comes out.
    pub fn output(&self) -> Shape {
        self.input
    }

    /// A channel that never varies is only centred.
    fn normalize(&mut self, statistics: &Statistics) {
        let channels = self.tables.iter_mut().zip(&mut self.scale);
        for ((table, scale), (mean, std)) in channels.zip(statistics.mean.iter().zip(&statistics.std)) {
            let std = if *std > 0.0 { *std } else { 1.0 };
            *table = std::array::from_fn(|byte| ((byte as f64 / 255.0 - mean) / std) as f32);
            *scale = (1.0 / std) as f32;
        }
    }

    /// Writes one sample's floats: out (H, W, C) of the model's input.
    pub fn apply(
        &self,
        image: &Image,
        workspace: &mut Workspace,
        out: &mut [f32],
        (seed, epoch, index): (u64, u32, u64),
    ) -> Result<()> {
        let draw = self.draw(image.shape(), seed, epoch, index);
        let Workspace { resizer, resampled, tables } = workspace;
        let tables = match draw.lighting {
            Some(multiples) => self.lit(multiples, tables),
            None => &self.tables,
        };
        let (pixels, stride) = self.seen(image, &draw.window, resizer, resampled)?;
        let row = self.input.w * self.input.c;
        for (y, out) in out.chunks_exact_mut(row).enumerate() {
            match y.checked_sub(draw.window.rows.start) {
                Some(seen) if seen < draw.window.rows.len() => self.row(&pixels[seen * stride..], out, &draw, tables),
                _ => self.fill_border(out),
            }
        }
        Ok(())
    }

    /// What the window shows of an image: its bytes, and how many lie from row to row.
    fn seen<'i>(
        &self,
        image: &'i Image,
        window: &Window,
        resizer: &mut Resizer,
        resampled: &'i mut Vec<u8>,
    ) -> Result<(&'i [u8], usize)> {
        if window.is_native() {
            let Shape { w, c, .. } = image.shape();
            let start = (window.top as usize * w + window.left as usize) * c;
            return Ok((image.bytes().get(start..).unwrap_or_default(), w * c));
        }
        let pixels = window.resample((image.bytes(), image.shape()), self.framing.filter, resizer, resampled)?;
        Ok((pixels, window.columns.len() * self.input.c))
    }

    fn draw(&self, source: Shape, seed: u64, epoch: u32, index: u64) -> Draw {
        let mut rng = Rng::new(seed, Purpose::Augment, epoch, index);
        Draw {
            window: self.framing.draw(source, self.input, &mut rng),
            mirrored: self.flip && rng.below(2) == 1,
            lighting: self.lighting.map(|std| [0; 3].map(|_| std * rng.normal())),
        }
    }

    /// The tables with the sum of the components added, each times its deviation and its multiple.
    fn lit<'t>(&self, multiples: [f32; 3], tables: &'t mut Vec<[f32; 256]>) -> &'t [[f32; 256]] {
        tables.clone_from(&self.tables);
        for (channel, table) in tables.iter_mut().enumerate() {
            let shift = self.shift(multiples, channel);
            table.iter_mut().for_each(|value| *value += shift);
        }
        tables
    }

    /// What a lighting adds to a channel's normalised values.
    fn shift(&self, multiples: [f32; 3], channel: usize) -> f32 {
        let shift: f32 = (0..3).map(|k| multiples[k] * DEVIATIONS[k] * COMPONENTS[k][channel]).sum();
        shift * self.scale[channel]
    }

    /// One row of the crop: border, the part of the image's row that is seen, border; then mirrored as a whole.
    fn row(&self, row: &[u8], out: &mut [f32], draw: &Draw, tables: &[[f32; 256]]) {
        let Shape { w, c, .. } = self.input;
        let columns = &draw.window.columns;
        let start = if draw.mirrored { w - columns.end } else { columns.start };
        let (before, rest) = out.split_at_mut(start * c);
        let (middle, after) = rest.split_at_mut(columns.len() * c);
        self.fill_border(before);
        self.fill_border(after);
        let source = &row[..columns.len() * c];
        match c {
            1 => convert::<1>(tables, source, middle, draw.mirrored),
            3 => convert::<3>(tables, source, middle, draw.mirrored),
            _ => convert_any(tables, source, middle, draw.mirrored),
        }
    }

    fn fill_border(&self, out: &mut [f32]) {
        for pixel in out.chunks_exact_mut(self.border.len()) {
            pixel.copy_from_slice(&self.border);
        }
    }
}

/// What the steps say of sizes. Images of any size, of which they say nothing, are scaled to cover the model's.
fn framing(steps: &[Augment], shape: Option<Shape>, input: Shape) -> Framing {
    let unsaid = if shape == Some(input) { Scaling::Native } else { Scaling::Cover(1.0) };
    let mut framing = Framing { scaling: unsaid, crop: Crop::Centre, filter: raw::Filter::default() };
    for step in steps {
        match *step {
            Augment::Resize { shorter, filter } => {
                (framing.scaling, framing.filter) = (Scaling::Shorter(shorter), filter);
            }
            Augment::RandomResizedCrop { scale, ratio, filter } => {
                (framing.scaling, framing.filter) = (Scaling::RandomPart { area: scale, ratio }, filter);
            }
            Augment::RandomCrop { padding } => framing.crop = Crop::Random { padding },
            Augment::HorizontalFlip {} | Augment::Lighting { .. } | Augment::Normalize { .. } => {}
        }
    }
    framing
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
