//! The order of an epoch and the validation split: which sample stands where, as a function of the seed.

use super::image::Image;
use super::sampler::Layout;
use super::{Dataset, Reading};
use crate::error::{Error, Result};
use crate::model::Shape;
use crate::rng::{Purpose, Rng};
use std::sync::Arc;

/// Fills `order` with a permutation of its indices that is a function of (seed, epoch) alone: Fisher-Yates from the end
/// (Durstenfeld 1964), one draw and one exchange a sample.
pub fn shuffle(order: &mut [u32], seed: u64, epoch: u32) {
    for (index, slot) in order.iter_mut().enumerate() {
        *slot = index as u32;
    }
    permute(order, &mut Rng::new(seed, Purpose::Shuffle, epoch, 0));
}

pub(super) fn permute<T>(order: &mut [T], rng: &mut Rng) {
    for last in (1..order.len()).rev() {
        order.swap(last, rng.below(last as u32 + 1) as usize);
    }
}

/// Some samples of another set, numbered anew.
pub struct Subset {
    of: Arc<dyn Dataset>,
    indices: Vec<u32>,
}

/// Holds out `share` of every class for validation. Fails where either part is left without a sample.
pub fn split_validation(dataset: &Arc<dyn Dataset>, share: f64, seed: u64) -> Result<(Subset, Subset)> {
    let (train, validation) = split(dataset, share, seed, 0);
    for (part, subset) in [("training", &train), ("validation", &validation)] {
        if subset.is_empty() {
            return Err(Error::data(format!(
                "`[data] validation = {share}` of {} samples leaves none for {part}",
                dataset.len()
            )));
        }
    }
    Ok((train, validation))
}

/// Takes `share` of every class apart, to one sample, and of all classes together to the nearest; drawn by (seed, stream).
/// Returns (the rest, the share), each in the order of the original set.
pub fn split(dataset: &Arc<dyn Dataset>, share: f64, seed: u64, stream: u32) -> (Subset, Subset) {
    assert!((0.0..1.0).contains(&share), "share {share}");
    let mut by_class = vec![Vec::new(); dataset.classes()];
    for index in 0..dataset.len() {
        by_class[dataset.label(index) as usize].push(index as u32);
    }
    let sizes: Vec<usize> = by_class.iter().map(Vec::len).collect();
    let counts = apportion(&sizes, share, &mut Rng::new(seed, Purpose::Split, stream, u64::MAX));
    let (mut rest, mut apart) = (Vec::new(), Vec::new());
    for (class, (mut members, count)) in by_class.into_iter().zip(counts).enumerate() {
        permute(&mut members, &mut Rng::new(seed, Purpose::Split, stream, class as u64));
        apart.extend_from_slice(&members[..count]);
        rest.extend_from_slice(&members[count..]);
    }
    let subset = |mut indices: Vec<u32>| {
        indices.sort_unstable();
        Subset { of: dataset.clone(), indices }
    };
    (subset(rest), subset(apart))
}

/// How many of each size fall to `share`: its whole part, and one more of those with the largest fractions until the sum is
/// right (Hamilton's method; equal fractions are drawn). So a thousand classes of four give 0.1 * 4000, where rounding each
/// would give nothing. One is always left over: a class without a training sample cannot be learned.
fn apportion(sizes: &[usize], share: f64, rng: &mut Rng) -> Vec<usize> {
    let quota = |size: usize| size as f64 * share;
    let most = |size: usize| size.saturating_sub(1);
    let mut counts: Vec<usize> = sizes.iter().map(|&size| most(size).min(quota(size) as usize)).collect();
    let wanted = quota(sizes.iter().sum()).round() as usize;
    let missing = wanted.saturating_sub(counts.iter().sum());

    let mut more: Vec<usize> = (0..sizes.len()).filter(|&class| counts[class] < most(sizes[class])).collect();
    permute(&mut more, rng);
    more.sort_by(|&a, &b| quota(sizes[b]).fract().total_cmp(&quota(sizes[a]).fract()));
    more.into_iter().take(missing).for_each(|class| counts[class] += 1);
    counts
}

impl Subset {
    /// The sample's index in the original set.
    fn original(&self, index: usize) -> usize {
        self.indices[index] as usize
    }
}

