//! TFRecord files of `tf.train.Example`: `shards` finds the files of a part, `index` knows where their records lie,
//! `framing` and `example` say what is in one, `records` reads any of them by its number.
//!
//! Records are read by `pread`, not through a mapping of the file: a file that is truncated or a disk that fails while a
//! run goes on is then an error that names the record, and not a signal that kills the process. A record is one read of
//! its whole frame into a buffer that is used again and again; its CRC is checked every time, at some 10 GB/s.
//!
//! The order of an epoch goes through the files one after another, within a window (`order`), and every record is read by
//! exactly one rank. So what the kernel reads ahead of a record is what this rank or another one of the machine wants
//! next, and the page cache holds about one window; neither a copy of the window nor a shard of its own is kept by a rank.

mod example;
mod framing;
mod index;
mod records;
mod shards;
pub mod writer;

use super::encoded::EncodedImages;
use super::files::DataFile;
use super::sampler::Layout;
use super::{Dataset, Sets};
use crate::config::raw::Tfrecord;
use crate::error::{Error, Result};
use crate::model::Shape;
use records::Records;
use std::cell::RefCell;
use std::sync::Arc;

/// The file of class names that is read without being asked for, and that `trainer data pack` writes.
pub const CLASS_NAMES: &str = "classes.txt";
/// Classes at most where no file names them.
const MOST_UNNAMED: usize = 1 << 16;

pub fn open(config: &Tfrecord) -> Result<Sets> {
    let Parts { train, test } = Parts::open(config)?;
    let Some([h, w, c]) = config.raw else { return Err(Error::usage("encoded images: not yet")) };
    let raw = |part| Arc::new(Raw { part, shape: Shape::new(h, w, c), window: config.shuffle_buffer });
    Ok(Sets { train: raw(train), test: raw(test) })
}

/// The records of both parts.
struct Parts {
    train: Labelled,
    test: Labelled,
}

/// The records of one part, with labels that are classes.
struct Labelled {
    records: Records,
    labels: Vec<u32>,
    classes: Arc<[String]>,
    /// The feature that holds the image.
    image: String,
}

impl Parts {
    fn open(config: &Tfrecord) -> Result<Parts> {
        let [train, test] = shards::find(&config.path, config.train_files.as_deref(), config.test_files.as_deref())?;
        let [train, test] = [train, test].map(|files| Records::open(files, &config.label));
        let (train, test) = (train?, test?);
        let classes: Arc<[String]> = match class_names(config)? {
            Some(names) => names.into(),
            None => count_classes(&train, config.label_base)?,
        };
        let labelled = |records: Records| {
            let labels = check_labels(&records, config.label_base, classes.len())?;
            Ok(Labelled { records, labels, classes: classes.clone(), image: config.image.clone() })
        };
        Ok(Parts { train: labelled(train)?, test: labelled(test)? })
    }
}

/// One name a line, from the file that the configuration names or that lies beside the records.
fn class_names(config: &Tfrecord) -> Result<Option<Vec<String>>> {
    let beside = config.path.join(CLASS_NAMES);
    let path = match &config.class_names {
        Some(path) => path,
        None if beside.exists() => &beside,
        None => return Ok(None),
    };
    let mut file = DataFile::open(path)?;
    let text = String::from_utf8(file.all()?).map_err(|_| file.error("class names are text in UTF-8"))?;
    let names: Vec<String> = text.lines().map(|line| line.trim_end().to_owned()).collect();
    match names.iter().position(String::is_empty) {
        Some(line) => Err(file.error(format!("line {} is empty; a class name a line is expected", line + 1))),
        None if names.is_empty() => Err(file.error("it is empty; a class name a line is expected")),
        None => Ok(Some(names)),
    }
}

/// Without names, the classes are the labels from the base to the greatest of the training part.
fn count_classes(train: &Records, base: i64) -> Result<Arc<[String]>> {
    let greatest = (0..train.len()).max_by_key(|&index| train.labels()[index]).expect("a part has records");
    let label = train.labels()[greatest];
    match label.checked_sub(base) {
        Some(class @ 0..) if (class as usize) < MOST_UNNAMED => {
            Ok((0..=class).map(|class| (base + class).to_string()).collect())
        }
        _ => Err(train.error(
            greatest,
            format_args!(
                "label {label} with data.label_base = {base}: up to {MOST_UNNAMED} classes are counted from the labels, \
                 more need data.class_names"
            ),
        )),
    }
}

fn check_labels(records: &Records, base: i64, classes: usize) -> Result<Vec<u32>> {
    let class = |(index, &label): (usize, &i64)| {
        let class = label.checked_sub(base).and_then(|class| u32::try_from(class).ok());
        class.filter(|&class| (class as usize) < classes).ok_or_else(|| {
            let last = base + classes as i64 - 1;
            records.error(
                index,
                format_args!(
                    "label {label}; with data.label_base = {base} and {classes} classes, labels go from {base} to {last}"
                ),
            )
        })
    };
    records.labels().iter().enumerate().map(class).collect()
}

impl Labelled {
    /// Hands over the image that a record holds.
    fn image(&self, index: usize, take: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
        thread_local! {
            static RECORD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        RECORD.with_borrow_mut(|buffer| {
            let data = self.records.read(index, buffer)?;
            take(example::bytes(data, &self.image).map_err(|what| self.records.error(index, what))?)
        })
    }
}

/// JPEG or PNG files in records.
struct Encoded(Labelled);

impl EncodedImages for Encoded {
    fn len(&self) -> usize {
        self.0.labels.len()
    }
    fn classes(&self) -> &[String] {
        &self.0.classes
    }
    fn label(&self, index: usize) -> u32 {
        self.0.labels[index]
    }
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<()> {
        self.0.image(index, |image| {
            bytes.clear();
            bytes.extend_from_slice(image);
            Ok(())
        })
    }
    fn name(&self, index: usize) -> String {
        self.0.records.name(index)
    }
}

/// Images of one shape, as HWC bytes in records.
struct Raw {
    part: Labelled,
    shape: Shape,
    /// Of the shuffle.
    window: usize,
}

impl Dataset for Raw {
    fn len(&self) -> usize {
        self.part.labels.len()
    }
    fn shape(&self) -> Shape {
        self.shape
    }
    fn classes(&self) -> usize {
        self.part.classes.len()
    }
    fn label(&self, index: usize) -> u32 {
        self.part.labels[index]
    }
    fn read(&self, index: usize, image: &mut [u8]) -> Result<()> {
        self.part.image(index, |bytes| {
            if bytes.len() != image.len() {
                let (name, found, expected) = (&self.part.image, bytes.len(), image.len());
                let what = format_args!("`{name}` holds {found} bytes, data.raw = {} is {expected}", self.shape);
                return Err(self.part.records.error(index, what));
            }
            image.copy_from_slice(bytes);
            Ok(())
        })
    }
    fn layout(&self) -> Option<Layout> {
        Some(Layout { files: self.part.records.files().collect(), window: self.window })
    }
}

#[cfg(test)]
mod tests;
