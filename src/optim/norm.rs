//! Sums of squares of tensors that are held in parts, with bits that do not depend on how a tensor was cut.
//!
//! A tensor is a row of lines of 16 elements. Node (k, i) of its tree is the sum over lines i 2^k .. (i + 1) 2^k: over one
//! line in a fixed order, over more the sum of its two halves. Whoever holds lines a..b can compute the greatest nodes that
//! lie in them, at most 2 log2(b - a) of them (`squares`, whose lengths are `nodes`); and whoever has the nodes of all parts
//! joins siblings, until the nodes of the whole tensor are left, whose sum from the right is the result (`Joint`). These
//! are the same nodes and additions wherever the cuts were. All in f64: the squares themselves are exact.

use crate::model::simd::vectorized;

/// Elements of a line; parts of a tensor begin at a multiple of it.
pub const LINE: usize = 16;

/// Lines that are added up in one go: 4 KiB of values.
const BLOCK: usize = 64;

/// Lines that one task handles: 64 KiB, well above the cost of handing a task to another thread.
const TASK: usize = 16 * BLOCK;

/// The lengths, in lines, of the greatest nodes inside lines `first..end`, in order.
pub fn nodes(first: usize, end: usize) -> impl Iterator<Item = usize> {
    let mut next = first;
    std::iter::from_fn(move || {
        let longest = 1 << (end - next).checked_ilog2()?;
        let node = if next == 0 { longest } else { longest.min(1 << next.trailing_zeros()) };
        next += node;
        Some(node)
    })
}

/// The sums of those nodes over the squares of `part`, which begins with line `first` of its tensor. A last line may be short.
pub fn squares(part: &[f32], first: usize) -> impl Iterator<Item = f64> {
    let mut rest = part;
    nodes(first, first + part.len().div_ceil(LINE)).map(move |lines| {
        let (node, after) = rest.split_at(rest.len().min(lines * LINE));
        rest = after;
        sum(node, lines)
    })
}

/// Joins the nodes of all parts of a tensor.
#[derive(Debug)]
pub struct Joint {
    /// Lengths in lines and sums of the nodes that have no sibling yet: each longer than the next.
    nodes: Vec<(usize, f64)>,
}

impl Joint {
    pub fn new() -> Joint {
        // One of every power of two, and one to be joined.
        Joint { nodes: Vec::with_capacity(usize::BITS as usize + 1) }
    }

    /// Takes the next node, from the tensor's first to its last.
    pub fn push(&mut self, mut lines: usize, mut sum: f64) {
        // Of two neighbours of one length the left one is a left child: a right child has been joined when it came.
        while let Some((_, left)) = self.nodes.pop_if(|(left, _)| *left == lines) {
            sum += left;
            lines *= 2;
        }
        self.nodes.push((lines, sum));
    }

    /// The sum over the whole tensor. Empty again afterwards.
    pub fn finish(&mut self) -> f64 {
        self.nodes.drain(..).rev().fold(0.0, |right, (_, left)| left + right)
    }
}

/// The sum of squares of a tensor in one part.
pub fn sum_of_squares(tensor: &[f32]) -> f64 {
    let mut joint = Joint::new();
    nodes(0, tensor.len().div_ceil(LINE)).zip(squares(tensor, 0)).for_each(|(lines, sum)| joint.push(lines, sum));
    joint.finish()
}

/// One node: `lines` is a power of two.
fn sum(values: &[f32], lines: usize) -> f64 {
    if lines <= BLOCK {
        return vectorized(
            #[inline(always)]
            || block(values, lines),
        );
    }
    let (left, right) = values.split_at(lines / 2 * LINE);
    let halves = (|| sum(left, lines / 2), || sum(right, lines / 2));
    let (left, right) = match lines > TASK && rayon::current_thread_index().is_some() {
        true => rayon::join(halves.0, halves.1),
        false => (halves.0(), halves.1()),
    };
    left + right
}

#[inline(always)]
fn block(values: &[f32], lines: usize) -> f64 {
    let mut sums = [0.0; BLOCK];
    for (sum, line) in sums.iter_mut().zip(values.chunks(LINE)) {
        let mut lanes = [0.0; 4];
        for quad in line.chunks(4) {
            for (lane, &value) in lanes.iter_mut().zip(quad) {
                *lane += f64::from(value) * f64::from(value);
            }
        }
        *sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
    let mut width = lines;
    while width > 1 {
        width /= 2;
        for node in 0..width {
            sums[node] = sums[2 * node] + sums[2 * node + 1];
        }
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 % 1013) as f32 - 500.0) * 10f32.powi((i % 11) as i32 - 5)).collect()
    }

    /// Parts that end at any line, in any number, of tensors of any length: always the bits of the whole.
    #[test]
    fn bits_do_not_depend_on_the_cuts() {
        for len in [0, 1, 15, 16, 17, 40, 1000, 4099, 70_001] {
            let tensor = values(len);
            let whole = sum_of_squares(&tensor);
            let plain: f64 = tensor.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((whole - plain).abs() <= 1e-12 * plain, "{len}: {whole}, plainly {plain}");
            let lines = len.div_ceil(LINE);
            for parts in 1..12 {
                let mut joint = Joint::new();
                for part in 0..parts {
                    // Not evenly: the first parts are short.
                    let cut = |part: usize| lines * part * part / (parts * parts);
                    let (first, end) = (cut(part), cut(part + 1));
                    let part = &tensor[(first * LINE).min(len)..(end * LINE).min(len)];
                    let sums: Vec<f64> = squares(part, first).collect();
                    assert_eq!(sums.len(), nodes(first, end).count());
                    nodes(first, end).zip(sums).for_each(|(lines, sum)| joint.push(lines, sum));
                }
                assert_eq!(joint.finish().to_bits(), whole.to_bits(), "{len} values in {parts} parts");
            }
        }
    }

    /// By hand: lines 0..6 are nodes of 4 and 2 lines.
    #[test]
    fn sums_follow_the_tree() {
        let mut tensor = vec![0.0; 6 * LINE];
        let line = [1e8f32, 1.0, 3.0, 1e-8, 7e7, 2.0];
        line.iter().enumerate().for_each(|(i, &x)| tensor[i * LINE] = x);
        let s = line.map(|x| f64::from(x) * f64::from(x));
        assert_eq!(sum_of_squares(&tensor), ((s[0] + s[1]) + (s[2] + s[3])) + (s[4] + s[5]));
        assert_eq!(nodes(5, 23).collect::<Vec<_>>(), [1, 2, 8, 4, 2, 1]);
        assert_eq!(nodes(0, 7).collect::<Vec<_>>(), [4, 2, 1]);
        assert_eq!(nodes(3, 3).count(), 0);
    }
}
