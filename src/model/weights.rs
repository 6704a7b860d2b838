//! The parameters in memory: in f32, as the optimizer trains them and checkpoints hold them, and for nets in 16 bits a copy
//! that is rounded, which the matrix work reads. Whoever writes parameters brings the copy up to date: the optimizer block
//! by block, while what it wrote is in the cache, so that the copy costs memory its own 2 bytes a parameter and no more.

use super::elementwise::Elementwise;
use super::kernels::convert;
use super::precision::Precision;
use crate::device::Arena;
use crate::error::Result;
use std::borrow::Cow;
use std::ops::Range;

pub struct Weights {
    pub f32: Arena,
    /// `f32` rounded, element for element; nothing where layers read f32.
    pub rounded: Arena,
    /// Of the copy, or f32.
    pub precision: Precision,
    elementwise: Elementwise,
}

impl Weights {
    /// For `len` parameters, in memory that `allocate` makes of so many bytes.
    pub fn new(len: usize, precision: Precision, mut allocate: impl FnMut(usize) -> Result<Arena>) -> Result<Weights> {
        let mut of = |precision: Precision| {
            let what = format!("{len} parameters of {} bytes", precision.bytes());
            allocate(len * precision.bytes()).map_err(|e| e.context(what))
        };
        let f32 = of(Precision::F32)?;
        let rounded = match precision {
            Precision::F32 => Arena::host(0)?,
            precision => of(precision)?,
        };
        let elementwise = Elementwise::new(f32.place(), precision)?;
        Ok(Weights { f32, rounded, precision, elementwise })
    }

    /// All parameters in f32, for the CPU to read.
    ///
    /// # Safety
    /// Nobody writes them meanwhile.
    pub unsafe fn to_host(&self) -> Result<Cow<'_, [f32]>> {
        // SAFETY: the caller's promise.
        self.elementwise.to_host(unsafe { self.f32.slice(0..self.f32.bytes()) })
    }

    /// Lends all parameters to the CPU for writing, and brings the copy up to date.
    ///
    /// # Safety
    /// Nobody else touches them meanwhile.
    pub unsafe fn edit<T>(&self, edit: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
        // SAFETY: the caller's promise.
        unsafe {
            let result = self.elementwise.edit(self.f32.slice_mut(0..self.f32.bytes()), edit)?;
            self.round_all(0..self.f32.bytes() / size_of::<f32>())?;
            Ok(result)
        }
    }

    /// `values` were just written at element `start`: rounds them into the copy, on the calling thread.
    ///
    /// # Safety
    /// Nobody else touches the copy there meanwhile.
    pub unsafe fn round(&self, start: usize, values: &[f32]) {
        if self.rounded.bytes() > 0 {
            // SAFETY: the caller's promise.
            convert::narrow(values, unsafe { self.bf16_mut(start..start + values.len()) });
        }
    }

    /// The same for elements wherever they were written; on all threads, or in the compute stream of the GPU where they are.
    ///
    /// # Safety
    /// Nobody else touches the copy there, or writes these elements, meanwhile.
    pub unsafe fn round_all(&self, elements: Range<usize>) -> Result<()> {
        if self.rounded.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            let values = self.f32.slice(Precision::F32.bytes_of(&elements));
            self.elementwise.narrow(values, self.rounded.slice_mut(self.precision.bytes_of(&elements)))
        }
    }

    /// # Safety
    /// Nobody else touches the copy there during the returned lifetime.
    unsafe fn bf16_mut<'a>(&self, elements: Range<usize>) -> &'a mut [half::bf16] {
        // SAFETY: the caller's promise.
        unsafe { self.rounded.slice_mut(Precision::Bf16.bytes_of(&elements)) }.into_bf16()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Values that bf16 does not hold, more than a thread rounds at once.
    #[test]
    fn the_copy_follows_where_parameters_are_written_and_nowhere_else() {
        let len = 10_007;
        let weights = Weights::new(len, Precision::Bf16, Arena::host).unwrap();
        let values: Vec<f32> = (0..len).map(|i| i as f32 * 0.37 - 1000.0).collect();
        // SAFETY: there is no other thread.
        unsafe { weights.f32.slice_mut(0..weights.f32.bytes()) }.into_f32().copy_from_slice(&values);
        for (range, in_one_piece) in
            [(3..3, true), (5..46, true), (9000..len, true), (40..8999, false), (0..len, false)]
        {
            // SAFETY: as above.
            unsafe {
                weights.rounded.slice_mut(0..weights.rounded.bytes()).into_bf16().fill(bf16::NAN);
                match in_one_piece {
                    true => weights.round(range.start, &values[range.clone()]),
                    false => weights.round_all(range.clone()).unwrap(),
                }
            }
            // SAFETY: as above.
            let copy = unsafe { weights.rounded.slice(0..weights.rounded.bytes()) }.bf16();
            for (i, (found, value)) in copy.iter().zip(&values).enumerate() {
                let right = if range.contains(&i) { *found == bf16::from_f32(*value) } else { found.is_nan() };
                assert!(right, "{i} of {range:?}: {found}");
            }
        }
    }
}
