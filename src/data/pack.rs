//! Writes any set as TFRecord files: `train-00000-of-00004` and so on, `test-...`, an index beside each, and the names of
//! the classes. JPEG and PNG files go in as they are, other images as their bytes. The samples keep their order, so
//! training on the packed set uses them in the same order as training on the original, where both shuffle it whole.

use super::image::Image;
use super::partition::share;
use super::tfrecord::CLASS_NAMES;
use super::tfrecord::writer::{ENCODED, RAW, ShardWriter};
use super::{Dataset, Sets, class_counts, files};
use crate::atomic_file;
use crate::error::{Context, Error, Kind, Result};
use std::fs::{self, File};
use std::path::Path;

/// How a part is cut into files.
#[derive(Clone, Copy, Debug)]
pub enum Sharding {
    /// So many, with as many records each, to one; fewer where there are fewer records.
    Files(usize),
    /// A new one after so many bytes.
    Bytes(u64),
}

/// What was written of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    pub part: &'static str,
    pub files: usize,
    pub bytes: u64,
    /// Records of each class.
    pub counts: Vec<usize>,
}

/// Writes the sets into `folder`, which must be new or empty, and calls `progress` after each record. All files get their
/// names at the end: whatever interrupts it before, the folder stays empty. Returns what was written, and whether the
/// images are encoded.
pub fn pack(sets: &Sets, folder: &Path, sharding: Sharding, mut progress: impl FnMut()) -> Result<([Packed; 2], bool)> {
    let doing = format!("writing into {}", folder.display());
    fs::create_dir_all(folder).or_kind(Kind::Internal, &doing)?;
    if fs::read_dir(folder).or_kind(Kind::Internal, &doing)?.next().is_some() {
        return Err(Error::usage(format!("{} is not empty; give a new folder", folder.display())));
    }
    // Not yet named files stay open.
    files::raise_limit(1 << 16);
    let (train, encoded) = write(&*sets.train, "train", folder, sharding, &mut progress)?;
    let (test, _) = write(&*sets.test, "test", folder, sharding, &mut progress)?;

    let names = lines(&sets.train.class_names())?;
    atomic_file::replace(&folder.join(CLASS_NAMES), names.as_bytes()).or_kind(Kind::Internal, &doing)?;
    let packed = [
        name(test, &*sets.test, "test", folder).or_kind(Kind::Internal, &doing)?,
        name(train, &*sets.train, "train", folder).or_kind(Kind::Internal, &doing)?,
    ];
    File::open(folder).and_then(|folder| folder.sync_all()).or_kind(Kind::Internal, &doing)?;
    let [test, train] = packed;
    Ok(([train, test], encoded))
}

/// A class name a line.
fn lines(names: &[String]) -> Result<String> {
    let unfit = |name: &&String| name.is_empty() || name.trim_end() != name.as_str() || name.contains(['\n', '\r']);
    match names.iter().find(unfit) {
        Some(name) => Err(Error::data(format!("the class name {name:?} cannot stand in a line of {CLASS_NAMES}"))),
        None => Ok(names.iter().map(|name| format!("{name}\n")).collect()),
    }
}

/// The files of one part, whole but not named, and whether the images are encoded.
fn write(
    dataset: &dyn Dataset,
    part: &str,
    folder: &Path,
    sharding: Sharding,
    progress: &mut impl FnMut(),
) -> Result<(Vec<ShardWriter>, bool)> {
    let failed = || format!("writing the {part} part into {}", folder.display());
    let samples = dataset.len();
    let mut shards: Vec<ShardWriter> = Vec::new();
    let classes = dataset.class_names();
    let (mut stored, mut pixels) = (Vec::new(), Image::default());
    let mut encoded = false;
    for index in 0..samples {
        let full = match (sharding, shards.last()) {
            (_, None) => true,
            (Sharding::Files(files), Some(_)) => index == share(samples, shards.len(), files.min(samples)).start,
            (Sharding::Bytes(limit), Some(shard)) => shard.bytes() >= limit,
        };
        if full {
            let mark = format!("{part}-{:05}", shards.len());
            shards.push(ShardWriter::create(folder, &mark).or_kind(Kind::Internal, failed())?);
        }
        encoded = dataset.read_encoded(index, &mut stored)?;
        let (feature, image) = if encoded {
            (ENCODED, &stored[..])
        } else {
            dataset.read(index, &mut pixels)?;
            (RAW, pixels.bytes())
        };
        let (label, shard) = (dataset.label(index), shards.last_mut().expect("there is one"));
        shard.write(feature, image, label, &classes[label as usize]).or_kind(Kind::Internal, failed())?;
        progress();
    }
    Ok((shards, encoded))
}

