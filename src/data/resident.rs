//! A set whose pixels lie in a GPU's memory for the whole run: of a batch only placements and labels are sent then.

use super::augment::{self, Augmenter};
use super::image::Image;
use super::{Dataset, Reading};
use crate::config::raw::{self, DataShared};
use crate::device::cuda::Gpu;
use crate::device::{Arena, Slice};
use crate::error::{Error, Result};
use crate::model::Shape;
use rayon::prelude::*;

/// By `resident = "auto"` a set may take this part of the GPU's free memory.
const SHARE: usize = 10;
/// Bytes of pixels that are read before they are sent.
const AT_A_TIME: usize = 16 << 20;

/// The pixels of all samples, one image behind the other in the order of the set.
pub struct Resident {
    pixels: Arena,
}

/// Refuses to keep images as they are that are scaled as they are read. `shape`: of every image, where they all have one.
pub fn check(data: &DataShared, shape: Option<Shape>, input: Shape) -> Result<()> {
    if data.resident != raw::Resident::On || !augment::scales(&data.augment, shape, input) {
        return Ok(());
    }
    Err(Error::usage(
        "data.resident = \"on\" keeps images on the GPU as they are, but these are scaled as they are read; take it out, or \
         prepare images of the model's size and take resize and random_resized_crop out of data.augment",
    ))
}

impl Resident {
    /// Where `[data] resident`, which `check` has let pass, says so: reads the whole set, with all threads of this rank, into
    /// the GPU's memory. `name` is the set's in errors.
    pub fn new(
        choice: raw::Resident,
        gpu: &Gpu,
        dataset: &dyn Dataset,
        augmenter: &Augmenter,
        name: &str,
    ) -> Result<Option<Resident>> {
        let bytes = dataset.len().saturating_mul(augmenter.output().len());
        let wanted = match choice {
            raw::Resident::Off => false,
            raw::Resident::Auto => augmenter.is_native() && bytes <= gpu.memory()?.free / SHARE,
            raw::Resident::On => true,
        };
        if !wanted {
            return Ok(None);
        }
        let what = || format!("the {name} set, {bytes} bytes (data.resident = \"off\" leaves it with the CPU)");
        let pixels = gpu.allocate(bytes).map_err(|error| error.context(what()))?;
        let resident = Resident { pixels };
        resident.upload(gpu, dataset, augmenter.output().len())?;
        tracing::debug!("the {name} set lies in the GPU's memory, {bytes} bytes");
        Ok(Some(resident))
    }

    /// image: bytes of one.
    fn upload(&self, gpu: &Gpu, dataset: &dyn Dataset, image: usize) -> Result<()> {
        let at_a_time = (AT_A_TIME / image).clamp(1, dataset.len().max(1));
        let staging = gpu.allocate_pinned(at_a_time * image)?;
        for first in (0..dataset.len()).step_by(at_a_time) {
            let count = at_a_time.min(dataset.len() - first);
            // SAFETY: the copy of the last round was waited for.
            let staged = unsafe { staging.slice_mut(0..count * image) }.into_u8();
            staged.par_chunks_exact_mut(image).enumerate().try_for_each_init(Image::default, |read, (at, out)| {
                if let Reading::Damaged(reason) = dataset.read(first + at, read)? {
                    return Err(reason);
                }
                out.copy_from_slice(read.bytes());
                Ok(())
            })?;
            // SAFETY: nobody else has either yet.
            let (from, to) = unsafe {
                (staging.slice(0..count * image), self.pixels.slice_mut(first * image..(first + count) * image))
            };
            gpu.copies().copy_and_wait(from, to)?;
        }
        Ok(())
    }

    pub fn pixels(&self) -> Slice<'_> {
        // SAFETY: written by `new` alone.
        unsafe { self.pixels.slice(0..self.pixels.bytes()) }
    }
}
