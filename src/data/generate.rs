//! `trainer data generate`: a folder of photograph-like JPEG files, for measuring how fast images are read. Small real sets fit
//! into the cache of files; this makes one as large as is wanted.
//!
//! A picture is value noise in octaves: random heights on grids whose spacing halves from octave to octave, smoothly
//! interpolated, with amplitudes that fall with the spacing, as the spectrum of photographs does. On top come a class's
//! tint and some grain. At the quality used, a file has about as many bytes a pixel as ImageNet's have.

use crate::error::{Context, Error, Kind, Result};
use crate::rng::{Purpose, Rng};
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use rayon::prelude::*;
use std::fs;
use std::path::Path;

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Pictures {
    pub images: usize,
    pub classes: usize,
    pub width: u16,
    pub height: u16,
    pub seed: u64,
}

/// One image in so many is for `val`.
const VALIDATION: usize = 10;
const QUALITY: u8 = 90;
/// Pixels between two points of the coarsest grid.
const COARSEST: usize = 128;
const OCTAVES: usize = 7;
/// How much weaker an octave is than the one before.
const FALL: f32 = 0.62;

/// Writes `folder/train/CLASS/NUMBER.jpg` and `folder/val/...`; `written` is called once for every file. Returns the bytes
/// of all files. Nothing may be in the folder before.
pub fn generate(folder: &Path, pictures: &Pictures, written: impl Fn() + Sync) -> Result<u64> {
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::usage(format!("{} is not empty; name a folder that is new", folder.display())));
    }
    for part in ["train", "val"] {
        for class in 0..pictures.classes {
            let path = folder.join(part).join(class_name(class));
            fs::create_dir_all(&path).or_kind(Kind::Data, format_args!("making the folder {}", path.display()))?;
        }
    }
    let bytes = (0..pictures.images).into_par_iter().map(|index| {
        let part = if (index / pictures.classes).is_multiple_of(VALIDATION) { "val" } else { "train" };
        let path = folder.join(part).join(class_name(index % pictures.classes)).join(format!("{index:08}.jpg"));
        let file = encode(&paint(pictures, index), pictures)?;
        fs::write(&path, &file).or_kind(Kind::Data, format_args!("writing {}", path.display()))?;
        written();
        Ok(file.len() as u64)
    });
    bytes.try_reduce(|| 0, |left, right| Ok(left + right))
}

fn class_name(class: usize) -> String {
    format!("class-{class:04}")
}

fn encode(pixels: &[u8], &Pictures { width, height, .. }: &Pictures) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, QUALITY);
    encoder.set_sampling_factor(SamplingFactor::F_2_2);
    encoder.encode(pixels, width, height, ColorType::Rgb).or_kind(Kind::Internal, "encoding a JPEG")?;
    Ok(file)
}

/// (height, width, 3)
fn paint(pictures: &Pictures, index: usize) -> Vec<u8> {
    let (width, height) = (usize::from(pictures.width), usize::from(pictures.height));
    let mut rng = Rng::new(pictures.seed, Purpose::Synthetic, 2, index as u64);
    let mut light = vec![0.0; width * height];
    let mut warmth = light.clone();
    for octave in 0..OCTAVES {
        let strength = FALL.powi(octave as i32);
        add_octave(&mut light, width, COARSEST >> octave, 70.0 * strength, &mut rng);
        // Colours change more slowly than brightness.
        if octave < OCTAVES / 2 {
            add_octave(&mut warmth, width, COARSEST >> octave, 25.0 * strength, &mut rng);
        }
    }
    let mut of_class = Rng::new(pictures.seed, Purpose::Synthetic, 3, (index % pictures.classes) as u64);
    let tint = [0; 3].map(|_| of_class.range(88.0, 168.0));
    let mut pixels = Vec::with_capacity(3 * width * height);
    for (light, warmth) in light.iter().zip(&warmth) {
        let grain = rng.range(-13.0, 13.0);
        let colour = [light + warmth, *light, light - warmth];
        pixels.extend((0..3).map(|channel| (tint[channel] + colour[channel] + grain) as u8));
    }
    pixels
}

/// Adds smoothly interpolated random heights of -strength to strength, `spacing` pixels apart.
fn add_octave(field: &mut [f32], width: usize, spacing: usize, strength: f32, rng: &mut Rng) {
    let columns = width / spacing + 2;
    let mut line = || (0..columns).map(|_| rng.range(-strength, strength)).collect::<Vec<f32>>();
    let (mut above, mut below) = (line(), line());
    // The weight of the next grid point at each pixel between two, 3 t^2 - 2 t^3.
    let smooth: Vec<f32> = (0..spacing).map(|at| at as f32 / spacing as f32).map(|t| t * t * (3.0 - 2.0 * t)).collect();
    for (y, row) in field.chunks_exact_mut(width).enumerate() {
        if y > 0 && y.is_multiple_of(spacing) {
            above = std::mem::replace(&mut below, line());
        }
        let down = smooth[y % spacing];
        let heights: Vec<f32> = above.iter().zip(&below).map(|(above, below)| above + down * (below - above)).collect();
        for (cell, pixels) in row.chunks_mut(spacing).enumerate() {
            let (left, right) = (heights[cell], heights[cell + 1]);
            pixels.iter_mut().zip(&smooth).for_each(|(pixel, across)| *pixel += left + across * (right - left));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_as_asked_for_and_a_picture_depends_on_its_number_and_seed_alone() {
        let folder = tempfile::tempdir().unwrap();
        let pictures = Pictures { images: 43, classes: 4, width: 50, height: 37, seed: 3 };
        let count = std::sync::atomic::AtomicUsize::new(0);
        let written = || _ = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let bytes = generate(folder.path(), &pictures, written).unwrap();
        let files = |part: &str, class: usize| {
            let entries = fs::read_dir(folder.path().join(part).join(class_name(class))).unwrap();
            entries.map(|entry| entry.unwrap().metadata().unwrap().len()).collect::<Vec<u64>>()
        };
        let all: Vec<Vec<u64>> = (0..4).flat_map(|class| [files("train", class), files("val", class)]).collect();
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [9, 2, 9, 2, 9, 2, 9, 1]);
        assert_eq!((all.concat().iter().sum::<u64>(), count.into_inner()), (bytes, 43));
        assert!(generate(folder.path(), &pictures, || ()).unwrap_err().to_string().contains("is not empty"));

        assert_eq!(paint(&pictures, 9), paint(&Pictures { images: 10, ..pictures }, 9));
        assert_ne!(paint(&pictures, 9), paint(&pictures, 13));
        assert_ne!(paint(&pictures, 9), paint(&Pictures { seed: 4, ..pictures }, 9));
    }

    /// ImageNet's files have 0.55 to 0.6 bytes a pixel in the mean.
    #[test]
    fn a_picture_compresses_about_as_a_photograph_does() {
        let pictures = Pictures { images: 1, classes: 1, width: 500, height: 375, seed: 1 };
        let bytes = encode(&paint(&pictures, 0), &pictures).unwrap().len();
        let per_pixel = bytes as f64 / (500.0 * 375.0);
        assert!((0.3..1.0).contains(&per_pixel), "{per_pixel} bytes a pixel");
    }
}
