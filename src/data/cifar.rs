//! CIFAR-10's binary format (<https://www.cs.toronto.edu/~kriz/cifar.html>): records of one label byte and 32x32 red, then
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::files::tests::{gzip, message, xz};
    use crate::data::image::Image;
    use proptest::prelude::*;
    use std::fs;
    use tempfile::TempDir;

    /// Records that differ in every plane and pixel.
    fn records(labels: &[u8]) -> Vec<u8> {
        let record = |&label: &u8| std::iter::once(label).chain((0..3 * PLANE).map(move |at| value(label, at)));
        labels.iter().flat_map(record).collect()
    }

    fn value(label: u8, at: usize) -> u8 {
        (at % 251) as u8 ^ label.wrapping_mul(17)
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
        folder
    }

    #[test]
    fn reads_all_batches_in_the_order_of_their_numbers() {
        let folder = folder(&[
            ("data_batch_10.bin.gz", gzip(&records(&[5]))),
            ("data_batch_2.bin.xz", xz(&records(&[3, 4]))),
            ("data_batch_1.bin", records(&[1, 2])),
            ("test_batch.bin", records(&[9])),
            ("batches.meta.txt", vec![]),
        ]);
        let sets = open(folder.path()).unwrap();
        let labels: Vec<u32> = (0..sets.train.len()).map(|index| sets.train.label(index)).collect();
        assert_eq!((labels, sets.test.label(0), sets.test.len()), (vec![1, 2, 3, 4, 5], 9, 1));

        let mut image = Image::default();
        sets.train.read(3, &mut image).unwrap();
        for (at, &byte) in image.bytes().iter().enumerate() {
            let (pixel, channel) = (at / 3, at % 3);
            assert_eq!(byte, value(4, channel * PLANE + pixel), "pixel {pixel}, channel {channel}");
        }
    }

    #[test]
    fn damage_has_one_clear_error() {
        let refusal = |train: Vec<u8>| {
            message(open(folder(&[("data_batch_1.bin", train), ("test_batch.bin", records(&[1]))]).path()))
        };
        let short = RECORD - 1;
        for (train, expected) in [
            (vec![], "the set is empty".to_string()),
            (records(&[1, 2])[..2 * RECORD - 1].to_vec(), format!("1 records of {RECORD} and {short} bytes more")),
            (records(&[1, 10]), "record 1 has label 10; labels go from 0 to 9".to_string()),
            (vec![0; 2 * (RECORD + 1)], "this is CIFAR-100".to_string()),
        ] {
            let error = refusal(train);
            assert!(error.contains(&expected) && error.contains("data_batch_1.bin"), "{expected}: {error}");
        }
        let bomb = folder(&[("data_batch_1.bin.xz", xz(&vec![0; 4000 * RECORD])), ("test_batch.bin", records(&[1]))]);
        assert!(message(open(bomb.path())).contains("bytes expand to more than"));
    }

    #[test]
    fn what_is_missing_is_listed_with_what_is_there() {
        let missing = message(open(folder(&[("train.bin", vec![])]).path()));
        assert!(missing.contains("data_batch_1.bin") && missing.contains("holds train.bin"), "{missing}");
        let missing = message(open(folder(&[("data_batch_1.bin", records(&[1]))]).path()));
        assert!(missing.contains("test_batch.bin (or .gz, .xz) not found"), "{missing}");
        assert!(missing.contains("scripts/fetch-data.sh"), "{missing}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_are_read_or_refused(
            packing in 0..3, cut in 0usize..2 * RECORD, cuts: bool,
            changes in proptest::collection::vec((0usize..2 * RECORD, any::<u8>()), 0..4),
        ) {
            let plain = records(&[1, 2]);
            let (name, mut bytes) = match packing {
                0 => ("data_batch_1.bin", plain),
                1 => ("data_batch_1.bin.gz", gzip(&plain)),
                _ => ("data_batch_1.bin.xz", xz(&plain)),
            };
            if cuts {
                bytes.truncate(cut.max(1));
            }
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            match open(folder(&[(name, bytes), ("test_batch.bin", records(&[1]))]).path()) {
                Ok(sets) => prop_assert!(sets.train.len() <= 2),
                Err(error) => prop_assert_eq!(error.kind(), crate::error::Kind::Data),
            }
        }
    }
}
