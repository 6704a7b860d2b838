//! The parameters in memory: in f32, as the optimizer trains them and checkpoints hold them, and for nets in bf16 a copy
//! that is rounded, which the matrix work reads. Whoever writes parameters brings the copy up to date: the optimizer block
//! by block, while what it wrote is in the cache, so that the copy costs memory its own 2 bytes a parameter and no more.

use super::kernels::convert;
use super::precision::{self, Precision};
use crate::device::Arena;
use crate::error::Result;
use std::ops::Range;

pub struct Weights {
    pub f32: Arena,
    /// `f32` rounded, element for element; nothing where layers read f32.
    pub bf16: Arena,
}

impl Weights {
    /// For `len` parameters, in memory that `allocate` makes of so many bytes.
    pub fn new(len: usize, precision: Precision, mut allocate: impl FnMut(usize) -> Result<Arena>) -> Result<Weights> {
        let mut of = |precision: Precision| {
            let what = format!("{len} parameters of {} bytes", precision.bytes());
            allocate(len * precision.bytes()).map_err(|e| e.context(what))
        };
        Ok(Weights {
            f32: of(Precision::F32)?,
            bf16: match precision {
                Precision::F32 => Arena::host(0)?,
                Precision::Bf16 => of(Precision::Bf16)?,
            },
        })
    }

    /// `values` were just written at element `start`: rounds them into the copy, on the calling thread.
    ///
    /// # Safety
    /// Nobody else touches the copy there meanwhile.
    pub unsafe fn round(&self, start: usize, values: &[f32]) {
        if self.bf16.bytes() > 0 {
            // SAFETY: the caller's promise.
            convert::narrow(values, unsafe { self.bf16_mut(start..start + values.len()) });
        }
    }

    /// The same for elements wherever they were written, on all threads.
    ///
    /// # Safety
    /// Nobody else touches the copy there, or writes these elements, meanwhile.
    pub unsafe fn round_all(&self, elements: Range<usize>) {
        if self.bf16.bytes() > 0 {
            // SAFETY: the caller's promise.
            let values = unsafe { self.f32.slice(Precision::F32.bytes_of(&elements)) }.f32();
            // SAFETY: the caller's promise.
            precision::narrow(values, unsafe { self.bf16_mut(elements) });
        }
    }

    /// # Safety
    /// Nobody else touches the copy there during the returned lifetime.
    unsafe fn bf16_mut<'a>(&self, elements: Range<usize>) -> &'a mut [half::bf16] {
        // SAFETY: the caller's promise.
        unsafe { self.bf16.slice_mut(Precision::Bf16.bytes_of(&elements)) }.into_bf16()
    }
}
