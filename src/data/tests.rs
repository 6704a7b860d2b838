use super::memory::InMemory;
use super::*;
use crate::config::raw::DataShared;

/// Images of one byte, all zero.
fn labelled(classes: usize, labels: &[u8]) -> InMemory {
    InMemory::new(Shape::vector(1), classes, vec![0; labels.len()], labels.to_vec())
}

#[test]
fn balanced_weights_give_every_class_the_same_sum() {
    let set = labelled(3, &[0, 1, 1, 2, 2, 2, 0, 2, 2, 2, 2, 2]);
    assert_eq!(balanced_class_weights(&set), [2.0, 2.0, 0.5]);
}

#[test]
fn a_class_without_samples_has_no_weight_and_changes_no_other() {
    let set = labelled(6, &[0, 1, 1, 4, 4, 4, 0, 4, 4, 4, 4, 4]);
    assert_eq!(balanced_class_weights(&set), [2.0, 2.0, 0.0, 0.0, 0.5, 0.0]);
}

#[test]
fn the_fingerprint_tells_sets_apart() {
    let base = fingerprint(&labelled(3, &[0, 1, 2, 1]));
    assert_eq!(base, fingerprint(&labelled(3, &[0, 1, 2, 1])));
    assert_ne!(base, fingerprint(&labelled(3, &[0, 1, 1, 2])));
    assert_ne!(base, fingerprint(&labelled(4, &[0, 1, 2, 1])));
    assert_ne!(base, fingerprint(&labelled(3, &[0, 1, 2])));
}

#[test]
fn parts_of_different_shapes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (part, side) in [("train", 2u8), ("t10k", 3u8)] {
        let header = [0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, side, 0, 0, 0, side];
        let images: Vec<u8> = header.into_iter().chain((0..side * side).map(|_| 0)).collect();
        std::fs::write(folder.path().join(format!("{part}-images-idx3-ubyte")), images).unwrap();
        std::fs::write(folder.path().join(format!("{part}-labels-idx1-ubyte")), [0, 0, 8, 1, 0, 0, 0, 1, 0]).unwrap();
    }
    let data = Data { format: Format::Idx { path: folder.path().to_owned() }, shared: DataShared::default() };
    let error = open(&data, Target { input: Shape::new(2, 2, 1), outputs: 10 }, 0).err().unwrap();
    assert!(error.to_string().contains("training images are 2x2x1, the test images 3x3x1"), "{error}");
}
