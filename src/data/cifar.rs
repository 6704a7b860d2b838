//! CIFAR-10's binary format (https://www.cs.toronto.edu/~kriz/cifar.html): records of one label byte and 32x32 red, then
//! green, then blue bytes, row by row. All `data_batch_*.bin` in the order of their numbers are the training set.

use super::files::{self, DataFile};
use super::memory::InMemory;
use super::{Dataset, Sets};
use crate::error::{Error, Result};
use crate::model::Shape;
use std::path::Path;
use std::sync::Arc;

const SHAPE: Shape = Shape::new(32, 32, 3);
const PLANE: usize = SHAPE.h * SHAPE.w;
const RECORD: usize = 1 + SHAPE.len();
const CLASSES: usize = 10;

pub fn open(folder: &Path) -> Result<Sets> {
    let find = |name: &str| DataFile::find(folder, &[name], "cifar-10");
    let numbers = batch_numbers(folder)?;
    let train: Vec<DataFile> =
        numbers.iter().map(|number| find(&format!("data_batch_{number}.bin"))).collect::<Result<_>>()?;
    Ok(Sets { train: read(train)?, test: read(vec![find("test_batch.bin")?])? })
}

/// Numbers of the training batches that the folder holds, ascending.
fn batch_numbers(folder: &Path) -> Result<Vec<u32>> {
    let missing = || files::advice(&["data_batch_1.bin"], "cifar-10");
    let listing = files::list(folder).map_err(|error| error.context(missing()))?;
    let number = |name: &String| name.strip_prefix("data_batch_")?.split_once(".bin")?.0.parse().ok();
    let mut numbers: Vec<u32> = listing.iter().filter_map(number).collect();
    numbers.sort();
    numbers.dedup();
    if numbers.is_empty() {
        return Err(Error::data(format!("{}: {} holds {}", missing(), folder.display(), files::summary(&listing))));
    }
    Ok(numbers)
}

fn read(parts: Vec<DataFile>) -> Result<Arc<dyn Dataset>> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for mut file in parts {
        let bytes = file.all()?;
        check_size(&file, bytes.len())?;
        for (index, record) in bytes.chunks_exact(RECORD).enumerate() {
            let (label, planes) = (record[0], &record[1..]);
            if usize::from(label) >= CLASSES {
                let last = CLASSES - 1;
                return Err(file.error(format!("record {index} has label {label}; labels go from 0 to {last}")));
            }
            labels.push(label);
            images
                .extend((0..PLANE).flat_map(|pixel| [planes[pixel], planes[PLANE + pixel], planes[2 * PLANE + pixel]]));
        }
    }
    Ok(Arc::new(InMemory::new(SHAPE, CLASSES, images, labels)))
}

fn check_size(file: &DataFile, bytes: usize) -> Result<()> {
    match bytes {
        0 => Err(file.error("the set is empty")),
        _ if bytes.is_multiple_of(RECORD) => Ok(()),
        _ if bytes.is_multiple_of(RECORD + 1) => Err(file.error(format!(
            "{bytes} bytes are whole records of {}, two labels each: this is CIFAR-100; only CIFAR-10 is read",
            RECORD + 1
        ))),
        _ => Err(file.error(format!(
            "truncated or not CIFAR-10: {bytes} bytes are {} records of {RECORD} and {} bytes more",
            bytes / RECORD,
            bytes % RECORD
        ))),
    }
}
