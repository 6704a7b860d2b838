//! A set whose images fit in memory: what the small file formats are read into.

use super::image::Image;
use super::{Dataset, Reading};
use crate::error::Result;
use crate::model::Shape;

/// Images one after another as HWC bytes, and a label each.
pub struct InMemory {
    shape: Shape,
    classes: usize,
    images: Vec<u8>,
    labels: Vec<u8>,
}

impl InMemory {
    /// The reader has checked both lengths and every label.
    pub fn new(shape: Shape, classes: usize, images: Vec<u8>, labels: Vec<u8>) -> InMemory {
        assert_eq!(images.len(), labels.len() * shape.len());
        InMemory { shape, classes, images, labels }
    }
}

impl Dataset for InMemory {
    fn len(&self) -> usize {
        self.labels.len()
    }
    fn shape(&self) -> Option<Shape> {
        Some(self.shape)
    }
    fn classes(&self) -> usize {
        self.classes
    }
    fn label(&self, index: usize) -> u32 {
        self.labels[index].into()
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let bytes = self.shape.len();
        image.reshape(self.shape).copy_from_slice(&self.images[index * bytes..][..bytes]);
        Ok(Reading::Whole)
    }
}
