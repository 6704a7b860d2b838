//! Counter-based random numbers: every draw is a pure function of what it is for.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). A stream is
//! keyed by (seed, purpose) and counted by (epoch, index, draw), so a value never depends on the number of ranks, of
//! threads, on time, or on what was drawn before. That is what makes a resumed run equal to an uninterrupted one.

use crate::model::kernels::math;
use crate::model::simd::vectorized;

/// What a random number is for. Two purposes never share a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial parameters: epoch = number of the parameter; its elements in canonical order.
    Init = 1,
    /// The order of samples in an epoch.
    Shuffle = 2,
    /// Augmentation of one sample: index = sample.
    Augment = 3,
    /// Dropout: epoch = layer, index = position of the sample in the run.
    Dropout = 4,
    /// Procedural data: index = sample.
    Synthetic = 5,
    /// The validation split.
    Split = 6,
    /// Test inputs and benchmarks.
    Test = 7,
    /// The order of a class's samples where classes are balanced: epoch = class, index = cycle through them.
    Balance = 8,
}

/// One stream of draws. Copying it copies its position.
#[derive(Clone, Debug)]
pub struct Rng {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// The stream for sample or element `index` of `epoch`.
    pub fn new(seed: u64, purpose: Purpose, epoch: u32, index: u64) -> Self {
        Rng {
            key: Rng::key(seed, purpose),
            counter: [0, index as u32, (index >> 32) as u32, epoch],
            block: [0; 4],
            used: 4,
        }
    }

