//! Photographs: JPEG and PNG files of any size, decoded when they are read.
//!
//! `folder` finds the files, `decode` makes images of them. `Images` stands on the seam `EncodedImages` and does not know
//! whether the bytes come from files of their own.

mod decode;
mod folder;

use super::encoded::EncodedImages;
use super::image::Image;
use super::sampler::Layout;
use super::{Dataset, Reading, Sets, Target, order};
use crate::config::raw::{DataShared, ImageFolder, OnBadImage};
use crate::error::{Error, Result};
use crate::model::Shape;
use folder::Found;
use std::sync::Arc;

/// The stream of draws that takes the test set out of a folder that has none.
const TEST_SPLIT: u32 = 1;

/// `[data] format = "images"`.
pub fn open(folder: &ImageFolder, shared: &DataShared, target: Target, seed: u64) -> Result<Sets> {
    let images = |found| Ok::<Arc<dyn Dataset>, Error>(Arc::new(Images::new(Arc::new(found), shared, target)?));
    match folder::find(folder, shared.max_image_bytes)? {
        Found::Parts { train, test } => Ok(Sets { train: images(train)?, test: images(test)? }),
        Found::Whole(all) => {
            let all = images(all)?;
            let (train, test) = order::split(&all, folder.test, seed, TEST_SPLIT);
            if test.is_empty() || train.is_empty() {
                let (share, path) = (folder.test, folder.path.display());
                tracing::info!(
                    "data.test = {share} of the images of {path} is none of any class: the test set is the training set"
                );
                return Ok(Sets { train: all.clone(), test: all });
            }
            Ok(Sets { train: Arc::new(train), test: Arc::new(test) })
        }
    }
}

/// Encoded images as a data set.
pub struct Images {
    source: Arc<dyn EncodedImages>,
    channels: usize,
    classes: usize,
    max_pixels: u64,
    max_bytes: u64,
    on_bad: OnBadImage,
}

impl Images {
    /// Decodes to `target.input.c` channels, 1 or 3. A model may have more outputs than there are classes; what is too few
    /// is refused with the model.
    pub fn new(source: Arc<dyn EncodedImages>, shared: &DataShared, target: Target) -> Result<Images> {
        let channels = target.input.c;
        if channels != 1 && channels != 3 {
            return Err(Error::usage(format!(
                "model.input has {channels} channels; JPEG and PNG images are read as 3 (red, green, blue) or 1 (grey)"
            )));
        }
        let named = source.classes().len();
        if named < target.outputs {
            tracing::debug!("{named} classes for the model's {} outputs: the others are never right", target.outputs);
        }
        Ok(Images {
            source,
            channels,
            classes: named.max(target.outputs),
            max_pixels: shared.max_pixels,
            max_bytes: shared.max_image_bytes,
            on_bad: shared.on_bad_image,
        })
    }

    fn decode(&self, image: &mut Image) -> Result<(), String> {
        self.check_length(&image.encoded)?;
        decode::decode(image, self.channels, self.max_pixels)
    }

    fn check_length(&self, encoded: &[u8]) -> Result<(), String> {
        let most = self.max_bytes;
        match encoded.len() as u64 > most {
            true => Err(format!("it has more than the {most} bytes that data.max_image_bytes allows")),
            false => Ok(()),
        }
    }
}

impl Dataset for Images {
    fn len(&self) -> usize {
        self.source.len()
    }
    fn shape(&self) -> Option<Shape> {
        None
    }
    fn classes(&self) -> usize {
        self.classes
    }
    fn label(&self, index: usize) -> u32 {
        self.source.label(index)
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        self.source.read(index, &mut image.encoded)?;
        match (self.decode(image), self.on_bad) {
            (Ok(()), _) => Ok(Reading::Whole),
            (Err(reason), OnBadImage::Skip) => {
                Ok(Reading::Damaged(Error::data(format!("{}: {reason}", self.source.name(index)))))
            }
            (Err(reason), OnBadImage::Error) => Err(Error::data(format!(
                "{}: {reason}; take the image away, or go on without it: data.on_bad_image = \"skip\"",
                self.source.name(index)
            ))),
        }
    }
    fn read_encoded(&self, index: usize, bytes: &mut Vec<u8>) -> Result<bool> {
        self.source.read(index, bytes)?;
        let named = |reason| Error::data(format!("{}: {reason}", self.source.name(index)));
        self.check_length(bytes).map_err(named).map(|()| true)
    }
    fn class_names(&self) -> Vec<String> {
        self.source.classes().to_vec()
    }
    fn layout(&self) -> Option<Layout> {
        self.source.layout()
    }
}

#[cfg(test)]
mod tests;
