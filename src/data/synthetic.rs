//! Noise in the shape that the model wants, made from (seed, index) when it is read: steps can be timed without data. There
//! is nothing in it to be learnt.

use super::image::Image;
use super::{Dataset, Reading, Sets};
use crate::error::Result;
use crate::model::Shape;
use crate::rng::{Purpose, Rng};
use std::sync::Arc;

/// `lens`: samples of training and test set.
pub fn open(lens: [usize; 2], classes: usize, shape: Shape, seed: u64) -> Sets {
    let part = |part: usize| Arc::new(Synthetic { len: lens[part], part: part as u32, classes, shape, seed });
    Sets { train: part(0), test: part(1) }
}

/// One part; they differ in the random stream.
struct Synthetic {
    len: usize,
    part: u32,
    classes: usize,
    shape: Shape,
    seed: u64,
}

impl Dataset for Synthetic {
    fn len(&self) -> usize {
        self.len
    }
    fn shape(&self) -> Option<Shape> {
        Some(self.shape)
    }
    fn classes(&self) -> usize {
        self.classes
    }
    fn label(&self, index: usize) -> u32 {
        (index % self.classes) as u32
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let mut rng = Rng::new(self.seed, Purpose::Synthetic, self.part, index as u64);
        for four in image.reshape(self.shape).chunks_mut(4) {
            four.copy_from_slice(&rng.next_u32().to_le_bytes()[..four.len()]);
        }
        Ok(Reading::Whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_function_of_seed_part_and_index() {
        let read_over = |before: u8, set: &dyn Dataset, index| {
            let mut image = Image::default();
            image.reshape(Shape::new(4, 5, 3)).fill(before);
            set.read(index, &mut image).unwrap();
            image.bytes().to_vec()
        };
        let read = |set: &dyn Dataset, index| read_over(7, set, index);
        let shape = Shape::new(3, 5, 3);
        let sets = open([10, 4], 7, shape, 1);
        let image = read(&*sets.train, 8);
        assert_eq!((image.len(), sets.train.label(8), sets.test.len()), (shape.len(), 1, 4));
        assert_eq!(image, read(&*open([9, 1], 7, shape, 1).train, 8));
        assert_eq!(image, read_over(8, &*sets.train, 8), "no byte is left from the image before");
        assert_ne!(image, read(&*sets.train, 1));
        assert_ne!(image, read(&*sets.test, 8));
        assert_ne!(image, read(&*open([10, 4], 7, shape, 2).train, 8));
    }
}