    /// What Philox is keyed with, for kernels that count for themselves.
    pub fn key(seed: u64, purpose: Purpose) -> [u32; 2] {
        let seed = seed ^ (purpose as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        [seed as u32, (seed >> 32) as u32]
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// As many calls of `next_u32` as there are words, several blocks at a time.
    pub fn fill(&mut self, words: &mut [u32]) {
        let begun = words.len().min(4 - self.used);
        let (first, rest) = words.split_at_mut(begun);
        first.fill_with(|| self.next_u32());
        let mut wide = rest.chunks_exact_mut(4 * LANES);
        for words in &mut wide {
            vectorized(
                #[inline(always)]
                || philox_lanes(self.counter, self.key, words),
            );
            self.counter[0] = self.counter[0].wrapping_add(LANES as u32);
        }
        wide.into_remainder().fill_with(|| self.next_u32());
    }

    /// Uniform in [0, 1), with 24 bits.
    pub fn uniform(&mut self) -> f32 {
        unit(self.next_u32())
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Uniform in 0..n by multiplication (Lemire 2019, without the rejection: the bias is below n / 2^32).
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        box_muller(self.next_u32(), self.next_u32())[0]
    }

    /// Uniform values in [low, high), as single draws give them.
    pub fn fill_range(&mut self, low: f32, high: f32, values: &mut [f32]) {
        let mut words = [0; BLOCK];
        for values in values.chunks_mut(BLOCK) {
            let words = &mut words[..values.len()];
            self.fill(words);
            values.iter_mut().zip(words).for_each(|(value, word)| *value = low + (high - low) * unit(*word));
        }
    }

    /// Normal values of mean 0. Each is written once and not read, so that several ranks may write the same ones.
    pub fn fill_normal(&mut self, std: f32, values: &mut [f32]) {
        let (mut words, mut block) = ([0; BLOCK], [0.0; BLOCK]);
        for values in values.chunks_mut(BLOCK) {
            self.fill(&mut words);
            vectorized(
                #[inline(always)]
                || {
                    for i in 0..BLOCK / 2 {
                        let pair = box_muller(words[i], words[BLOCK / 2 + i]);
                        [block[i], block[BLOCK / 2 + i]] = [std * pair[0], std * pair[1]];
                    }
                },
            );
            values.copy_from_slice(&block[..values.len()]);
        }
    }
}

/// Words of which `Rng` makes values together.
const BLOCK: usize = 256;

/// A value in [0, 1) from a word's upper 24 bits.
#[inline(always)]
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// Two independent standard normal values from two words (Box and Muller 1958).
#[inline(always)]
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let radius = (-2.0 * math::ln(1.0 - unit(a))).sqrt();
    let (sin, cos) = math::sin_cos_of_turns(unit(b));
    [radius * cos, radius * sin]
}

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox on one counter block.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * MULTIPLIERS[0];
        let b = u64::from(counter[2]) * MULTIPLIERS[1];
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Blocks that `Rng::fill` computes together: as many as AVX2 has 32-bit lanes, so that a lane's block is a vector's.
const LANES: usize = 8;

/// `philox` for `LANES` consecutive counters, block after block.
#[inline(always)]
fn philox_lanes(counter: [u32; 4], mut key: [u32; 2], words: &mut [u32]) {
    let mut lanes = counter.map(|word| [word; LANES]);
    for (lane, word) in lanes[0].iter_mut().enumerate() {
        *word = word.wrapping_add(lane as u32);
    }
    for _ in 0..10 {
        let [c0, c1, c2, c3] = lanes;
        for i in 0..LANES {
            let a = u64::from(c0[i]) * MULTIPLIERS[0];
            let b = u64::from(c2[i]) * MULTIPLIERS[1];
            lanes[0][i] = (b >> 32) as u32 ^ c1[i] ^ key[0];
            lanes[1][i] = b as u32;
            lanes[2][i] = (a >> 32) as u32 ^ c3[i] ^ key[1];
            lanes[3][i] = a as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    for (i, block) in words.chunks_exact_mut(4).enumerate() {
        block.copy_from_slice(&[lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (kat_vectors).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn filling_gives_the_words_of_single_draws() {
        for (begun, len) in [(0, 0), (0, 3), (1, 31), (3, 32), (2, 64), (0, 100), (3, 333)] {
            // Close to the counter's end, so that lanes wrap.
            let mut one = Rng::new(5, Purpose::Test, 3, 1 << 40);
            one.counter[0] = u32::MAX - 5;
            (0..begun).for_each(|_| _ = one.next_u32());
            let (mut other, mut words) = (one.clone(), vec![0; len]);
            other.fill(&mut words);
            assert_eq!(words, (0..len).map(|_| one.next_u32()).collect::<Vec<_>>(), "{len} after {begun}");
            assert_eq!(other.next_u32(), one.next_u32(), "after {len}");
        }
    }

    #[test]
    fn filling_a_range_gives_the_values_of_single_draws() {
        for len in [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 7] {
            let mut one = Rng::new(5, Purpose::Test, 3, 9);
            let (mut other, mut values) = (one.clone(), vec![f32::NAN; len]);
            other.fill_range(-0.5, 2.0, &mut values);
            assert_eq!(values, (0..len).map(|_| one.range(-0.5, 2.0)).collect::<Vec<_>>(), "{len}");
        }
    }

    #[test]
    fn streams_differ_by_every_part_of_their_name_and_have_the_right_moments() {
        let first = |seed, purpose, epoch, index| Rng::new(seed, purpose, epoch, index).next_u32();
        let base = first(1, Purpose::Init, 0, 0);
        assert_ne!(base, first(2, Purpose::Init, 0, 0));
        assert_ne!(base, first(1, Purpose::Shuffle, 0, 0));
        assert_ne!(base, first(1, Purpose::Init, 1, 0));
        assert_ne!(base, first(1, Purpose::Init, 0, 1));

        let mut rng = Rng::new(7, Purpose::Test, 0, 0);
        let one_by_one: Vec<f32> = (0..100_000).map(|_| rng.normal()).collect();
        let mut filled = vec![0.0; 100_000];
        rng.fill_normal(0.25, &mut filled);
        filled.iter_mut().for_each(|draw| *draw *= 4.0);
        for draws in [one_by_one, filled] {
            // Expectations of a standard normal's powers; neighbours, and a block's halves, have nothing to do with each other.
            let mean = |f: &dyn Fn(usize) -> f32| (0..99_000).map(|i| f64::from(f(i))).sum::<f64>() / 99_000.0;
            let powers = [1, 2, 3, 4].map(|n| mean(&|i| draws[i].powi(n)));
            assert!(powers.iter().zip([0.0, 1.0, 0.0, 3.0]).all(|(x, y)| (x - y).abs() < 0.06), "{powers:?}");
            let products = [1, 2, BLOCK / 2].map(|apart| mean(&|i| draws[i] * draws[i + apart]));
            assert!(products.iter().all(|x| x.abs() < 0.02), "{products:?}");
        }
        assert!((0..1000).all(|_| rng.below(7) < 7));
    }
}
