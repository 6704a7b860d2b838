//! Before the first step the ranks compare what must be the same on all of them. On several machines a file may be old, a
//! folder another, a binary of last week: better refused now than trained wrong.
//!
//! They exchange eight bytes of a hash for every fact. Only where these differ do they exchange the fact itself, in parts, and
//! all make the same table: for each part that differs, the odd ranks with what they have, beside what most have.

use super::Rank;
use crate::comm::{Communicator, chunk};
use crate::config::leaves;
use crate::config::raw::{Config, Parallel};
use crate::device::SliceMut;
use crate::error::{Context, Error, Kind, Result};
use crate::launch::rendezvous::host;
use crate::launch::world::World;
use crate::model::params::ParamTable;
use comfy_table::{ContentArrangement, Table, presets};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;

/// Rows of the table; a wholly different file has hundreds.
const MOST_ROWS: usize = 20;
/// Of a value, in the table.
const LONGEST_VALUE: usize = 60;

/// Something that must agree, in named parts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fact {
    name: String,
    parts: BTreeMap<String, String>,
}

impl Fact {
    fn new(name: &str, parts: impl IntoIterator<Item = (String, String)>) -> Fact {
        Fact { name: name.to_string(), parts: parts.into_iter().collect() }
    }

    /// Version and build of this program: two builds of one version are not the same.
    pub fn program() -> Result<Fact> {
        let mut hasher = blake3::Hasher::new();
        let build = File::open("/proc/self/exe").and_then(|file| hasher.update_reader(file).map(|h| h.finalize()));
        let build = build.or_kind(Kind::Internal, "reading this executable")?.to_hex()[..16].to_string();
        let version = env!("CARGO_PKG_VERSION").to_string();
        Ok(Fact::new("program", [("version".to_string(), version), ("build".to_string(), build)]))
    }

    /// The number of ranks, by the launcher and by those who met.
    pub fn world(world: &World, met: usize) -> Fact {
        let sizes = [(format!("by {}", world.launcher), world.size), ("met".to_string(), met)];
        Fact::new("world size", sizes.map(|(source, size)| (source, size.to_string())))
    }

    /// `[parallel]`, by which the ranks connect. The interface may have another name on another host.
    pub fn parallel(parallel: &Parallel) -> Fact {
        let parallel = Parallel { interface: None, ..parallel.clone() };
        let table = toml::Table::try_from(parallel).expect("a section is a table of TOML's types");
        let parts = leaves(&table).into_iter();
        Fact::new("configuration", parts.map(|(key, value)| (format!("parallel.{key}"), value.to_string())))
    }

    pub fn configuration(config: &Config) -> Fact {
        let mut keys = leaves(&config.resolved());
        keys.remove("parallel.interface");
        Fact::new("configuration", keys.into_iter().map(|(key, value)| (key, value.to_string())))
    }

    /// `fingerprint` is the set's.
    pub fn training_set(samples: usize, classes: usize, fingerprint: &str) -> Fact {
        let sizes = [("samples", samples), ("classes", classes)].map(|(name, size)| (name, size.to_string()));
        let parts = sizes.into_iter().chain([("fingerprint", fingerprint.chars().take(16).collect())]);
        Fact::new("training set", parts.map(|(name, value)| (name.to_string(), value)))
    }

    pub fn parameters(table: &ParamTable) -> Fact {
        let parts = table.params.iter().map(|param| (param.name.clone(), format!("{:?}", param.spec.shape)));
        Fact::new("parameters", parts)
    }

    fn digest(&self) -> [u8; 8] {
        let mut hasher = blake3::Hasher::new();
        for text in self.parts.iter().flat_map(|(key, value)| [key, value]) {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

/// Compares the facts over all ranks; `exchange` gives every rank's bytes to every rank. Where they differ, an error of kind
/// Usage on all: rank 0 says for all what differs, and ranks whose users may not see that point to it. Collective.
pub fn check(facts: &[Fact], world: &World, mut exchange: impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>) -> Result<()> {
    let mine: Vec<u8> = facts.iter().flat_map(Fact::digest).collect();
    let digests = exchange(&mine)?;
    let differs = |fact: usize| digests.iter().any(|other| other.chunks(8).nth(fact) != mine.chunks(8).nth(fact));
    let count = digests.iter().map(|digests| digests.len() / 8).max().unwrap_or(0);
    // A rank of another version may compare something else altogether.
    let odd: Vec<usize> = (0..count).filter(|fact| differs(*fact)).collect();
    if odd.is_empty() {
        return Ok(());
    }
    let facts: Vec<&Fact> = odd.iter().filter_map(|fact| facts.get(*fact)).collect();
    let mine = serde_json::to_vec(&Account { host: host().to_string(), facts }).expect("plain data");
    let accounts = exchange(&mine)?;
    let accounts: Result<Vec<Account<Fact>>, _> = accounts.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    let accounts = accounts.or_kind(Kind::Internal, "what the other ranks have")?;
    if world.rank != 0 && !world.joins_output {
        return Err(Error::usage(format!(
            "the ranks do not agree, and nothing was trained; rank 0 on {} shows what differs",
            accounts[0].host
        )));
    }
    let error = Error::usage(format!(
        "the ranks do not agree, and nothing was trained:\n{}\nGive every rank the same program, configuration and data",
        table(&accounts)
    ));
    Err(if world.rank == 0 { error } else { error.said_by_rank_0() })
}

/// A rank's facts, where some rank's differ.
#[derive(Serialize, Deserialize)]
struct Account<F> {
    host: String,
    facts: Vec<F>,
}

fn table(accounts: &[Account<Fact>]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["what", "on ranks", "is", "on most ranks"]);
    let mut rows = Vec::new();
    let names = accounts.iter().flat_map(|account| &account.facts).map(|fact| fact.name.as_str());
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
            rows.extend(rows_of(name, accounts));
        }
    }
    let more = rows.len().saturating_sub(MOST_ROWS);
    table.add_rows(rows.into_iter().take(MOST_ROWS));
    if more > 0 {
        table.add_row([format!("and {more} more")]);
    }
    table
}

