//! The idx format of MNIST and Fashion-MNIST (<http://yann.lecun.com/exdb/mnist>): big-endian, a magic number whose third
//! byte is the element type (8: unsigned byte) and whose fourth is the number of dimensions, the dimensions as u32, data.

use super::files::DataFile;
use super::memory::InMemory;
use super::{Dataset, Sets};
use crate::error::{Error, Result};
use crate::model::Shape;
use std::path::Path;
use std::sync::Arc;

const IMAGES: u32 = 0x0000_0803;
const LABELS: u32 = 0x0000_0801;
/// MNIST and the sets made in its image have ten; the files do not say.
const CLASSES: usize = 10;

pub fn open(folder: &Path) -> Result<Sets> {
    Ok(Sets { train: read(folder, "train")?, test: read(folder, "t10k")? })
}

fn read(folder: &Path, part: &str) -> Result<Arc<dyn Dataset>> {
    let find = |what: &str| {
        let names = [format!("{part}-{what}-ubyte"), format!("{part}-{}-ubyte", what.replacen('-', ".", 1))];
        DataFile::find(folder, &[&names[0], &names[1]], "mnist or fashion-mnist")
    };
    let (shape, images) = read_images(find("images-idx3")?)?;
    let labels = read_labels(find("labels-idx1")?)?;
    let count = images.len() / shape.len();
    if labels.len() != count {
        let folder = folder.display();
        return Err(Error::data(format!("{folder}: {part} has {count} images but {} labels", labels.len())));
    }
    Ok(Arc::new(InMemory::new(shape, CLASSES, images, labels)))
}

fn read_images(mut file: DataFile) -> Result<(Shape, Vec<u8>)> {
    let [count, h, w] = read_header::<3>(&mut file, IMAGES, "images")?;
    let images = read_data(&mut file, &[count, h, w], "images")?;
    Ok((Shape::new(h as usize, w as usize, 1), images))
}

fn read_labels(mut file: DataFile) -> Result<Vec<u8>> {
    let [count] = read_header::<1>(&mut file, LABELS, "labels")?;
    let labels = read_data(&mut file, &[count], "labels")?;
    match labels.iter().position(|&label| usize::from(label) >= CLASSES) {
        None => Ok(labels),
        Some(index) => {
            let label = labels[index];
            Err(file.error(format!("sample {index} has label {label}; labels go from 0 to {}", CLASSES - 1)))
        }
    }
}

fn read_header<const DIMS: usize>(file: &mut DataFile, magic: u32, what: &str) -> Result<[u32; DIMS]> {
    let header = file.exactly(4 + 4 * DIMS as u64, "idx header")?;
    let word =
        |at: usize| u32::from_be_bytes([header[4 * at], header[4 * at + 1], header[4 * at + 2], header[4 * at + 3]]);
    if word(0) != magic {
        let found = word(0);
        return Err(
            file.error(format!("wrong magic number {found:#010x}; an idx file of {what} begins with {magic:#010x}"))
        );
    }
    Ok(std::array::from_fn(|dim| word(1 + dim)))
}

