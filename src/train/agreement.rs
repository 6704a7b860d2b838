//! Before the first step the ranks compare what must be the same on all of them. On several machines a file may be old, a
//! folder another, a binary of last week: better refused now than trained wrong.

use crate::comm::{Communicator, chunk};
use crate::config::raw::Config;
use crate::device::SliceMut;
use crate::error::{Error, Result};

/// What must agree; each is compared by 64 bits of a BLAKE3 hash.
const FACTS: [&str; 3] = ["version of the program", "configuration", "training set"];

/// Words of a rank: one chunk of an all-gather.
const WORDS: usize = 16;

/// `fingerprint` is the training set's. Fails on every rank, naming the ranks and what is different there, unless all agree. Collective.
pub fn check(config: &Config, fingerprint: &str, comm: &mut dyn Communicator) -> Result<()> {
    let facts =
        [blake3::hash(env!("CARGO_PKG_VERSION").as_bytes()), config.digest(), blake3::hash(fingerprint.as_bytes())];
    let mut words = vec![0.0; comm.size() * WORDS];
    let mine = chunk(words.len(), comm.size(), comm.rank());
    words[mine].copy_from_slice(&encode(&facts));
    comm.all_gather(SliceMut::from(&mut words[..]))?;
    match disagreement(&words) {
        None => Ok(()),
        Some(text) => Err(Error::usage(format!(
            "the ranks do not agree: {text}. Give every rank the same program, configuration file and data"
        ))),
    }
}

/// Bits of the hashes as words that collectives carry; they are never read as numbers.
fn encode(facts: &[blake3::Hash; FACTS.len()]) -> [f32; WORDS] {
    let mut words = [0.0; WORDS];
    for (pair, fact) in words.chunks_exact_mut(2).zip(facts) {
        let [a, b, c, d, e, f, g, h, ..] = *fact.as_bytes();
        pair.copy_from_slice(&[f32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h])]);
    }
    words
}

/// For each fact, the ranks at which it is not rank 0's.
fn disagreement(words: &[f32]) -> Option<String> {
    let of = |rank: usize, fact: usize| {
        let at = rank * WORDS + 2 * fact;
        [words[at].to_bits(), words[at + 1].to_bits()]
    };
    let odd = FACTS.iter().enumerate().filter_map(|(fact, name)| {
        let ranks: Vec<usize> = (0..words.len() / WORDS).filter(|&rank| of(rank, fact) != of(0, fact)).collect();
        (!ranks.is_empty()).then(|| format!("the {name} of rank 0 is not that of ranks {ranks:?}"))
    });
    Some(odd.collect::<Vec<_>>().join("; ")).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_odd_ranks_and_facts_are_named() {
        let same = FACTS.map(|fact| blake3::hash(fact.as_bytes()));
        let mut other = same;
        other[1] = blake3::hash(b"another");
        let gathered = |ranks: [&[blake3::Hash; 3]; 3]| ranks.map(encode).concat();
        assert_eq!(disagreement(&gathered([&same, &same, &same])), None);
        let text = disagreement(&gathered([&same, &other, &other])).unwrap();
        assert_eq!(text, "the configuration of rank 0 is not that of ranks [1, 2]");
    }
}