/// A row for each part of a fact and each value of it that is not most ranks'. Of equally many, rank 0's side is most.
fn rows_of(name: &str, accounts: &[Account<Fact>]) -> Vec<[String; 4]> {
    let none = BTreeMap::new();
    let parts: Vec<&BTreeMap<String, String>> = accounts
        .iter()
        .map(|account| account.facts.iter().find(|fact| fact.name == name).map_or(&none, |fact| &fact.parts))
        .collect();
    let like = |rank: usize| parts.iter().filter(|other| **other == parts[rank]).count();
    let most = (0..parts.len()).rev().max_by_key(|rank| like(*rank)).unwrap_or(0);
    let mut keys: Vec<&String> = parts.iter().flat_map(|parts| parts.keys()).collect();
    keys.sort();
    keys.dedup();
    let mut rows = Vec::new();
    for key in keys {
        let expected = parts[most].get(key);
        let mut odd: BTreeMap<Option<&String>, Vec<String>> = BTreeMap::new();
        for (rank, parts) in parts.iter().enumerate().filter(|(_, parts)| parts.get(key) != expected) {
            odd.entry(parts.get(key)).or_default().push(format!("{rank} ({})", accounts[rank].host));
        }
        let row = |(value, ranks): (Option<&String>, Vec<String>)| {
            [format!("{name}: {key}"), ranks.join(", "), shown(value), shown(expected)]
        };
        rows.extend(odd.into_iter().map(row));
    }
    rows
}

fn shown(value: Option<&String>) -> String {
    match value {
        None => "not there".to_string(),
        Some(value) if value.chars().count() <= LONGEST_VALUE => value.clone(),
        Some(value) => value.chars().take(LONGEST_VALUE - 3).chain("...".chars()).collect(),
    }
}

/// What each rank has made by itself, if all have. Else an error on all: that of the first rank that has one. Collective.
pub fn together<T>(mine: Result<T>, rank: &Rank, comm: &mut dyn Communicator) -> Result<T> {
    let said = serde_json::to_vec(&(host().to_string(), mine.as_ref().err())).expect("plain data");
    let said = match gather_bytes(comm, &said) {
        Ok(said) => said,
        Err(lost) => return mine.and(Err(lost)),
    };
    let read = |bytes: &Vec<u8>| serde_json::from_slice::<(String, Option<Error>)>(bytes);
    let said: Result<Vec<_>, _> = said.iter().map(read).collect();
    let said = said.or_kind(Kind::Internal, "how the other ranks fare")?;
    let Some(first) = said.iter().position(|(_, failure)| failure.is_some()) else { return mine };
    let (host, Some(error)) = &said[first] else { unreachable!("it has failed") };
    let text = error.to_string();
    let alike = said.iter().all(|(_, failure)| failure.as_ref().is_some_and(|other| other.to_string() == text));
    let error = if alike { error.clone() } else { error.clone().context(format_args!("rank {first} on {host}")) };
    Err(of_all(error, rank, comm))
}

/// An error that all ranks have. Nobody leaves before all know why: a rank that is gone would be the others' error.
pub fn of_all(error: Error, rank: &Rank, comm: &mut dyn Communicator) -> Error {
    rank.health.ending();
    let _ = comm.barrier();
    if rank.world.rank > 0 && rank.world.joins_output { error.said_by_rank_0() } else { error }
}

/// Every rank's bytes on every rank. Collectives carry words of 32 bits, which nobody reads as numbers.
pub fn gather_bytes(comm: &mut dyn Communicator, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
    let lengths = gather_words(comm, &[f32::from_bits(mine.len() as u32)], 1)?;
    let lengths: Vec<usize> = lengths.iter().map(|words| words[0].to_bits() as usize).collect();
    let word = |bytes: &[u8]| {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        f32::from_le_bytes(padded)
    };
    let words: Vec<f32> = mine.chunks(4).map(word).collect();
    let longest = lengths.iter().map(|length| length.div_ceil(4)).max().unwrap_or(0);
    let gathered = gather_words(comm, &words, longest)?;
    let bytes = |words: &Vec<f32>| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    Ok(gathered.iter().zip(lengths).map(|(words, length)| bytes(words)[..length].to_vec()).collect())
}

