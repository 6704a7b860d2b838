//! Which rank updates what.
//!
//! Where ranks share the update, NCCL scatters sums and gathers parameters in equal chunks, and kernels work in cache lines; but a
//! bucket ends with a layer, and that is seldom a whole number of lines for each rank. So a bucket ends at the last such place
//! before, and what is left over goes with the next one, whose gradients come later. At the very end less than a line a rank is
//! left. All ranks sum and update it whole, as they would all without sharing: no memory is padded, and nothing but the cut
//! knows of remainders.

use std::ops::Range;

/// Elements of a cache line.
const LINE: usize = 16;

/// What is reduced on its own, and what of it this rank updates.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// Elements of the arenas.
    pub bucket: Range<usize>,
    pub mine: Share,
}

/// Elements that a rank updates, and where in the arenas of the optimizer's state theirs begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    pub elements: Range<usize>,
    pub state: usize,
}

impl Shard {
    /// Whether each rank updates a part of the bucket; else each updates all of it.
    pub fn is_shared(&self) -> bool {
        self.mine.elements != self.bucket
    }
}

impl Share {
    /// Elements of the state's arenas.
    pub fn held(&self) -> Range<usize> {
        self.state..self.state + self.elements.len()
    }
}

/// Each rank updates all.
pub fn replicated(buckets: &[Range<usize>]) -> Vec<Shard> {
    let all = |bucket: &Range<usize>| Share { elements: bucket.clone(), state: bucket.start };
    buckets.iter().map(|bucket| Shard { bucket: bucket.clone(), mine: all(bucket) }).collect()
}

/// This rank updates one chunk of each bucket; these are cut anew for that.
pub fn sharded(buckets: &[Range<usize>], ranks: usize, rank: usize) -> Vec<Shard> {
    let unit = LINE * ranks;
    let len = buckets.last().map_or(0, |last| last.end);
    let ends = buckets.iter().map(|bucket| bucket.end / unit * unit).chain([len]);
    let (mut shards, mut start, mut state) = (Vec::with_capacity(buckets.len() + 1), 0, 0);
    for end in ends.filter(|&end| end > 0) {
        let bucket = start..end;
        if bucket.is_empty() {
            continue;
        }
        let chunk = bucket.len() / ranks;
        let elements = match bucket.len().is_multiple_of(unit) {
            true => start + rank * chunk..start + (rank + 1) * chunk,
            false => bucket.clone(),
        };
        (start, state) = (end, state + elements.len());
        shards.push(Shard { bucket, mine: Share { state: state - elements.len(), elements } });
    }
    shards
}

/// What this rank updates, where all sums are there: of shares that touch one.
pub fn joined(shards: &[Shard]) -> Vec<Share> {
    let mut joined: Vec<Share> = Vec::with_capacity(shards.len());
    for Shard { mine, .. } in shards {
        match joined.last_mut() {
            Some(last) if last.elements.end == mine.elements.start && last.held().end == mine.state => {
                last.elements.end = mine.elements.end;
            }
            _ => joined.push(mine.clone()),
        }
    }
    joined
}

/// Elements of which this rank holds the state.
pub fn held(shards: &[Shard]) -> usize {
    shards.iter().map(|shard| shard.mine.elements.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element is updated by one rank, or by all where the bucket is not shared; chunks are equal, of whole lines, and
    /// each rank's state lies without gaps.
    #[test]
    fn ranks_share_every_bucket_but_a_last_bit() {
        let ends = [16, 48, 400, 416, 4000, 4016];
        let buckets: Vec<Range<usize>> = [0].iter().chain(&ends).zip(&ends).map(|(&start, &end)| start..end).collect();
        for ranks in [1, 2, 3, 4, 7, 8, 300] {
            let of = |rank| sharded(&buckets, ranks, rank);
            let mut updated = vec![0; 4016];
            for rank in 0..ranks {
                let shards = of(rank);
                let mut state = 0;
                for (number, Shard { bucket, mine }) in shards.iter().enumerate() {
                    assert_eq!(mine.state, state);
                    state += mine.elements.len();
                    assert_eq!(bucket.start, if number == 0 { 0 } else { shards[number - 1].bucket.end });
                    assert!(mine.elements.start.is_multiple_of(LINE) && mine.elements.len().is_multiple_of(LINE));
                    assert_eq!(*bucket, of(0)[number].bucket);
                    let whole = !shards[number].is_shared() && ranks > 1;
                    assert!(!whole || (number + 1 == shards.len() && bucket.len() < LINE * ranks), "{bucket:?}");
                    assert!(whole || mine.elements.len() * ranks == bucket.len(), "{bucket:?} on {ranks} ranks");
                    updated[mine.elements.clone()].iter_mut().for_each(|times| *times += 1);
                }
                assert_eq!(state, held(&shards));
                assert!(state * ranks < 4016 + LINE * ranks * ranks);
            }
            let left = 4016 / (LINE * ranks) * LINE * ranks;
            assert!(updated[..left].iter().all(|times| *times == 1), "{ranks} ranks");
            assert!(updated[left..].iter().all(|times| *times == ranks), "{ranks} ranks");
        }
        assert!(sharded(&[], 2, 0).is_empty());
    }

    #[test]
    fn shares_that_touch_are_one() {
        let all = |end| vec![Share { elements: 0..end, state: 0 }];
        assert_eq!(joined(&replicated(&[0..32, 32..160])), all(160));
        assert_eq!(joined(&sharded(&[0..32, 32..160], 1, 0)), all(160));
        let [first, last] = [0, 1].map(|rank| joined(&sharded(&[0..64, 64..144], 2, rank)));
        let share = |elements, state| Share { elements, state };
        assert_eq!(first, [share(0..32, 0), share(64..96, 32), share(128..144, 64)]);
        assert_eq!(last, [share(32..64, 0), share(96..144, 32)], "with what is left over");
        assert_eq!(joined(&[]), []);
    }
}
