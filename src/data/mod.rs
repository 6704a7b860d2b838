//! Samples, from files to batches. `Dataset` is the seam: a format is one file and one line of the registry.

use crate::error::Result;
use crate::model::Shape;

/// A set of labelled images that can be read in any order by several threads at once.
pub trait Dataset: Send + Sync {
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Shape of one image.
    fn shape(&self) -> Shape;
    fn classes(&self) -> usize;
    /// The label of a sample; cheap, for splits and class weights.
    fn label(&self, index: usize) -> u32;
    /// Writes the image as HWC bytes, `shape().len()` of them. An error names the file and the index.
    fn read(&self, index: usize, image: &mut [u8]) -> Result<()>;
}

/// A rank's samples of one micro-batch (or of one evaluation step), normalised, NHWC.
#[derive(Debug, Default)]
pub struct Batch {
    /// (count, H, W, C)
    pub images: Vec<f32>,
    /// (count)
    pub labels: Vec<u32>,
    /// Indices into the dataset, for error messages and tests.
    pub indices: Vec<u32>,
}

impl Batch {
    pub fn count(&self) -> usize {
        self.labels.len()
    }
}
