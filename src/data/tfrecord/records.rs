//! The records of one part, numbered through all its files.

use super::framing::{self, OVERHEAD};
use super::index::{self, Entry};
use crate::data::files;
use crate::error::{Context, Error, Kind, Result};
use crate::report::log::SAID_ONCE;
use rayon::prelude::*;
use std::fs::{File, TryLockError};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

/// Files kept open, and where their records begin.
pub struct Records {
    shards: Vec<Shard>,
    /// Number of each file's first record, and at the end the number of all.
    first: Vec<usize>,
    /// As they stand in the records.
    labels: Vec<i64>,
}

struct Shard {
    path: PathBuf,
    file: File,
    /// Where each record begins, and at the end the size of the file.
    offsets: Vec<u64>,
}

impl Records {
    /// Opens the files and gets their indexes. `label` names the feature that holds the label.
    pub fn open(paths: Vec<PathBuf>, label: &str) -> Result<Records> {
        files::raise_limit(paths.len());
        let opened = paths.into_iter().map(|path| {
            let file = File::open(&path).or_kind(Kind::Data, format_args!("opening {}", path.display()))?;
            Ok((path, file))
        });
        let files: Vec<(PathBuf, File)> = opened.collect::<Result<_>>()?;
        let indexes = indexes(&files, label)?;
        let mut records = Records { shards: Vec::with_capacity(files.len()), first: vec![0], labels: Vec::new() };
        for ((path, file), entries) in files.into_iter().zip(indexes) {
            let mut end = 0;
            let next = |entry: &Entry| {
                end += entry.length + OVERHEAD;
                end
            };
            let offsets = std::iter::once(0).chain(entries.iter().map(next)).collect();
            records.labels.extend(entries.iter().map(|entry| entry.label));
            records.first.push(records.labels.len());
            records.shards.push(Shard { path, file, offsets });
        }
        if records.labels.is_empty() || records.labels.len() > u32::MAX as usize {
            let (count, first) = (records.labels.len(), records.shards[0].path.display());
            return Err(Error::data(format!("{first} and its like hold {count} records; 1 to 2^32 can be read")));
        }
        records.warn_of_empty();
        Ok(records)
    }

    /// A set may have a file without a record, but so does a copy that was cut off at once.
    fn warn_of_empty(&self) {
        let empty = self.files().zip(&self.shards).filter(|(records, _)| records.is_empty());
        let names: Vec<String> = empty.map(|(_, shard)| shard.path.display().to_string()).collect();
        if !names.is_empty() {
            tracing::warn!(
                target: SAID_ONCE,
                "{} of {} TFRecord files are empty, and the run goes on with the others; if they should hold records, \
                 fetch them again: {}",
                names.len(),
                self.shards.len(),
                files::summary(&names)
            );
        }
    }

    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Numbers of the records of each file.
    pub fn files(&self) -> impl Iterator<Item = Range<u32>> {
        self.first.windows(2).map(|ends| ends[0] as u32..ends[1] as u32)
    }

    /// Reads a record into `buffer`, checks it, and gives its data. Once the buffer has the size of the greatest record,
    /// nothing is allocated.
    pub fn read<'a>(&self, index: usize, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let (shard, number) = self.locate(index);
        let offset = shard.offsets[number];
        buffer.resize((shard.offsets[number + 1] - offset) as usize, 0);
        shard
            .file
            .read_exact_at(buffer, offset)
            .map_err(|error| self.error(index, format_args!("reading it: {error}")))?;
        framing::unframe(buffer).map_err(|what| self.error(index, what))
    }

    /// The file and the number in it, for messages.
    pub fn name(&self, index: usize) -> String {
        let (shard, number) = self.locate(index);
        format!("{}, record {number}", shard.path.display())
    }

    /// An error about this record.
    pub fn error(&self, index: usize, what: impl std::fmt::Display) -> Error {
        let (shard, number) = self.locate(index);
        index::bad_record(&shard.path, number, shard.offsets[number], what)
    }

    fn locate(&self, index: usize) -> (&Shard, usize) {
        let shard = self.first.partition_point(|&first| first <= index) - 1;
        (&self.shards[shard], index - self.first[shard])
    }
}

/// The index of every file: the one that is kept beside it, else a new one. The ranks of a machine come here at the same
/// time. Each takes the files that no other has locked, so the files are shared out; what another was still reading at the
/// end is read again rather than waited for.
fn indexes(files: &[(PathBuf, File)], label: &str) -> Result<Vec<Vec<Entry>>> {
    let kept = |(path, file): &(PathBuf, File)| index::load(path, &file.metadata().ok()?, label);
    let mut found: Vec<Option<Vec<Entry>>> = files.par_iter().map(kept).collect();
    let missing = found.iter().filter(|index| index.is_none()).count();
    if missing > 0 {
        tracing::info!("reading {missing} TFRecord files once to index their records, from {}", files[0].0.display());
    }
    found.par_iter_mut().zip(files).filter(|(index, _)| index.is_none()).try_for_each(|(index, entry)| {
        let (path, file) = entry;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(()),
            // A file system without locks: every rank reads.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        *index = match kept(entry) {
            Some(index) => Some(index),
            None => Some(make(path, file, label)?),
        };
        // Where there was no lock, there is nothing to give back.
        let _ = file.unlock();
        Ok::<_, Error>(())
    })?;
    let shards = found.into_par_iter().zip(files);
    shards
        .map(|(index, entry)| match index.or_else(|| kept(entry)) {
            Some(index) => Ok(index),
            None => index::build(&entry.0, &entry.1, label),
        })
        .collect()
}

/// Makes an index and keeps it, if that is possible.
fn make(path: &Path, file: &File, label: &str) -> Result<Vec<Entry>> {
    // Taken before the file is read: if it changes meanwhile, its index is stale.
    let metadata = file.metadata().or_kind(Kind::Data, format_args!("opening {}", path.display()))?;
    let entries = index::build(path, file, label)?;
    if let Err(error) = index::store(path, &metadata, label, &entries) {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            tracing::warn!(
                "{} cannot be written ({error}): this index and the like of it are kept in memory, and each start reads \
                 the files whole",
                index::path_of(path).display()
            );
        });
    }
    Ok(entries)
}