impl Dataset for Subset {
    fn len(&self) -> usize {
        self.indices.len()
    }
    fn shape(&self) -> Option<Shape> {
        self.of.shape()
    }
    fn classes(&self) -> usize {
        self.of.classes()
    }
    fn label(&self, index: usize) -> u32 {
        self.of.label(self.original(index))
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        self.of.read(self.original(index), image)
    }
    fn read_encoded(&self, index: usize, bytes: &mut Vec<u8>) -> Result<bool> {
        self.of.read_encoded(self.original(index), bytes)
    }
    fn class_names(&self) -> Vec<String> {
        self.of.class_names()
    }
    /// The files of the original set, with what is left of them.
    fn layout(&self) -> Option<Layout> {
        let Layout { files, window } = self.of.layout()?;
        let place = |original: u32| self.indices.partition_point(|&index| index < original) as u32;
        let files = files.into_iter().map(|file| place(file.start)..place(file.end)).collect();
        Some(Layout { files, window })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::memory::InMemory;

    #[test]
    fn every_epoch_and_seed_has_its_own_permutation() {
        let shuffled = |seed, epoch| {
            let mut order = vec![0; 1000];
            shuffle(&mut order, seed, epoch);
            order
        };
        let order = shuffled(1, 0);
        assert_eq!(order, shuffled(1, 0));
        assert_ne!(order, shuffled(1, 1));
        assert_ne!(order, shuffled(2, 0));
        let mut sorted = order.clone();
        sorted.sort();
        assert!(sorted.iter().copied().eq(0..1000));
    }

    /// Chi-square over the 24 orders of four: 23 degrees of freedom, the 0.001 quantile is 49.7.
    #[test]
    fn all_orders_are_equally_likely() {
        let mut counts = std::collections::HashMap::new();
        let mut order = [0; 4];
        for epoch in 0..24_000 {
            shuffle(&mut order, 5, epoch);
            *counts.entry(order).or_insert(0) += 1;
        }
        let chi_square: f64 = counts.values().map(|&count| (f64::from(count) - 1000.0).powi(2) / 1000.0).sum();
        assert!(counts.len() == 24 && chi_square < 49.7, "{} orders, chi-square {chi_square}", counts.len());
    }

    #[test]
    fn the_split_is_stratified_disjoint_and_keeps_labels_with_images() {
        // Sample i holds the byte i and has label 0 for the first 120, 1 for the next 60, 2 for the last 20.
        let labels = (0..200).map(|i| if i < 120 { 0 } else { u8::from(i >= 180) + 1 }).collect();
        let set: Arc<dyn Dataset> = Arc::new(InMemory::new(Shape::vector(1), 3, (0..200).collect(), labels));
        let (train, validation) = split_validation(&set, 0.1, 3).unwrap();
        assert_eq!(crate::data::class_counts(&validation), [12, 6, 2]);
        assert_eq!(crate::data::class_counts(&train), [108, 54, 18]);

        let mut seen = Vec::new();
        for part in [&train, &validation] {
            for index in 0..part.len() {
                let mut image = Image::default();
                part.read(index, &mut image).unwrap();
                let byte = image.bytes()[0];
                assert_eq!(part.label(index), set.label(byte.into()));
                seen.push(byte);
            }
        }
        seen.sort();
        assert!(seen.into_iter().eq(0..200));
        assert_ne!(validation.indices, split_validation(&set, 0.1, 4).unwrap().1.indices);
        assert!(split_validation(&set, 0.001, 3).is_err());
    }

    #[test]
    fn tiny_classes_share_what_falls_to_all_and_keep_a_sample() {
        let counts = |sizes: &[usize], share| apportion(sizes, share, &mut Rng::new(3, Purpose::Test, 0, 0));
        let of_four = counts(&[4; 1000], 0.1);
        assert_eq!(of_four.iter().sum::<usize>(), 400);
        assert!(of_four.iter().all(|&count| count <= 1));
        assert_ne!(of_four, [vec![1; 400], vec![0; 600]].concat(), "which ones is drawn");
        assert_eq!(counts(&[1, 0, 2, 1], 0.9), [0, 0, 1, 0]);
        assert_eq!(counts(&[100, 9, 1], 0.25), [25, 3, 0]);
        assert_eq!(counts(&[3, 5, 30], 0.3), [1, 1, 9], "0.9, 1.5 and 9.0 of 11.4");
        assert_eq!(counts(&[100, 100], 0.29), [29, 29], "28.999... in binary");
    }
}