fn read_data(file: &mut DataFile, dims: &[u32], what: &str) -> Result<Vec<u8>> {
    if dims.contains(&0) {
        return Err(file.error(format!("the set is empty: its dimensions are {dims:?}")));
    }
    let bytes = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim.into()));
    let Some(bytes) = bytes else {
        return Err(file.error(format!("the dimensions {dims:?} overflow; the header is damaged")));
    };
    let data = file.exactly(bytes, what)?;
    file.end(what)?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::files::tests::{gzip, message};
    use crate::data::image::Image;
    use proptest::prelude::*;
    use std::fs;
    use tempfile::TempDir;

    fn idx(magic: u32, dims: &[u32], data: &[u8]) -> Vec<u8> {
        let words = std::iter::once(&magic).chain(dims);
        words.flat_map(|word| word.to_be_bytes()).chain(data.iter().copied()).collect()
    }

    /// Three images of 2x5 in each part; byte k of an image file is k, the labels are 7, 0, 9.
    fn good() -> [(&'static str, Vec<u8>); 4] {
        let images = idx(IMAGES, &[3, 2, 5], &(0..30).collect::<Vec<u8>>());
        let labels = idx(LABELS, &[3], &[7, 0, 9]);
        [
            ("train-images-idx3-ubyte", images.clone()),
            ("train-labels-idx1-ubyte", labels.clone()),
            ("t10k-images-idx3-ubyte", images),
            ("t10k-labels-idx1-ubyte", labels),
        ]
    }

    fn folder(files: &[(impl AsRef<str>, Vec<u8>)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name.as_ref()), bytes).unwrap());
        folder
    }

    fn check_good(folder: &TempDir) {
        let sets = open(folder.path()).unwrap();
        for set in [sets.train, sets.test] {
            assert_eq!((set.len(), set.shape(), set.classes()), (3, Some(Shape::new(2, 5, 1)), 10));
            assert_eq!([0, 1, 2].map(|index| set.label(index)), [7, 0, 9]);
            let mut image = Image::default();
            set.read(2, &mut image).unwrap();
            assert_eq!(image.bytes(), [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]);
        }
    }

    #[test]
    fn reads_plain_gzipped_and_dotted_files() {
        check_good(&folder(&good()));
        check_good(&folder(&good().map(|(name, bytes)| (format!("{name}.gz"), gzip(&bytes)))));
        check_good(&folder(&good().map(|(name, bytes)| (name.replace("-idx", ".idx"), bytes))));
    }

    /// Opens the good set with one training file replaced, and returns the error.
    fn refusal(file: &str, bytes: Vec<u8>) -> String {
        let folder = folder(&good());
        fs::remove_file(folder.path().join(file.trim_end_matches(".gz"))).unwrap();
        fs::write(folder.path().join(file), bytes).unwrap();
        message(open(folder.path()))
    }

    #[test]
    fn damage_has_one_clear_error() {
        let (images, labels) = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte");
        let [(_, good_images), ..] = good();
        for (file, bytes, expected) in [
            (
                images,
                idx(LABELS, &[3, 2, 5], &[0; 30]),
                "wrong magic number 0x00000801; an idx file of images begins with",
            ),
            (images, vec![0, 0, 8], "16 bytes of idx header were expected; a file of 3 bytes cannot hold them"),
            (images, idx(IMAGES, &[3, 2, 5], &[0; 29]), "truncated: 30 bytes of images were expected, 29 are there"),
            (images, idx(IMAGES, &[3, 2, 5], &[0; 31]), "oversized"),
            (images, idx(IMAGES, &[u32::MAX; 3], &[0; 30]), "overflow"),
            (images, idx(IMAGES, &[u32::MAX, 28, 28], &[0; 30]), "cannot hold them"),
            (images, idx(IMAGES, &[0, 2, 5], &[]), "the set is empty"),
            (images, idx(IMAGES, &[2, 2, 5], &[0; 20]), "train has 2 images but 3 labels"),
            (labels, idx(LABELS, &[3], &[7, 10, 9]), "sample 1 has label 10; labels go from 0 to 9"),
            ("train-images-idx3-ubyte.gz", gzip(&good_images)[..20].to_vec(), "reading"),
            ("train-images-idx3-ubyte.gz", gzip(&idx(IMAGES, &[1 << 30, 28, 28], &[0; 30])), "cannot hold them"),
        ] {
            let error = refusal(file, bytes);
            assert!(error.contains(expected) && error.contains("train"), "{expected}: {error}");
        }
    }

    #[test]
    fn what_is_missing_is_listed_with_what_is_there() {
        let missing = message(open(Path::new("no/such/folder")));
        assert!(missing.contains("no/such/folder") && missing.contains("scripts/fetch-data.sh"), "{missing}");
        let missing = message(open(folder(&[("notes.txt", vec![])]).path()));
        assert!(missing.contains("train-images-idx3-ubyte or train-images.idx3-ubyte"), "{missing}");
        assert!(missing.contains("holds notes.txt") && missing.contains("mnist or fashion-mnist"), "{missing}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            file in 0usize..4, cut in 0usize..60, zip: bool,
            changes in proptest::collection::vec((0usize..60, any::<u8>()), 0..4),
        ) {
            let mut files = good().map(|(name, bytes)| (name.to_string(), bytes));
            let (name, bytes) = &mut files[file];
            if zip {
                *name += ".gz";
                *bytes = gzip(bytes);
            }
            bytes.truncate(cut.max(1));
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let folder = folder(&files);
            match open(folder.path()) {
                Ok(sets) => prop_assert!(sets.train.len() <= 30 && sets.test.len() <= 30),
                Err(error) => prop_assert_eq!(error.kind(), crate::error::Kind::Data),
            }
        }
    }
}
