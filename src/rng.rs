//! Counter-based random numbers: every draw is a pure function of what it is for.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). A stream is
//! keyed by (seed, purpose) and counted by (epoch, index, draw), so a value never depends on the number of ranks, of
//! threads, on time, or on what was drawn before. That is what makes a resumed run equal to an uninterrupted one.

/// What a random number is for. Two purposes never share a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial parameters: epoch = number of the parameter, index = element in canonical order.
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
        let seed = seed ^ (purpose as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Rng {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, index as u32, (index >> 32) as u32, epoch],
            block: [0; 4],
            used: 4,
        }
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

    /// Uniform in [0, 1), with 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Uniform in 0..n by multiplication (Lemire 2019, without the rejection: the bias is below n / 2^32).
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// Standard normal (Box and Muller 1958, the cosine half).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * f64::from(1.0 - self.uniform()).ln()).sqrt();
        (radius * (2.0 * std::f64::consts::PI * f64::from(self.uniform())).cos()) as f32
    }
}

/// Ten rounds of Philox on one counter block.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
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
    fn streams_differ_by_every_part_of_their_name_and_have_the_right_moments() {
        let first = |seed, purpose, epoch, index| Rng::new(seed, purpose, epoch, index).next_u32();
        let base = first(1, Purpose::Init, 0, 0);
        assert_ne!(base, first(2, Purpose::Init, 0, 0));
        assert_ne!(base, first(1, Purpose::Shuffle, 0, 0));
        assert_ne!(base, first(1, Purpose::Init, 1, 0));
        assert_ne!(base, first(1, Purpose::Init, 0, 1));

        let mut rng = Rng::new(7, Purpose::Test, 0, 0);
        let draws: Vec<f32> = (0..100_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f32>() / 1e5;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        assert!((0..1000).all(|_| rng.below(7) < 7));
    }
}
