//! The one order in which values of several ranks are added: a pairwise tree over ranks (`split`).
//!
//! Sums go block by block: a block of every rank is read once, the partial sums of the tree stay in the first-level
//! cache, and the result is written once. So memory sees N reads and the writes, whatever the depth of the tree.

use super::split;
use std::ops::Range;

/// Values a block: 4 KiB, so that log2 N partial sums fit the first-level cache.
const BLOCK: usize = 1024;

/// `out[i] = ` the tree over k in 0..n of `input(k)[i]`. Every input has at least `out`'s length.
pub fn tree<'a>(n: usize, input: impl Fn(usize) -> &'a [f32] + Copy, out: &mut [f32]) {
    for (number, block) in out.chunks_mut(BLOCK).enumerate() {
        let range = number * BLOCK..number * BLOCK + block.len();
        tree_block(0..n, &|_| 1, &|k| &input(k)[range.clone()], block);
    }
}

/// The tree over k of the values in `range` of the buffer at `addresses[k]`, written back to the buffers `into`.
///
/// # Safety
/// The values are valid and aligned, the buffers disjoint, and nobody else touches `range` of them meanwhile.
pub unsafe fn tree_in_place(addresses: &[usize], range: Range<usize>, into: Range<usize>) {
    // SAFETY: the caller's promise; no two of the borrows made below meet.
    let buffer = |k: usize, range| unsafe { values_mut(addresses[k], range) };
    if addresses.len() == 2 && into == (0..2) {
        return pair_into_both(buffer(0, range.clone()), buffer(1, range));
    }
    let mut sum = [0.0; BLOCK];
    for start in range.clone().step_by(BLOCK) {
        let block = start..(start + BLOCK).min(range.end);
        let sum = &mut sum[..block.len()];
        tree_block(0..addresses.len(), &|_| 1, &|k| buffer(k, block.clone()), sum);
        into.clone().for_each(|k| buffer(k, block.clone()).copy_from_slice(sum));
    }
}

/// A subtree that is added up already.
#[derive(Clone, Copy, Debug)]
pub struct Subtree {
    pub ranks: usize,
    /// Of its sums, f32.
    pub address: usize,
}

/// The rest of the tree over `count` values of each of `subtrees`, which are all of it in order, written to the addresses
/// `into`; these may be some of the subtrees' own.
///
/// # Safety
/// The values are valid and aligned, the buffers disjoint, and nobody else touches them meanwhile.
pub unsafe fn join_subtrees(subtrees: &[Subtree], count: usize, into: &[usize]) {
    let mut sum = [0.0; BLOCK];
    for start in (0..count).step_by(BLOCK) {
        let block = start..(start + BLOCK).min(count);
        let sum = &mut sum[..block.len()];
        // SAFETY: the caller's promise; the borrows of the subtrees end before the writing begins.
        let input = |k: usize| unsafe { values(subtrees[k].address, block.clone()) };
        tree_block(0..subtrees.len(), &|k| subtrees[k].ranks, &input, sum);
        // SAFETY: the caller's promise.
        into.iter().for_each(|&address| unsafe { values_mut(address, block.clone()) }.copy_from_slice(sum));
    }
}

/// Values that `tree_to` gives away at once: 16 KiB, still in the first-level cache when `update` reads them, and long enough
/// that the call does not count.
const PIECE: usize = 4 * BLOCK;

/// Values that a thread takes on at least where a team shares the work: a few times what handing over costs.
const TASK: usize = 16 * PIECE;

/// The tree over k of the values in `range` of the buffer at `addresses[k]`, piece by piece to `update(range, sums)`. Inside
/// a team (a rayon pool) all of its threads take part.
///
/// # Safety
/// The values are valid and aligned, and nobody writes `range` of them meanwhile.
pub unsafe fn tree_to(addresses: &[usize], range: Range<usize>, update: &(dyn Fn(Range<usize>, &mut [f32]) + Sync)) {
    if range.len() > TASK && rayon::current_thread_index().is_some() {
        let middle = range.start + (range.len() / 2).next_multiple_of(PIECE);
        rayon::join(
            // SAFETY: the caller's promise.
            || unsafe { tree_to(addresses, range.start..middle, update) },
            // SAFETY: the caller's promise.
            || unsafe { tree_to(addresses, middle..range.end, update) },
        );
        return;
    }
    let mut sums = [0.0; PIECE];
    for start in range.clone().step_by(PIECE) {
        let piece = start..(start + PIECE).min(range.end);
        let sums = &mut sums[..piece.len()];
        // SAFETY: the caller's promise.
        tree(addresses.len(), |k| unsafe { values(addresses[k], piece.clone()) }, sums);
        update(piece, sums);
    }
}

