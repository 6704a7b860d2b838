//! Samples, from files to batches: `open` reads a format into a `Dataset`, `sampler` puts an epoch in order, `partition`
//! deals its positions out to ranks, and `DataQueue` turns them into augmented batches ahead of the step.
//!
//! `Dataset` is the seam: a format is one file and one line of `open`. Everything after it is a function of
//! (seed, epoch, position), so no batch depends on the number of ranks or threads, or on what was read before.

pub mod augment;
pub mod batch;
mod cifar;
pub mod encoded;
mod files;
pub mod generate;
mod idx;
pub mod image;
pub mod images;
mod memory;
pub mod order;
pub mod pack;
pub mod partition;
pub mod queue;
pub mod resident;
pub mod sampler;
mod shapes;
mod synthetic;
pub mod tfrecord;

pub use batch::Batch;

use crate::config::raw::{Data, Format};
use crate::error::{Error, Result};
use crate::model::Shape;
use image::Image;
use sampler::Layout;
use std::sync::Arc;

/// A set of labelled images that can be read in any order by several threads at once.
pub trait Dataset: Send + Sync {
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The shape of every image, where they all have one.
    fn shape(&self) -> Option<Shape>;
    fn classes(&self) -> usize;
    /// The label of a sample; cheap, for splits and class weights.
    fn label(&self, index: usize) -> u32;
    /// Replaces `image` by the sample. An error ends the run and names the file and the index.
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading>;
    /// Replaces `bytes` by the JPEG or PNG file of a sample; false for a set that has only pixels.
    fn read_encoded(&self, _index: usize, _bytes: &mut Vec<u8>) -> Result<bool> {
        Ok(false)
    }
    /// Names of the classes, as far as they have some; their places are the labels.
    fn class_names(&self) -> Vec<String> {
        (0..self.classes()).map(|class| class.to_string()).collect()
    }
    /// How samples lie in files, where reading them about in that order is cheaper than in any.
    fn layout(&self) -> Option<Layout> {
        None
    }
}

/// What came of reading a sample.
#[derive(Debug)]
pub enum Reading {
    Whole,
    /// There is no image in what was read, and the configuration says to go on without; why, with the file's name. It is a
    /// function of the file alone, so every rank and every run finds the same.
    Damaged(Error),
}

/// The two parts that every format has.
pub struct Sets {
    pub train: Arc<dyn Dataset>,
    pub test: Arc<dyn Dataset>,
}

/// What some formats need to know of the model.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Shape of a sample: what made-up images have, and how many channels are decoded.
    pub input: Shape,
    /// Values that the model gives for a sample: one a class.
    pub outputs: usize,
}

/// Reads the sets that `[data]` names. `seed` makes the procedural ones and draws the splits. Errors are of kind `Data`
/// and name the file.
pub fn open(data: &Data, target: Target, seed: u64) -> Result<Sets> {
    let sets = match &data.format {
        Format::Shapes { train, test } => shapes::open(*train, *test, seed),
        Format::Idx { path } => idx::open(path),
        Format::Cifar { path } => cifar::open(path),
        Format::Images(folder) => images::open(folder, &data.shared, target, seed),
        Format::Tfrecord(config) => tfrecord::open(config, &data.shared, target),
        Format::Synthetic { train, test, classes } => {
            Ok(synthetic::open([*train, *test], classes.unwrap_or(target.outputs), target.input, seed))
        }
    }?;
    match (sets.train.shape(), sets.test.shape()) {
        (Some(train), Some(test)) if train != test => {
            Err(Error::data(format!("the training images are {train}, the test images {test}; both must be one shape")))
        }
        _ => Ok(sets),
    }
}

/// Weights that give every class that occurs the same say: samples / (classes that occur * samples of the class). The
/// others' is 0: a model may have more outputs than there are classes, and a class may be all test images.
pub fn balanced_class_weights(dataset: &dyn Dataset) -> Vec<f32> {
    let counts = class_counts(dataset);
    let occurring = counts.iter().filter(|&&count| count > 0).count() as f64;
    let balanced = |&count: &usize| match count {
        0 => 0.0,
        count => (dataset.len() as f64 / (occurring * count as f64)) as f32,
    };
    counts.iter().map(balanced).collect()
}

/// Samples of each class.
pub fn class_counts(dataset: &dyn Dataset) -> Vec<usize> {
    let mut counts = vec![0; dataset.classes()];
    for index in 0..dataset.len() {
        counts[dataset.label(index) as usize] += 1;
    }
    counts
}

/// BLAKE3 of the set's size, shape, class names, labels and files, by which ranks check that they read the same and in the
/// same order, and a resumed run that it goes on with the set it began with.
pub fn fingerprint(dataset: &dyn Dataset) -> String {
    let [h, w, c] = dataset.shape().map_or([0; 3], Shape::lengths);
    let mut hasher = blake3::Hasher::new();
    for size in [dataset.len(), h, w, c, dataset.classes()] {
        hasher.update(&(size as u64).to_le_bytes());
    }
    for name in dataset.class_names() {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
    }
    for index in 0..dataset.len() {
        hasher.update(&dataset.label(index).to_le_bytes());
    }
    for file in dataset.layout().into_iter().flat_map(|layout| layout.files) {
        hasher.update(&file.start.to_le_bytes());
        hasher.update(&file.end.to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests;
