//! The idx format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist): big-endian, a magic number whose third
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
