//! Finding and reading data files: plain, `.gz` or `.xz`, and never more than a file can honestly hold.

use crate::error::{Context, Error, Kind, Result};
use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// What a compressed file may expand to: images shrink by far less, and a decompression bomb ends here.
const EXPANSION: u64 = 100;
const EXPANSION_FREE: u64 = 1 << 20;
/// Memory that an xz stream may ask for its dictionary: `xz -9` needs 64 MiB.
const XZ_MEMORY_KIB: u32 = 80 << 10;

/// A data file being read, decompressed on the way.
pub struct DataFile {
    path: PathBuf,
    reader: Box<dyn Read>,
    stored: u64,
    plain: bool,
}

impl DataFile {
    /// Opens the first of `names` that the folder holds, as it is or with `.gz` or `.xz` behind. `fetch` names the sets
    /// that `scripts/fetch-data.sh` brings, for the error.
    pub fn find(folder: &Path, names: &[&str], fetch: &str) -> Result<DataFile> {
        let listing = list(folder).map_err(|error| error.context(advice(names, fetch)))?;
        let candidates = names.iter().flat_map(|name| [name.to_string(), format!("{name}.gz"), format!("{name}.xz")]);
        match candidates.into_iter().find(|name| listing.contains(name)) {
            Some(name) => DataFile::open(&folder.join(name)),
            None => {
                Err(Error::data(format!("{}: {} holds {}", advice(names, fetch), folder.display(), summary(&listing))))
            }
        }
    }

    pub fn open(path: &Path) -> Result<DataFile> {
        let doing = format!("opening {}", path.display());
        let file = fs::File::open(path).or_kind(Kind::Data, &doing)?;
        let stored = file.metadata().or_kind(Kind::Data, &doing)?.len();
        let buffered = BufReader::with_capacity(1 << 16, file);
        let (reader, plain): (Box<dyn Read>, bool) = match path.extension().and_then(|extension| extension.to_str()) {
            Some("gz") => (Box::new(MultiGzDecoder::new(buffered)), false),
            Some("xz") => (Box::new(XzReader::new_mem_limit(buffered, true, XZ_MEMORY_KIB)), false),
            _ => (Box::new(buffered), true),
        };
        Ok(DataFile { path: path.to_owned(), reader, stored, plain })
    }

    /// An error about this file.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::data(format!("{}: {what}", self.path.display()))
    }

    /// The most bytes that this file may hold once decompressed.
    fn most(&self) -> u64 {
        if self.plain { self.stored } else { EXPANSION_FREE + EXPANSION * self.stored }
    }

    /// The next `count` bytes, which are `what`. Memory grows with what is really there, not with what a header says.
    pub fn exactly(&mut self, count: u64, what: &str) -> Result<Vec<u8>> {
        let (stored, most) = (self.stored, self.most());
        if count > most {
            return Err(self.error(format!(
                "{count} bytes of {what} were expected; a file of {stored} bytes cannot hold them: it is truncated, or its \
                 header is damaged"
            )));
        }
        let bytes = self.up_to(count)?;
        if (bytes.len() as u64) < count {
            let found = bytes.len();
            return Err(self.error(format!("truncated: {count} bytes of {what} were expected, {found} are there")));
        }
        Ok(bytes)
    }

    /// Everything to the end of the file.
    pub fn all(&mut self) -> Result<Vec<u8>> {
        let most = self.most();
        let bytes = self.up_to(most + 1)?;
        if bytes.len() as u64 > most {
            return Err(
                self.error(format!("{} bytes expand to more than {most}; this is no set of images", self.stored))
            );
        }
        Ok(bytes)
    }

    /// Checks that nothing follows `what`; of a compressed file, also the checksum at its end.
    pub fn end(&mut self, what: &str) -> Result<()> {
        match self.up_to(1)?.is_empty() {
            true => Ok(()),
            false => Err(self.error(format!("oversized: there are more bytes behind {what}"))),
        }
    }

    fn up_to(&mut self, count: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader
            .by_ref()
            .take(count)
            .read_to_end(&mut bytes)
            .or_kind(Kind::Data, format_args!("reading {}", self.path.display()))?;
        Ok(bytes)
    }
}

/// Names of the files in a folder, sorted.
pub fn list(folder: &Path) -> Result<Vec<String>> {
    let doing = format!("opening the folder {}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).or_kind(Kind::Data, &doing)? {
        names.push(entry.or_kind(Kind::Data, &doing)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Lets this process have so many more files open. ImageNet's 1,152 are more than the 1,024 that are usually allowed at
/// first; any process may go up to its hard limit. If that is not enough, opening them fails and says so.
pub fn raise_limit(files: usize) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < files as u64 + 512) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}

/// What is missing and how to get it.
pub fn advice(names: &[&str], fetch: &str) -> String {
    format!("{} (or .gz, .xz) not found; `scripts/fetch-data.sh NAME` downloads NAME = {fetch}", names.join(" or "))
}

/// The first few names of a folder's listing.
pub fn summary(listing: &[String]) -> String {
    const SHOWN: usize = 8;
    match listing.len() {
        0 => "nothing".to_string(),
        1..=SHOWN => listing.join(", "),
        more => format!("{} and {} more", listing[..SHOWN].join(", "), more - SHOWN),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::io::Write;

    pub fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    pub fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// The text of an error, which must be of kind `Data`.
    pub fn message<T>(result: Result<T>) -> String {
        let error = result.err().expect("an error");
        assert_eq!(error.kind(), Kind::Data);
        error.to_string()
    }

    /// A flipped bit in the data shows in the checksum at the end, which `end` reads.
    #[test]
    fn the_checksum_of_a_compressed_file_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        for (name, mut packed) in [("a.gz", gzip(&[7; 100])), ("a.xz", xz(&[7; 100]))] {
            let path = folder.path().join(name);
            fs::write(&path, &packed).unwrap();
            let mut file = DataFile::open(&path).unwrap();
            assert_eq!(file.exactly(100, "sevens").unwrap(), [7; 100]);
            file.end("sevens").unwrap();

            let crc = if name == "a.gz" { packed.len() - 8 } else { packed.len() - 60 };
            packed[crc] ^= 1;
            fs::write(&path, &packed).unwrap();
            let mut file = DataFile::open(&path).unwrap();
            let outcome = file.exactly(100, "sevens").and_then(|_| file.end("sevens"));
            assert!(message(outcome).contains(name));
        }
    }
}