/// Every rank's words, `most` at most, on every rank. Blocks are whole lines, so that a rank's is its chunk.
fn gather_words(comm: &mut dyn Communicator, mine: &[f32], most: usize) -> Result<Vec<Vec<f32>>> {
    let block = most.max(1).next_multiple_of(16);
    let mut words = vec![0.0; comm.size() * block];
    let own = chunk(words.len(), comm.size(), comm.rank());
    words[own][..mine.len()].copy_from_slice(mine);
    comm.all_gather(SliceMut::from(&mut words[..]))?;
    Ok(words.chunks(block).map(<[f32]>::to_vec).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(host: &str, facts: &[(&str, &[(&str, &str)])]) -> Account<Fact> {
        let fact = |(name, parts): &(&str, &[(&str, &str)])| {
            Fact::new(name, parts.iter().map(|(key, value)| (key.to_string(), value.to_string())))
        };
        Account { host: host.to_string(), facts: facts.iter().map(fact).collect() }
    }

    #[test]
    fn the_odd_ranks_are_held_against_most_even_if_rank_0_is_odd() {
        let usual: &[(&str, &str)] = &[("lr", "0.1"), ("seed", "1")];
        let other: &[(&str, &str)] = &[("lr", "0.2"), ("seed", "1"), ("steps", "9")];
        let accounts = [other, usual, usual, other, usual].map(|parts| account("n", &[("config", parts)]));
        let rows = rows_of("config", &accounts);
        assert_eq!(
            rows,
            [["config: lr", "0 (n), 3 (n)", "0.2", "0.1"], ["config: steps", "0 (n), 3 (n)", "9", "not there"]]
        );
    }

    #[test]
    fn of_two_halves_rank_0s_is_most_and_different_values_have_a_row_each() {
        let parts: [&[(&str, &str)]; 4] = [&[("lr", "1")], &[("lr", "2")], &[("lr", "3")], &[("lr", "1")]];
        let accounts = parts.map(|parts| account("n", &[("c", parts)]));
        assert_eq!(rows_of("c", &accounts), [["c: lr", "1 (n)", "2", "1"], ["c: lr", "2 (n)", "3", "1"]]);
        assert_eq!(rows_of("c", &accounts[..2]), [["c: lr", "1 (n)", "2", "1"]]);
    }

    #[test]
    fn a_wholly_different_fact_does_not_fill_the_screen() {
        let many: Vec<(String, String)> = (0..500).map(|key| (key.to_string(), "x".repeat(1000))).collect();
        let account = |parts: Vec<(String, String)>| Account { host: "n".into(), facts: vec![Fact::new("f", parts)] };
        let text = table(&[account(vec![]), account(many)]).to_string();
        assert!(text.contains("and 480 more") && text.contains("xxx..."), "{text}");
        assert!(text.lines().count() < 30 && text.lines().all(|line| line.len() < 200), "{text}");
    }

    #[test]
    fn all_ranks_say_the_same_and_rank_0_says_it_for_all_who_are_seen_beside_it() {
        let facts = |rank: usize| {
            let lr = if rank == 2 { "0.2" } else { "0.1" };
            [Fact::new("a", [("x".into(), "1".into())]), Fact::new("b", [("lr".into(), lr.into())])]
        };
        // A round of the exchange at a time, for all ranks: the digests, then what was asked for.
        let rounds = std::cell::RefCell::new(vec![Vec::new(), Vec::new()]);
        let run = |rank: usize, joins_output: bool, complete: bool| {
            let mut round = 0;
            check(&facts(rank), &World { rank, joins_output, ..World::alone() }, |bytes| {
                round += 1;
                let mut rounds = rounds.borrow_mut();
                let seen: &mut Vec<Vec<u8>> = &mut rounds[round - 1];
                if !complete && seen.len() == rank {
                    seen.push(bytes.to_vec());
                }
                if seen.len() == 3 { Ok(seen.clone()) } else { Err(Error::internal("not yet")) }
            })
        };
        for _ in 0..2 {
            (0..3).for_each(|rank| drop(run(rank, true, false)));
        }
        let errors: Vec<Error> = (0..3).map(|rank| run(rank, true, true).unwrap_err()).collect();
        assert!(errors.iter().all(|error| error.to_string() == errors[0].to_string() && error.kind() == Kind::Usage));
        assert_eq!([0, 1, 2].map(|rank| errors[rank].is_said_by_rank_0()), [false, true, true]);
        let text = errors[0].to_string();
        assert!(text.contains("b: lr") && text.contains("2 (") && !text.contains("a: x"), "{text}");

        let by_hand: Vec<Error> = (0..3).map(|rank| run(rank, false, true).unwrap_err()).collect();
        assert!(by_hand.iter().all(|error| error.kind() == Kind::Usage && !error.is_said_by_rank_0()));
        assert_eq!(by_hand[0].to_string(), text);
        assert!(by_hand[1..].iter().all(|error| error.to_string().ends_with(" shows what differs")), "{by_hand:?}");
    }
}
