//! The memory plan: buffers whose lifetimes do not meet share bytes.

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

/// First fit, largest buffer first: each goes to the lowest offset at which no buffer alive at the same time lies. At
/// most a few hundred buffers, so the quadratic search is done before one can notice.
pub fn plan(buffers: &[Lifetime], align: usize) -> MemoryPlan {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), i));
    let mut offsets = vec![0; buffers.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for i in order {
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
