//! TFRecord files of `tf.train.Example`: `shards` finds the files of a part, `index` knows where their records lie,
//! `framing` and `example` say what is in one, `records` reads any of them by its number.
//!
//! Records are read by `pread`, not through a mapping of the file: a file that is truncated or a disk that fails while a
//! run goes on is then an error that names the record, and not a signal that kills the process. A record is one read of
//! its whole frame into a buffer that is used again and again; its CRC is checked every time, by the CPU's own instruction.
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
use super::image::Image;
use super::images::Images;
use super::sampler::Layout;
use super::{Dataset, Reading, Sets, Target};
use crate::config::raw::{DataShared, Tfrecord};
use crate::error::Result;
use crate::model::Shape;
use records::Records;
use std::cell::RefCell;
use std::sync::Arc;

/// The file of class names that is read without being asked for, and that `trainer data pack` writes.
pub const CLASS_NAMES: &str = "classes.txt";
/// Classes at most where no file names them.
const MOST_UNNAMED: usize = 1 << 16;

/// `[data] format = "tfrecord"`.
pub fn open(config: &Tfrecord, shared: &DataShared, target: Target) -> Result<Sets> {
    let Parts { train, test } = Parts::open(config)?;
    let set = |part: Labelled| -> Result<Arc<dyn Dataset>> {
        Ok(match config.raw {
            Some([h, w, c]) => {
                let classes = part.classes.len().max(target.outputs);
                Arc::new(Raw { part, shape: Shape::new(h, w, c), classes })
            }
            None => Arc::new(Images::new(Arc::new(Encoded(part)), shared, target)?),
        })
    };
    Ok(Sets { train: set(train)?, test: set(test)? })
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
    /// Of the shuffle.
    window: usize,
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
            Ok(Labelled {
                records,
                labels,
                classes: classes.clone(),
                image: config.image.clone(),
                window: config.shuffle_buffer,
            })
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
    fn image<T>(&self, index: usize, take: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        thread_local! {
            static RECORD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        RECORD.with_borrow_mut(|buffer| {
            let data = self.records.read(index, buffer)?;
            take(example::bytes(data, &self.image).map_err(|what| self.records.error(index, what))?)
        })
    }

    fn layout(&self) -> Layout {
        Layout { files: self.records.files().collect(), window: self.window }
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
    fn layout(&self) -> Option<Layout> {
        Some(self.0.layout())
    }
    fn name(&self, index: usize) -> String {
        self.0.records.name(index)
    }
}

/// Images of one shape, as HWC bytes in records.
struct Raw {
    part: Labelled,
    shape: Shape,
    /// As of encoded images, at least the model's outputs.
    classes: usize,
}

impl Dataset for Raw {
    fn len(&self) -> usize {
        self.part.labels.len()
    }
    fn shape(&self) -> Option<Shape> {
        Some(self.shape)
    }
    fn classes(&self) -> usize {
        self.classes
    }
    fn label(&self, index: usize) -> u32 {
        self.part.labels[index]
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        self.part.image(index, |bytes| {
            let (found, expected) = (bytes.len(), self.shape.len());
            if found != expected {
                let what =
                    format!("`{}` holds {found} bytes, data.raw = {} is {expected}", self.part.image, self.shape);
                return Err(self.part.records.error(index, what));
            }
            image.reshape(self.shape).copy_from_slice(bytes);
            Ok(Reading::Whole)
        })
    }
    fn class_names(&self) -> Vec<String> {
        self.part.classes.to_vec()
    }
    fn layout(&self) -> Option<Layout> {
        Some(self.part.layout())
    }
}

#[cfg(test)]
mod tests;
