//! Writes TFRecord files, with their indexes.

use super::example::{Example, Kind};
use super::framing::{OVERHEAD, frame};
use super::index::{self, Entry};
use crate::atomic_file::NewFile;
use prost::Message;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The feature of an image as a JPEG or PNG file, as TensorFlow's data sets name it.
pub const ENCODED: &str = "image/encoded";
/// The feature of an image as plain bytes.
pub const RAW: &str = "image/raw";
const LABEL: &str = "image/class/label";
const CLASS: &str = "image/class/text";

/// One file, which has no name before it is whole.
pub struct ShardWriter {
    file: BufWriter<NewFile>,
    entries: Vec<Entry>,
    bytes: u64,
}

impl ShardWriter {
    /// `mark` tells it apart from others that are being written into the folder.
    pub fn create(folder: &Path, mark: &str) -> io::Result<ShardWriter> {
        let file = BufWriter::with_capacity(1 << 18, NewFile::create(folder, mark)?);
        Ok(ShardWriter { file, entries: Vec::new(), bytes: 0 })
    }

    /// Appends a record with an image in the feature `feature`, its label, and the name of its class.
    pub fn write(&mut self, feature: &'static str, image: &[u8], label: u32, class: &str) -> io::Result<()> {
        let label = i64::from(label);
        let example =
            Example::new([(feature, Kind::bytes(image)), (LABEL, Kind::integer(label)), (CLASS, Kind::bytes(class))]);
        let data = example.encode_to_vec();
        let (header, footer) = frame(&data);
        [&header[..], &data, &footer].into_iter().try_for_each(|part| self.file.write_all(part))?;
        self.entries.push(Entry { length: data.len() as u64, label });
        self.bytes += OVERHEAD + data.len() as u64;
        Ok(())
    }

    /// Bytes written.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Flushes the file, names it, and keeps its index beside it.
    pub fn name(self, path: &Path) -> io::Result<()> {
        self.file.into_inner().map_err(|error| error.into_error())?.name(path)?;
        index::store(path, &path.metadata()?, LABEL, &self.entries)
    }
}
