//! Sums in bf16, for which MPI has no type: values travel as words of 16 bits, and an operation of our own adds them, each
//! addition in f32 and rounded to the nearest bf16. Half the bytes of f32. Each of the N terms and of the N - 1 additions is
//! rounded once, by 2^-9 of its value at most.

use crate::error::Result;
use crate::launch::mpi::{check, null};
use crate::model::kernels::convert::{narrow, nearest, wide, widen};
use crate::model::simd::vectorized;
use ::mpi::ffi;
use half::bf16;
use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::ops::Range;

/// What goes out and what comes in, at places of equal length. Never freed: after a failure MPI may still write there.
pub struct Rounded {
    add: ffi::MPI_Op,
    terms: ManuallyDrop<Vec<bf16>>,
    sums: ManuallyDrop<Vec<bf16>>,
    place_len: usize,
}

impl Rounded {
    pub fn new(places: usize, place_len: usize) -> Result<Rounded> {
        const COMMUTATIVE: c_int = 1;
        let buffer = || ManuallyDrop::new(vec![bf16::ZERO; places * place_len]);
        // SAFETY: a plain handle, written before it is used.
        let mut add_op: ffi::MPI_Op = unsafe { std::mem::zeroed() };
        // SAFETY: the function lives as long as the program.
        let code = unsafe { ffi::MPI_Op_create(Some(add), COMMUTATIVE, &mut add_op) };
        check(code, "making an operation for sums in bf16")?;
        Ok(Rounded { add: add_op, terms: buffer(), sums: buffer(), place_len })
    }

    /// Begins the sum over ranks of `values`, for `root`. Until the request is complete, MPI has this place.
    pub fn reduce(
        &mut self,
        place: usize,
        values: &[f32],
        root: c_int,
        comm: ffi::MPI_Comm,
    ) -> Result<ffi::MPI_Request> {
        let at = self.at(place, values.len());
        narrow(values, &mut self.terms[at.clone()]);
        let (terms, sums) = (self.terms[at.clone()].as_ptr().cast(), self.sums[at].as_mut_ptr().cast());
        let (count, mut request) = (values.len() as c_int, null());
        // SAFETY: both buffers have `count` words at this place and are never freed.
        let code =
            unsafe { ffi::MPI_Ireduce(terms, sums, count, ffi::RSMPI_UINT16_T, self.add, root, comm, &mut request) };
        check(code, "reducing in bf16").map(|()| request)
    }

    /// On the root, once the request is complete.
    pub fn take_sums(&self, place: usize, into: &mut [f32]) {
        widen(&self.sums[self.at(place, into.len())], into);
    }

    fn at(&self, place: usize, len: usize) -> Range<usize> {
        place * self.place_len..place * self.place_len + len
    }
}

/// sums = sums + terms, both (count). MPI calls it (MPI 4.0, 6.9.5); nothing in it can panic.
///
/// # Safety
/// Both have `count` values, and nobody else touches them.
unsafe extern "C" fn add(terms: *mut c_void, sums: *mut c_void, count: *mut c_int, _: *mut ffi::MPI_Datatype) {
    // SAFETY: the caller's promise.
    let count = usize::try_from(unsafe { *count }).unwrap_or(0);
    if count == 0 {
        return;
    }
    // SAFETY: the caller's promise.
    let (terms, sums) = unsafe {
        (std::slice::from_raw_parts(terms.cast::<bf16>(), count), std::slice::from_raw_parts_mut(sums.cast(), count))
    };
    vectorized(
        #[inline(always)]
        || {
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum = nearest(wide(*sum) + wide(*term));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of(a: f32, b: f32) -> f32 {
        let (mut terms, mut sums, mut count) = ([bf16::from_f32(a)], [bf16::from_f32(b)], 1);
        // SAFETY: one value each.
        unsafe { add(terms.as_mut_ptr().cast(), sums.as_mut_ptr().cast(), &mut count, std::ptr::null_mut()) };
        sums[0].to_f32()
    }

    #[test]
    fn sums_are_rounded_to_the_nearest_even() {
        const ULP: f32 = 1.0 / 128.0;
        assert_eq!(sum_of(1.0, 0.25 * ULP), 1.0);
        assert_eq!(sum_of(1.0, 0.5 * ULP), 1.0);
        assert_eq!(sum_of(1.0, 0.75 * ULP), 1.0 + ULP);
        assert_eq!(sum_of(1.0 + ULP, 0.5 * ULP), 1.0 + 2.0 * ULP);
        assert_eq!(sum_of(-1.0, -0.5 * ULP), -1.0);
    }

    #[test]
    fn what_is_at_the_ends_of_the_range_stays_there() {
        let (least, greatest) = (f32::from_bits(1 << 16), bf16::MAX.to_f32());
        assert_eq!(sum_of(least, least), 2.0 * least, "subnormal");
        assert_eq!(sum_of(greatest, greatest), f32::INFINITY);
        assert_eq!(sum_of(f32::INFINITY, -greatest), f32::INFINITY);
        assert!(sum_of(f32::INFINITY, f32::NEG_INFINITY).is_nan());
        assert!(sum_of(f32::NAN, 1.0).is_nan());
    }
}