/// Gives the files of a part their names.
fn name(shards: Vec<ShardWriter>, dataset: &dyn Dataset, part: &'static str, folder: &Path) -> std::io::Result<Packed> {
    let files = shards.len();
    let bytes = shards.iter().map(ShardWriter::bytes).sum();
    for (number, shard) in shards.into_iter().enumerate() {
        shard.name(&folder.join(format!("{part}-{number:05}-of-{files:05}")))?;
    }
    Ok(Packed { part, files, bytes, counts: class_counts(dataset) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::raw::{Data, DataShared, Format};
    use crate::data::{Reading, Target, open};
    use crate::model::Shape;
    use std::ops::Range;
    use std::sync::Arc;

    fn open_format(format: Format) -> Sets {
        let target = Target { input: Shape::new(32, 32, 3), outputs: 10 };
        open(&Data { format, shared: DataShared::default() }, target, 5).unwrap()
    }

    fn shapes(train: usize, test: usize) -> Sets {
        open_format(Format::Shapes { train, test })
    }

    fn reopen(folder: &Path) -> Sets {
        let text = format!("path = {:?}\nimage = \"image/raw\"\nraw = [32, 32, 3]", folder.display().to_string());
        open_format(Format::Tfrecord(toml::from_str(&text).unwrap()))
    }

    fn names(folder: &Path) -> Vec<String> {
        files::list(folder).unwrap()
    }

    fn assert_same(a: &dyn Dataset, b: &dyn Dataset) {
        assert_eq!((a.len(), a.shape(), a.classes()), (b.len(), b.shape(), b.classes()));
        assert_eq!(a.class_names(), b.class_names());
        let (mut left, mut right) = (Image::default(), Image::default());
        for index in 0..a.len() {
            a.read(index, &mut left).unwrap();
            b.read(index, &mut right).unwrap();
            assert!(a.label(index) == b.label(index) && left.bytes() == right.bytes(), "sample {index}");
        }
    }

    #[test]
    fn a_packed_set_is_the_set() {
        let sets = shapes(47, 3);
        // A record is 3,072 bytes of pixels and some 120 of names and framing.
        for (sharding, files) in [
            (Sharding::Files(1), [1, 1]),
            (Sharding::Files(5), [5, 3]),
            (Sharding::Bytes(30_000), [5, 1]),
            (Sharding::Bytes(1), [47, 3]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let mut records = 0;
            let (packed, encoded) = pack(&sets, folder.path(), sharding, || records += 1).unwrap();
            assert!(records == 50 && !encoded);
            let packed_again = reopen(folder.path());
            assert_same(&*sets.train, &*packed_again.train);
            assert_same(&*sets.test, &*packed_again.test);
            if let Sharding::Files(_) = sharding {
                let files = packed_again.train.layout().unwrap().files;
                let [least, most] = [files.iter().map(Range::len).min(), files.iter().map(Range::len).max()];
                assert!(most.unwrap() - least.unwrap() <= 1, "{files:?}");
            }

            for (packed, part, files, counts) in [
                (&packed[0], "train", files[0], (0..10).map(|class| 4 + usize::from(class < 7)).collect()),
                (&packed[1], "test", files[1], (0..10).map(|class| usize::from(class < 3)).collect::<Vec<_>>()),
            ] {
                let is_file = |name: &&String| name.starts_with(part) && !name.ends_with(".index");
                let sizes = names(folder.path())
                    .iter()
                    .filter(is_file)
                    .map(|name| {
                        assert!(name.ends_with(&format!("-of-{files:05}")), "{name}");
                        folder.path().join(name).metadata().unwrap().len()
                    })
                    .collect::<Vec<_>>();
                let bytes = sizes.iter().sum();
                assert_eq!(*packed, Packed { part, files, bytes, counts });
                assert_eq!(sizes.len(), files);
            }
        }
    }

    /// Indexes are written with the files: no pass over them is needed, and none replaces them.
    #[test]
    fn the_indexes_of_packed_files_are_believed() {
        let folder = tempfile::tempdir().unwrap();
        pack(&shapes(20, 10), folder.path(), Sharding::Files(2), || {}).unwrap();
        let index = folder.path().join("train-00001-of-00002.index");
        let inode = || std::os::unix::fs::MetadataExt::ino(&index.metadata().unwrap());
        let before = inode();
        reopen(folder.path());
        assert_eq!(inode(), before);
    }

    #[test]
    fn a_class_name_that_is_not_one_line_is_refused() {
        assert_eq!(lines(&["cat".into(), "sea lion".into()]).unwrap(), "cat\nsea lion\n");
        for name in ["", "a\nb", "a\rb", "behind "] {
            let error = lines(&["cat".into(), name.into()]).unwrap_err().to_string();
            assert!(error.contains(&format!("the class name {name:?} cannot stand in a line")), "{error}");
        }
    }

    /// A set that cannot be read to its end.
    struct Broken(Arc<dyn Dataset>);

    impl Dataset for Broken {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn shape(&self) -> Option<Shape> {
            self.0.shape()
        }
        fn classes(&self) -> usize {
            self.0.classes()
        }
        fn label(&self, index: usize) -> u32 {
            self.0.label(index)
        }
        fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
            match index {
                15 => Err(Error::data("sample 15 is damaged")),
                _ => self.0.read(index, image),
            }
        }
    }

    #[test]
    fn whatever_interrupts_it_nothing_is_left_and_a_full_folder_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let Sets { train, test } = shapes(20, 20);
        let broken = Sets { train, test: Arc::new(Broken(test)) };
        let error = pack(&broken, folder.path(), Sharding::Files(3), || {}).unwrap_err();
        assert_eq!(error.to_string(), "sample 15 is damaged");
        assert!(names(folder.path()).is_empty());

        fs::write(folder.path().join("mine.txt"), "").unwrap();
        let error = pack(&shapes(2, 2), folder.path(), Sharding::Files(1), || {}).unwrap_err();
        assert!(error.to_string().contains("is not empty; give a new folder"), "{error}");
        assert_eq!(names(folder.path()), ["mine.txt"]);
    }
}
