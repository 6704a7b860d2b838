use super::threshold_and_scale;
use crate::error::Result;
use crate::model::simd::vectorized;
use crate::model::{Backward, Forward, Layer, Pass, Shape};
use crate::rng::{Purpose, Rng};
use rayon::prelude::*;

pub struct Dropout {
    values: usize,
    seed: u64,
    layer: u32,
    threshold: u32,
    scale: f32,
}

impl Dropout {
    pub fn new(input: Shape, rate: f32, seed: u64, layer: usize) -> Self {
        let (threshold, scale) = threshold_and_scale(rate);
        Dropout { values: input.len(), seed, layer: layer as u32, threshold, scale }
    }

    /// Backward is the same product as forward.
    fn mask(&self, first_sample: u64, from: &[f32], to: &mut [f32]) {
        let samples = (to.par_chunks_exact_mut(self.values), from.par_chunks_exact(self.values)).into_par_iter();
        samples.enumerate().for_each(|(number, (to, from))| {
            let rng = Rng::new(self.seed, Purpose::Dropout, self.layer, first_sample + number as u64);
            mask_sample(rng, self.threshold, self.scale, from, to);
        });
    }
}

impl Layer for Dropout {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let (x, y) = (io.inputs[0].f32(), io.output.f32());
        if pass.training {
            self.mask(pass.first_sample, x, y);
        } else {
            y.copy_from_slice(x);
        }
        Ok(())
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        self.mask(pass.first_sample, io.grad_output.f32(), io.grad_inputs[0].f32());
        Ok(())
    }
}

/// from (H*W*C), to (H*W*C). One draw of 32 bits decides two values, the low half the first, so a Philox block decides
/// eight.
fn mask_sample(mut rng: Rng, threshold: u32, scale: f32, from: &[f32], to: &mut [f32]) {
    const DRAWS: usize = 256;
    let mut draws = [0; DRAWS];
    for (to, from) in to.chunks_mut(2 * DRAWS).zip(from.chunks(2 * DRAWS)) {
        let draws = &mut draws[..to.len().div_ceil(2)];
        rng.fill(draws);
        vectorized(
            #[inline(always)]
            || mask_values(draws, threshold, scale, from, to),
        );
    }
}

#[inline(always)]
fn mask_values(draws: &[u32], threshold: u32, scale: f32, from: &[f32], to: &mut [f32]) {
    let keep = |draw: u32, value: f32| if draw < threshold { 0.0 } else { value * scale };
    let (mut to, mut from) = (to.chunks_exact_mut(2), from.chunks_exact(2));
    for ((to, from), draw) in (&mut to).zip(&mut from).zip(draws) {
        to[0] = keep(draw & 0xFFFF, from[0]);
        to[1] = keep(draw >> 16, from[1]);
    }
    if let ([to], [from], Some(draw)) = (to.into_remainder(), from.remainder(), draws.last()) {
        *to = keep(draw & 0xFFFF, *from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_half_a_draw_of_its_samples_stream() {
        for (values, layer) in [(1, 0), (7, 3), (512, 1), (1301, 2)] {
            let x: Vec<f32> = (1..=3 * values).map(|i| i as f32).collect();
            let mut y = vec![f32::NAN; x.len()];
            Dropout::new(Shape::vector(values), 0.25, 11, layer).mask(70, &x, &mut y);
            for (sample, (x, y)) in x.chunks(values).zip(y.chunks(values)).enumerate() {
                let mut rng = Rng::new(11, Purpose::Dropout, layer as u32, 70 + sample as u64);
                let halves =
                    std::iter::repeat_with(|| rng.next_u32()).flat_map(|draw| [draw as u16, (draw >> 16) as u16]);
                let expected = x.iter().zip(halves).map(|(x, half)| if half < 0x4000 { 0.0 } else { x * (4.0 / 3.0) });
                assert!(y.iter().copied().eq(expected), "sample {sample} of {values} values in layer {layer}");
            }
        }
    }
}
