//! Sums of squares over whole tensors of which every rank holds a part: each adds up its own, and what the ranks exchange
//! are the nodes of `optim::norm`'s trees, some tens of numbers a tensor. All ranks join them to the same bits, which depend
//! neither on the transport nor on how many ranks there are.

use super::update::bytes;
use crate::comm::{Communicator, chunk};
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use crate::model::params::{Param, ParamTable, Role};
use crate::optim::norm::{self, Joint, LINE};
use std::ops::Range;
use std::time::Duration;

pub struct Norms {
    /// By tensor, and by rank in each.
    parts: Vec<Part>,
    /// What the ranks exchange, one rank behind the other: a node is an f64 as two words, which are never read as numbers.
    exchange: Vec<f32>,
    joint: Joint,
}

/// What a rank holds of a tensor.
pub struct Part {
    pub rank: usize,
    /// Its number in the table.
    pub tensor: usize,
    /// Elements of the arenas.
    pub range: Range<usize>,
    /// Its lines in the tensor.
    lines: Range<usize>,
    /// Where its nodes begin in the exchange.
    words: usize,
}

impl Norms {
    /// Over the trainable tensors, where rank r of `size` holds chunk r of every bucket.
    pub fn new(table: &ParamTable, buckets: &[Range<usize>], size: usize) -> Norms {
        let mut parts = Vec::new();
        let mut words = vec![0; size];
        let trainable = |(_, param): &(usize, &Param)| param.spec.role == Role::Trainable;
        for (tensor, param) in table.params.iter().enumerate().filter(trainable) {
            let bucket = buckets.iter().find(|bucket| bucket.contains(&param.range.start));
            let bucket = bucket.expect("every tensor that has elements is in a bucket");
            for (rank, words) in words.iter_mut().enumerate() {
                let range = intersection(&param.range, &shift(chunk(bucket.len(), size, rank), bucket.start));
                if range.is_empty() {
                    continue;
                }
                let first = (range.start - param.range.start) / LINE;
                let lines = first..first + range.len().div_ceil(LINE);
                let nodes = norm::nodes(lines.start, lines.end).count();
                parts.push(Part { rank, tensor, range, lines, words: *words });
                *words += 2 * nodes;
            }
        }
        // Chunks of an all-gather are whole cache lines.
        let share = words.into_iter().max().unwrap_or(0).next_multiple_of(16);
        parts.iter_mut().for_each(|part| part.words += part.rank * share);
        Norms { parts, exchange: vec![0.0; size * share], joint: Joint::new() }
    }

    /// What `rank` holds.
    pub fn of(&self, rank: usize) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(move |part| part.rank == rank)
    }

    /// The sum of squares of every trainable tensor, by its number in the table, of which each rank has its part in `arena`.
    /// Collective; gives the time waited.
    ///
    /// # Safety
    /// Nobody writes this rank's parts meanwhile.
    pub unsafe fn measure(
        &mut self,
        arena: &Arena,
        squares: &mut [f64],
        comm: &mut dyn Communicator,
    ) -> Result<Duration> {
        let Norms { parts, exchange, joint } = self;
        for part in parts.iter().filter(|part| part.rank == comm.rank()) {
            // SAFETY: the caller's promise.
            let values = unsafe { arena.slice(bytes(&part.range)) }.f32();
            let words = exchange[part.words..].as_chunks_mut().0;
            words.iter_mut().zip(norm::squares(values, part.lines.start)).for_each(|(word, sum)| *word = encode(sum));
        }
        let waited = comm.all_gather(SliceMut::from(&mut exchange[..]))?;
        for tensor in parts.chunk_by(|a, b| a.tensor == b.tensor) {
            for part in tensor {
                let words = exchange[part.words..].as_chunks().0;
                norm::nodes(part.lines.start, part.lines.end)
                    .zip(words)
                    .for_each(|(lines, word)| joint.push(lines, decode(*word)));
            }
            squares[tensor[0].tensor] = joint.finish();
        }
        Ok(waited)
    }
}

fn encode(sum: f64) -> [f32; 2] {
    let bits = sum.to_bits();
    [f32::from_bits(bits as u32), f32::from_bits((bits >> 32) as u32)]
}

fn decode([low, high]: [f32; 2]) -> f64 {
    f64::from_bits(u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32)
}

pub fn shift(range: Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

/// Empty where they do not meet.
pub fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
