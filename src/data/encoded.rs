//! Where encoded images come from: a folder of files, or records of a TFRecord file. Decoding and framing them is the
//! business of `images`, which stands on this seam.

use super::sampler::Layout;
use crate::error::Result;

/// Labelled JPEG or PNG files, reachable in any order by several threads at once.
pub trait EncodedImages: Send + Sync {
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// A name for each class; its place is the label.
    fn classes(&self) -> &[String];
    /// The label of an image; cheap, for splits and class weights.
    fn label(&self, index: usize) -> u32;
    /// Replaces `bytes` by the encoded image. An error names the file, and the record in it.
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<()>;
    /// How images lie in files, as `Dataset::layout`.
    fn layout(&self) -> Option<Layout> {
        None
    }
    /// What messages call the image: its path, or the file and the record's number in it.
    fn name(&self, index: usize) -> String;
}
