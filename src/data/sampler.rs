//! The order in which an epoch uses the samples: a function of (seed, epoch) alone, the same on every rank, which
//! `partition` then deals out.
//!
//! **Shuffled**, every sample once: a permutation of the whole set (`order::shuffle`). Of a set that lies in files which
//! are best read in their order (`Dataset::layout`), the files are put in a random order one behind the other, and then
//! position after position draws from the `window` samples ahead of it (Fisher-Yates with a limited reach). That is what
//! TensorFlow's `shuffle(buffer_size)` gives: the buffer is the window, and the sample that makes room goes where the drawn
//! one stood. But here the buffer is the page cache: a sample is read when its position comes, at most `window` records
//! before its place in the sequence, and nothing but its index is held until then.
//!
//! **Balanced**, every class that has samples as often as any other, to one, in an epoch of as many positions as there are
//! samples. Positions are numbered through all epochs, and number t belongs to class t mod C, of the C that occur; the k-th of
//! a class takes member k mod M of the class's M, in the (k div M)-th random order of them. So nothing is used again before all of its class were used, over
//! the borders of epochs too, and any epoch can be computed without those before it. At last the epoch is shuffled. It
//! costs a draw a position, and for each class one order of its members or more.

use super::{Dataset, order};
use crate::config::raw;
use crate::rng::{Purpose, Rng};
use std::ops::Range;

/// How samples lie in files that are best read in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Indices of the samples of each file.
    pub files: Vec<Range<u32>>,
    /// How many samples one may be drawn ahead of its place.
    pub window: usize,
}

/// The order of one epoch after another, in memory that is taken once.
pub struct Sampler {
    seed: u64,
    way: Way,
    order: Vec<u32>,
    rounds: Vec<u32>,
}

enum Way {
    Whole,
    Window(Layout),
    Balanced(Classes),
}

/// What is drawn from in a balanced epoch.
struct Classes {
    /// Of each class that has any.
    members: Vec<Vec<u32>>,
    /// Members of one class in the order of their cycle.
    cycle: Vec<u32>,
}

impl Sampler {
    pub fn new(dataset: &dyn Dataset, sampler: raw::Sampler, seed: u64) -> Sampler {
        let way = match (sampler, dataset.layout()) {
            (raw::Sampler::Balanced, _) => Way::Balanced(Classes::of(dataset)),
            (raw::Sampler::Shuffle, Some(layout)) if layout.window < dataset.len() => Way::Window(layout),
            (raw::Sampler::Shuffle, _) => Way::Whole,
        };
        Sampler { seed, way, order: vec![0; dataset.len()], rounds: vec![0; dataset.len()] }
    }

    /// Positions of an epoch.
    pub fn positions(&self) -> usize {
        self.order.len()
    }

    /// Prepares the order of an epoch.
    pub fn begin(&mut self, epoch: u32) {
        match &mut self.way {
            Way::Whole => order::shuffle(&mut self.order, self.seed, epoch),
            Way::Window(layout) => windowed(layout, &mut self.order, self.seed, epoch),
            Way::Balanced(classes) => classes.draw(&mut self.order, &mut self.rounds, self.seed, epoch),
        }
    }

    /// Indices of the samples at these positions of the epoch.
    pub fn indices(&self, positions: Range<usize>) -> &[u32] {
        &self.order[positions]
    }

    /// For each of these positions, the round of the epoch in which its sample is used: other than zero only where a sample
    /// comes more than once, so that augmentation can do something else each time.
    pub fn rounds(&self, positions: Range<usize>) -> &[u32] {
        &self.rounds[positions]
    }
}

fn windowed(layout: &mut Layout, order: &mut [u32], seed: u64, epoch: u32) {
    let Layout { files, window } = layout;
    // From one order whatever the epoch before left, so that an epoch does not depend on others.
    files.sort_unstable_by_key(|file| file.start);
    order::permute(files, &mut Rng::new(seed, Purpose::Shuffle, epoch, 1));
    for (slot, index) in order.iter_mut().zip(files.iter().cloned().flatten()) {
        *slot = index;
    }
    let mut rng = Rng::new(seed, Purpose::Shuffle, epoch, 0);
    for position in 0..order.len() {
        let reach = (order.len() - position).min(*window);
        order.swap(position, position + rng.below(reach as u32) as usize);
    }
}

