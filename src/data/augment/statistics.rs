//! What `normalize` subtracts and divides by.

use crate::config::raw;
use crate::data::image::Image;
use crate::data::{Dataset, Reading};
use crate::error::{Error, Result};
use rayon::prelude::*;

/// Mean and standard deviation of each channel, of bytes scaled to [0, 1].
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

/// Of the 1.28 million training images, red, green, blue; as torchvision gives them.
const IMAGENET: [[f64; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];

impl Statistics {
    /// Those that a `normalize` names where it does not ask for the training set's own.
    pub fn given(source: raw::Statistics, mean: Option<&[f64]>, std: Option<&[f64]>) -> Option<Statistics> {
        match (mean, std, source) {
            (Some(mean), Some(std), _) => Some(Statistics { mean: mean.to_vec(), std: std.to_vec() }),
            (_, _, raw::Statistics::Imagenet) => {
                let [mean, std] = IMAGENET.map(|values| values.to_vec());
                Some(Statistics { mean, std })
            }
            (_, _, raw::Statistics::TrainingSet) => None,
        }
    }

    /// Over every pixel of the set, from integer sums: exact, so equal on all ranks and for any number of threads. Images
    /// that are damaged are left out.
    pub fn of(dataset: &dyn Dataset, channels: usize) -> Result<Statistics> {
        let zero = || (Image::default(), Sums { pixels: 0, channels: vec![[0; 2]; channels] });
        let (_, sums) = (0..dataset.len())
            .into_par_iter()
            .try_fold(zero, |(mut image, mut sums), index| {
                if let Reading::Whole = dataset.read(index, &mut image)? {
                    sums.add(&image);
                }
                Ok::<_, Error>((image, sums))
            })
            .try_reduce(zero, |(image, left), (_, right)| Ok((image, left.joined(&right))))?;
        if sums.pixels == 0 {
            return Err(Error::data("no training image is whole, so there is nothing to normalise by"));
        }
        Ok(sums.statistics())
    }
}

struct Sums {
    pixels: u64,
    /// Of each channel the sum and the sum of squares.
    channels: Vec<[u64; 2]>,
}

impl Sums {
    fn add(&mut self, image: &Image) {
        for pixel in image.bytes().chunks_exact(self.channels.len()) {
            for (&byte, sum) in pixel.iter().zip(&mut self.channels) {
                let value = u64::from(byte);
                *sum = [sum[0] + value, sum[1] + value * value];
            }
        }
        self.pixels += (image.shape().h * image.shape().w) as u64;
    }

    fn joined(mut self, other: &Sums) -> Sums {
        self.pixels += other.pixels;
        self.channels.iter_mut().zip(&other.channels).for_each(|(l, r)| *l = [l[0] + r[0], l[1] + r[1]]);
        self
    }

    fn statistics(&self) -> Statistics {
        let count = u128::from(self.pixels);
        let moments = self.channels.iter().map(|&[sum, squares]| {
            let variance = count * u128::from(squares) - u128::from(sum).pow(2);
            (sum as f64 / count as f64 / 255.0, (variance as f64).sqrt() / count as f64 / 255.0)
        });
        let (mean, std) = moments.unzip();
        Statistics { mean, std }
    }
}
