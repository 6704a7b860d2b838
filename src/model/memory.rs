//! The memory plan: buffers whose lifetimes do not meet share bytes.

use std::cmp::Reverse;

/// A buffer that exists from time `from` up to and including time `to`.
#[derive(Clone, Copy, Debug)]
pub struct Lifetime {
    pub bytes: usize,
    pub from: usize,
    pub to: usize,
}

/// Where every buffer goes, and how much memory that takes.
#[derive(Debug)]
pub struct MemoryPlan {
    pub offsets: Vec<usize>,
    pub bytes: usize,
}

/// First fit, in two orders, of which the one that takes less memory holds: the largest buffer first, and the one that lives
/// longest, in whose gaps short-lived ones find a place. At most a few hundred buffers, so the quadratic search is done before
/// one can notice.
pub fn plan(buffers: &[Lifetime], align: usize) -> MemoryPlan {
    let life = |i: usize| buffers[i].to - buffers[i].from;
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (Reverse(buffers[i].bytes), i));
    let largest_first = first_fit(buffers, &order, align);
    order.sort_by_key(|&i| (Reverse(life(i)), Reverse(buffers[i].bytes), i));
    let longest_first = first_fit(buffers, &order, align);
    if longest_first.bytes < largest_first.bytes { longest_first } else { largest_first }
}

/// Each goes to the lowest offset at which no buffer alive at the same time lies.
fn first_fit(buffers: &[Lifetime], order: &[usize], align: usize) -> MemoryPlan {
    let mut offsets = vec![0; buffers.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for &i in order {
        let buffer = buffers[i];
        let mut taken: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| buffers[j].from <= buffer.to && buffer.from <= buffers[j].to)
            .map(|&j| (offsets[j], offsets[j] + buffers[j].bytes))
            .collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if offset + buffer.bytes <= start {
                break;
            }
            offset = offset.max(end.next_multiple_of(align));
        }
        offsets[i] = offset;
        total = total.max(offset + buffer.bytes);
        placed.push(i);
    }
    MemoryPlan { offsets, bytes: total }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_chain_needs_its_two_largest_neighbours() {
        let chain = [
            Lifetime { bytes: 100, from: 0, to: 1 },
            Lifetime { bytes: 300, from: 1, to: 2 },
            Lifetime { bytes: 200, from: 2, to: 3 },
            Lifetime { bytes: 50, from: 3, to: 4 },
        ];
        assert_eq!(plan(&chain, 1).bytes, 500);
    }

    #[test]
    fn the_better_of_two_orders_holds() {
        let of = |buffers: &[(usize, usize, usize)]| {
            let lifetimes: Vec<Lifetime> =
                buffers.iter().map(|&(bytes, from, to)| Lifetime { bytes, from, to }).collect();
            plan(&lifetimes, 1).bytes
        };
        assert_eq!(of(&[(40, 0, 0), (30, 0, 3), (30, 1, 3), (30, 1, 2)]), 90, "100 if the largest comes first");
        assert_eq!(of(&[(10, 0, 2), (20, 0, 2), (50, 0, 0), (20, 1, 3)]), 80, "100 if the longest comes first");
    }

    proptest! {
        #[test]
        fn buffers_alive_together_never_overlap(raw in prop::collection::vec((0usize..500, 0usize..20, 0usize..20), 0..40)) {
            let buffers: Vec<Lifetime> =
                raw.iter().map(|&(bytes, a, b)| Lifetime { bytes, from: a.min(b), to: a.max(b) }).collect();
            let plan = plan(&buffers, 64);
            for (i, a) in buffers.iter().enumerate() {
                prop_assert!(plan.offsets[i].is_multiple_of(64) && plan.offsets[i] + a.bytes <= plan.bytes);
                for (j, b) in buffers.iter().enumerate().skip(i + 1) {
                    let together = a.from <= b.to && b.from <= a.to && a.bytes > 0 && b.bytes > 0;
                    let (x, y) = (plan.offsets[i], plan.offsets[j]);
                    prop_assert!(!together || x + a.bytes <= y || y + b.bytes <= x);
                }
            }
        }
    }
}