impl Classes {
    fn of(dataset: &dyn Dataset) -> Classes {
        let mut members = vec![Vec::new(); dataset.classes()];
        for index in 0..dataset.len() {
            members[dataset.label(index) as usize].push(index as u32);
        }
        members.retain(|members| !members.is_empty());
        let largest = members.iter().map(Vec::len).max().unwrap_or(0);
        Classes { members, cycle: Vec::with_capacity(largest) }
    }

    fn draw(&mut self, order: &mut [u32], rounds: &mut [u32], seed: u64, epoch: u32) {
        let (positions, classes) = (order.len() as u64, self.members.len() as u64);
        let mut slots = order.iter_mut().zip(rounds.iter_mut());
        for (class, members) in (0..classes).zip(&self.members) {
            // How many of the numbers below t are equal to `class`, mod `classes`.
            let before = |t: u64| (t + classes - 1 - class) / classes;
            let draws = before(u64::from(epoch) * positions)..before((u64::from(epoch) + 1) * positions);
            let count = members.len() as u64;
            for draw in draws.clone() {
                let (cycle, place) = (draw / count, (draw % count) as usize);
                if draw == draws.start || place == 0 {
                    self.cycle.clone_from(members);
                    order::permute(&mut self.cycle, &mut Rng::new(seed, Purpose::Balance, class as u32, cycle));
                }
                let (slot, round) = slots.next().expect("the classes share out the positions");
                (*slot, *round) = (self.cycle[place], (cycle - draws.start / count) as u32);
            }
        }
        // The same exchanges in both.
        order::permute(order, &mut Rng::new(seed, Purpose::Shuffle, epoch, 0));
        order::permute(rounds, &mut Rng::new(seed, Purpose::Shuffle, epoch, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Reading;
    use crate::data::image::Image;
    use crate::data::memory::InMemory;
    use crate::error::Result;
    use crate::model::Shape;
    use std::collections::{BTreeSet, VecDeque};

    /// A set with these labels, in files of these sizes.
    struct Filed {
        set: InMemory,
        layout: Option<Layout>,
    }

    impl Dataset for Filed {
        fn len(&self) -> usize {
            self.set.len()
        }
        fn shape(&self) -> Option<Shape> {
            self.set.shape()
        }
        fn classes(&self) -> usize {
            self.set.classes()
        }
        fn label(&self, index: usize) -> u32 {
            self.set.label(index)
        }
        fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
            self.set.read(index, image)
        }
        fn layout(&self) -> Option<Layout> {
            self.layout.clone()
        }
    }

    fn labelled(classes: usize, labels: &[u8]) -> Filed {
        let set = InMemory::new(Shape::vector(1), classes, vec![0; labels.len()], labels.to_vec());
        Filed { set, layout: None }
    }

    fn filed(sizes: &[u32], window: usize) -> Filed {
        let ends = sizes.iter().scan(0, |end, size| {
            *end += size;
            Some(*end)
        });
        let files: Vec<_> = ends.zip(sizes).map(|(end, size)| end - size..end).collect();
        let samples = sizes.iter().sum::<u32>() as usize;
        Filed { layout: Some(Layout { files, window }), ..labelled(1, &vec![0; samples]) }
    }

    fn epoch(set: &dyn Dataset, sampler: raw::Sampler, seed: u64, epoch: u32) -> (Vec<u32>, Vec<u32>) {
        let mut sampler = Sampler::new(set, sampler, seed);
        sampler.begin(epoch);
        (sampler.indices(0..set.len()).to_vec(), sampler.rounds(0..set.len()).to_vec())
    }

    fn shuffled(set: &dyn Dataset, seed: u64, number: u32) -> Vec<u32> {
        let (order, rounds) = epoch(set, raw::Sampler::Shuffle, seed, number);
        assert!(rounds.iter().all(|&round| round == 0));
        order
    }

    /// Every sample once; none before its place in the sequence of files by more than the window; files one after another.
    #[test]
    fn a_window_goes_through_the_files_in_a_random_order() {
        let sizes = [70, 0, 50, 110, 1, 69];
        let (set, window) = (filed(&sizes, 20), 20);
        let files = set.layout.clone().unwrap().files;
        let mut first_files = Vec::new();
        for number in 0..40 {
            let order = shuffled(&set, 4, number);
            let mut sorted = order.clone();
            sorted.sort();
            assert!(sorted.iter().copied().eq(0..300));
            let file_of = |index: u32| files.iter().position(|file| file.contains(&index)).unwrap();
            // Files in the order in which their last sample comes, which is that of the sequence but for tiny files.
            let mut sequence: Vec<usize> = (0..files.len()).filter(|&file| !files[file].is_empty()).collect();
            let middle = |file: &usize| {
                order.iter().enumerate().filter(|(_, i)| files[*file].contains(i)).map(|(p, _)| p).sum::<usize>()
                    / files[*file].len()
            };
            sequence.sort_by_key(middle);
            let place = |index: u32| -> usize {
                let before = sequence.iter().take_while(|&&file| file != file_of(index));
                before.map(|&file| files[file].len()).sum::<usize>() + (index - files[file_of(index)].start) as usize
            };
            for (position, &index) in order.iter().enumerate() {
                if sizes[file_of(index)] > 1 {
                    assert!(place(index) < position + window + 1, "epoch {number}: {index} at {position}");
                }
            }
            first_files.push(sequence[0]);
            assert_eq!(order, shuffled(&set, 4, number), "a function of (seed, epoch)");
            assert_ne!(order, shuffled(&set, 5, number));
        }
        first_files.sort();
        first_files.dedup();
        assert!(first_files.len() >= 4, "{first_files:?}");
    }

    /// Takes one of the `window` that are held at random; the first of them moves to its place, and the next comes in.
    fn buffered(sequence: Vec<u32>, window: usize, mut rng: Rng) -> Vec<u32> {
        let mut ahead = sequence.into_iter();
        let mut buffer: VecDeque<u32> = ahead.by_ref().take(window).collect();
        let mut order = Vec::new();
        while !buffer.is_empty() {
            let drawn = rng.below(buffer.len() as u32) as usize;
            buffer.swap(0, drawn);
            order.extend(buffer.pop_front());
            buffer.extend(ahead.next());
        }
        order
    }

    #[test]
    fn a_window_draws_as_a_shuffle_buffer_of_its_size_does() {
        let sizes = [7, 0, 5, 11, 1];
        for (number, window) in (0..).zip([1, 2, 3, 9, 22, 23]) {
            let sequence = shuffled(&filed(&sizes, 1), 4, number);
            let expected = buffered(sequence, window, Rng::new(4, Purpose::Shuffle, number, 0));
            assert_eq!(shuffled(&filed(&sizes, window), 4, number), expected, "a window of {window}");
        }
    }

    /// An epoch is the same whether others came before it in the same sampler or not.
    #[test]
    fn an_epoch_does_not_depend_on_those_before() {
        for (set, way) in [
            (filed(&[40, 30, 50], 9), raw::Sampler::Shuffle),
            (labelled(3, &[0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0]), raw::Sampler::Balanced),
        ] {
            let mut sampler = Sampler::new(&set, way, 7);
            for number in [0, 1, 5, 2] {
                sampler.begin(number);
                let positions = 0..sampler.positions();
                let (order, rounds) = epoch(&set, way, 7, number);
                assert_eq!(sampler.indices(positions.clone()), order);
                assert_eq!(sampler.rounds(positions), rounds);
            }
        }
    }

    #[test]
    fn a_window_as_large_as_the_set_is_the_order_of_any_other_set() {
        let mut plain = vec![0; 120];
        order::shuffle(&mut plain, 3, 2);
        assert_eq!(shuffled(&filed(&[50, 70], 120), 3, 2), plain);
        assert_eq!(shuffled(&filed(&[50, 70], 10_000), 3, 2), plain);
        assert_ne!(shuffled(&filed(&[50, 70], 119), 3, 2), plain);
    }

    #[test]
    fn a_window_of_one_only_orders_the_files() {
        let order = shuffled(&filed(&[3, 4, 5], 1), 3, 0);
        let mut files: Vec<Vec<u32>> = vec![(0..3).collect(), (3..7).collect(), (7..12).collect()];
        files.sort_by_key(|file| order.iter().position(|index| *index == file[0]));
        assert_eq!(order, files.concat());
    }

    /// Over epochs of 26 positions for 4 classes of 2, 13, 1 and 10: shares of 6 or 7, never one more than another's; and
    /// of the draws of a class, through all epochs, each run of as many as it has members holds every member once.
    #[test]
    fn balanced_epochs_share_out_positions_and_cycle_through_members() {
        let labels: Vec<u8> = [2, 13, 1, 10].iter().zip(0..).flat_map(|(&count, class)| vec![class; count]).collect();
        let set = labelled(4, &labels);
        let mut uses = vec![0; 26];
        let mut totals = [0; 4];
        for number in 0..50 {
            let (order, rounds) = epoch(&set, raw::Sampler::Balanced, 9, number);
            let mut shares = [0; 4];
            order.iter().for_each(|&index| shares[set.label(index as usize) as usize] += 1);
            assert!(shares.iter().all(|share| [6, 7].contains(share)), "{shares:?}");
            totals.iter_mut().zip(shares).for_each(|(total, share)| *total += share);
            assert!(totals.iter().max().unwrap() - totals.iter().min().unwrap() <= 1, "{totals:?}");

            order.iter().for_each(|&index| uses[index as usize] += 1);
            for class in 0..4 {
                let of_class = || uses.iter().zip(&labels).filter(|(_, label)| **label == class).map(|(uses, _)| *uses);
                assert!(of_class().max().unwrap() - of_class().min().unwrap() <= 1, "after epoch {number}: {uses:?}");
            }
            let mut draws: Vec<_> = order.iter().zip(&rounds).collect();
            draws.sort();
            draws.dedup();
            assert_eq!(draws.len(), 26, "two draws of one sample have different rounds");
        }
    }

    /// An epoch draws four of each class, so every third begins with a new order of the class of six.
    #[test]
    fn each_cycle_through_a_class_has_its_own_order() {
        let set = labelled(2, &[0, 0, 0, 0, 0, 0, 1, 1]);
        let first_four = |cycle: u32| {
            let (order, _) = epoch(&set, raw::Sampler::Balanced, 9, 3 * cycle);
            order.into_iter().filter(|&index| index < 6).collect::<BTreeSet<u32>>()
        };
        let seen: BTreeSet<BTreeSet<u32>> = (0..20).map(first_four).collect();
        assert!(seen.len() > 5, "{} of the 15 ways", seen.len());
    }

    /// The classes must come mixed: over many epochs each position sees every class about as often.
    #[test]
    fn balanced_epochs_are_shuffled() {
        let set = labelled(2, &[0, 1, 1, 1, 1, 1, 1, 1]);
        let mut zeros = [0; 8];
        for number in 0..800 {
            let (order, _) = epoch(&set, raw::Sampler::Balanced, 1, number);
            zeros.iter_mut().zip(&order).for_each(|(zeros, &index)| *zeros += usize::from(index == 0));
        }
        assert!(zeros.iter().all(|count| (330..470).contains(count)), "{zeros:?}");
    }

    /// The order is that of a set whose classes are only those that occur.
    #[test]
    fn a_class_without_samples_has_no_share() {
        let (gaps, dense) = (labelled(1000, &[1, 4, 4, 4, 7, 7]), labelled(3, &[0, 1, 1, 1, 2, 2]));
        for number in 0..5 {
            let found = epoch(&gaps, raw::Sampler::Balanced, 6, number);
            assert_eq!(found, epoch(&dense, raw::Sampler::Balanced, 6, number));
            let mut classes: Vec<u32> = found.0.iter().map(|&index| gaps.label(index as usize)).collect();
            classes.sort();
            assert_eq!(classes, [1, 1, 4, 4, 7, 7], "epoch {number}");
        }
    }
}
