//! Wide instructions without a wide binary: the release build runs on any x86-64, its hot loops use AVX2 where the CPU
//! has it. The compiler vectorises a loop for the features of the function around it, so a loop is put into a closure
//! and inlined once into a function with AVX2 and once into one without. Nothing is reordered: both give equal bits.

/// Runs `body`, compiled for AVX2 and FMA where the CPU has them. Mark the closure and what it calls
/// `#[inline(always)]`, and write `for` loops: a call that stays a call, such as an iterator's `for_each`, keeps the narrow
/// instructions.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn wide<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has what `wide` is compiled for.
            return unsafe { wide(body) };
        }
    }
    body()
}

/// Asks for the cache line of `data[at]`, which may lie outside, ahead of its use.
#[inline(always)]
pub fn prefetch(data: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetching has no effect but on the cache, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().wrapping_add(at).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at);
}