/// The tree over these inputs, of which input k holds the sum over `ranks(k)` ranks, for at most a block of values. All
/// inputs have `out`'s length.
fn tree_block<'a>(
    inputs: Range<usize>,
    ranks: &impl Fn(usize) -> usize,
    input: &impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
) {
    let Range { start, end } = inputs;
    match inputs.len() {
        1 => out.copy_from_slice(input(start)),
        2 => add(input(start), input(start + 1), out),
        _ => {
            let mut left = split(inputs.map(ranks).sum());
            let mut middle = start;
            while left > 0 {
                left -= ranks(middle);
                middle += 1;
            }
            let mut right = [0.0; BLOCK];
            let right = &mut right[..out.len()];
            tree_block(start..middle, ranks, input, out);
            tree_block(middle..end, ranks, input, right);
            add_assign(out, right);
        }
    }
}

fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
    vectorised((a, b, out), |(a, b, out)| {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = a + b;
        }
    });
}

fn add_assign(left: &mut [f32], right: &[f32]) {
    vectorised((left, right), |(left, right)| {
        for (left, right) in left.iter_mut().zip(right) {
            *left += right;
        }
    });
}

fn pair_into_both(a: &mut [f32], b: &mut [f32]) {
    vectorised((a, b), |(a, b)| {
        for (a, b) in a.iter_mut().zip(b) {
            *a += *b;
            *b = *a;
        }
    });
}

/// Runs a loop compiled for the widest vectors that this CPU has. Additions are element by element, so the width does
/// not change a bit of the result.
pub fn vectorised<T>(slices: T, kernel: impl FnOnce(T)) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512<T>(slices: T, kernel: impl FnOnce(T)) {
            kernel(slices)
        }
        #[target_feature(enable = "avx2")]
        fn avx2<T>(slices: T, kernel: impl FnOnce(T)) {
            kernel(slices)
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { avx512(slices, kernel) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            return unsafe { avx2(slices, kernel) };
        }
    }
    kernel(slices)
}

/// Values `range` of the buffer at `address`.
///
/// # Safety
/// They are valid and aligned, and nobody writes them during `'a`.
unsafe fn values<'a>(address: usize, range: Range<usize>) -> &'a [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts((address as *const f32).add(range.start), range.len()) }
}

/// Values `range` of the buffer at `address`.
///
/// # Safety
/// They are valid and aligned, and nobody else touches them during `'a`.
pub unsafe fn values_mut<'a>(address: usize, range: Range<usize>) -> &'a mut [f32] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut((address as *mut f32).add(range.start), range.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order written down by hand for a few sizes, with values whose sum depends on it.
    #[test]
    fn sums_follow_the_tree() {
        let x = |k: usize| [1e8f32, 1.0, -1e8, 3.0, 0.5, 7e7, -2.5][k];
        let by_hand = [
            x(0),
            x(0) + x(1),
            (x(0) + x(1)) + x(2),
            (x(0) + x(1)) + (x(2) + x(3)),
            ((x(0) + x(1)) + x(2)) + (x(3) + x(4)),
            ((x(0) + x(1)) + x(2)) + ((x(3) + x(4)) + x(5)),
            ((x(0) + x(1)) + (x(2) + x(3))) + ((x(4) + x(5)) + x(6)),
        ];
        for (n, expected) in by_hand.into_iter().enumerate().map(|(index, sum)| (index + 1, sum)) {
            for len in [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3] {
                let mut inputs: Vec<Vec<f32>> = (0..n).map(|k| vec![x(k); len]).collect();
                let mut out = vec![0.0; len];
                tree(n, |k| &inputs[k], &mut out);
                assert!(out.iter().all(|sum| sum.to_bits() == expected.to_bits()), "n {n}, len {len}");
                let addresses: Vec<usize> = inputs.iter_mut().map(|input| input.as_mut_ptr() as usize).collect();
                // SAFETY: distinct vectors of `len` values.
                unsafe { tree_in_place(&addresses, 0..len, 0..n) };
                assert!(inputs.iter().all(|input| *input == out), "n {n}, len {len}");
            }
        }
    }

    /// Of five ranks, 0 to 2 are one subtree, 3 and 4 are two.
    #[test]
    fn joined_subtrees_are_the_tree() {
        let x = |rank: usize, index: usize| ((rank * 7919 + index * 31) as f32 * 0.618).sin() * 10f32.powi(rank as i32);
        let len = BLOCK + 5;
        let mut first: Vec<f32> = (0..len).map(|index| (x(0, index) + x(1, index)) + x(2, index)).collect();
        let [mut second, mut third]: [Vec<f32>; 2] = [3, 4].map(|rank| (0..len).map(|index| x(rank, index)).collect());
        let ranks: Vec<Vec<f32>> = (0..5).map(|rank| (0..len).map(|index| x(rank, index)).collect()).collect();
        let mut expected = vec![0.0; len];
        tree(5, |rank| &ranks[rank], &mut expected);

        let of = |ranks, buffer: &mut Vec<f32>| Subtree { ranks, address: buffer.as_mut_ptr() as usize };
        let subtrees = [of(3, &mut first), of(1, &mut second), of(1, &mut third)];
        // SAFETY: distinct vectors of `len` values.
        unsafe { join_subtrees(&subtrees, len, &[subtrees[1].address]) };
        assert_eq!(second, expected);
    }
}
