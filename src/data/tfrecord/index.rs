//! The index of a TFRecord file: length and label of every record, kept beside it as `FILE.index`, so that any record is
//! one read away. Without it a record can only be found by going through all before it.
//!
//! ```text
//! magic, 16 bytes | size of the file u64 | its modification time i64 s, u32 ns | length of the label's name u32 |
//! the label's name | for each record: length of its data u64, label i64 | BLAKE3 of all before, 32 bytes
//! ```
//!
//! Numbers are little-endian. Records lie one behind the other, so their lengths give their places. An index is believed
//! if its hash is right, if the file still has that size and time, and if the lengths add up to that size; any other is
//! made anew. Making it reads the file once and checks every CRC; 16 bytes a record are written.

use super::example;
use super::framing::{OVERHEAD, Scanner};
use crate::atomic_file;
use crate::error::{Context, Error, Kind, Result};
use std::fs::{File, Metadata};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 16] = b"lockstep index 1";
const HASH: usize = blake3::OUT_LEN;
const ENTRY: usize = 16;

/// What an index says of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Bytes of data, without the framing.
    pub length: u64,
    /// As it stands in the record.
    pub label: i64,
}

/// Where the index of a file is kept.
pub fn path_of(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".index");
    path.into()
}

/// Goes through the file and checks every record. `label` names the feature that holds the label.
pub fn build(path: &Path, file: &File, label: &str) -> Result<Vec<Entry>> {
    let size = file.metadata().or_kind(Kind::Data, format_args!("opening {}", path.display()))?.len();
    let mut scanner = Scanner::new(BufReader::with_capacity(1 << 18, file), size);
    let (mut entries, mut offset) = (Vec::new(), 0);
    loop {
        let labelled = scanner.next().and_then(|data| match data {
            Some(data) => Ok(Some(Entry { length: data.len() as u64, label: example::integer(data, label)? })),
            None => Ok(None),
        });
        match labelled {
            Ok(Some(entry)) => {
                entries.push(entry);
                offset += OVERHEAD + entry.length;
            }
            Ok(None) => return Ok(entries),
            Err(error) => return Err(bad_record(path, entries.len(), offset, error)),
        }
    }
}

/// The error about one record of a file.
pub fn bad_record(path: &Path, number: usize, offset: u64, what: impl std::fmt::Display) -> Error {
    Error::data(format!("{}, record {number} at byte {offset}: {what}", path.display()))
}

/// The index that is kept for a file, if there is one that is whole and belongs to the file as it is now.
pub fn load(path: &Path, file: &Metadata, label: &str) -> Option<Vec<Entry>> {
    let head = head(file, label);
    // No file has more records than their framing alone fills.
    let most = head.len() as u64 + (file.len() / OVERHEAD) * ENTRY as u64 + HASH as u64;
    let mut bytes = Vec::new();
    File::open(path_of(path)).ok()?.take(most + 1).read_to_end(&mut bytes).ok()?;

    let (said, hash) = bytes.split_last_chunk::<HASH>()?;
    let (entries, rest) = said.strip_prefix(&head[..])?.as_chunks::<ENTRY>();
    if blake3::hash(said) != *hash || !rest.is_empty() {
        return None;
    }
    let entries: Vec<Entry> = entries.iter().map(decode).collect();
    let size = entries.iter().try_fold(0u64, |size, entry| size.checked_add(entry.length)?.checked_add(OVERHEAD));
    (size == Some(file.len())).then_some(entries)
}

/// Keeps the index of a file.
pub fn store(path: &Path, file: &Metadata, label: &str, entries: &[Entry]) -> io::Result<()> {
    let mut bytes = head(file, label);
    bytes.reserve_exact(entries.len() * ENTRY + HASH);
    for entry in entries {
        bytes.extend(entry.length.to_le_bytes());
        bytes.extend(entry.label.to_le_bytes());
    }
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    atomic_file::replace(&path_of(path), &bytes)
}

/// What an index begins with: what it was made of.
fn head(file: &Metadata, label: &str) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(file.len().to_le_bytes());
    head.extend(file.mtime().to_le_bytes());
    head.extend((file.mtime_nsec() as u32).to_le_bytes());
    head.extend((label.len() as u32).to_le_bytes());
    head.extend(label.as_bytes());
    head
}

fn decode(bytes: &[u8; ENTRY]) -> Entry {
    let (length, label) = bytes.split_at(8);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("half an entry"));
    Entry { length: word(length), label: word(label) as i64 }
}
