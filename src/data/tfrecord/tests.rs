use super::*;
use crate::data::files::tests::message;
use example::{Example, Kind};
use framing::frame;
use prost::Message;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Made by scripts/oracles/tfrecord.py.
const ORACLE: &[u8] = include_bytes!("../../../tests/oracles/tfrecord.bin");

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    folder
}

fn config(folder: &Path, keys: &str) -> Tfrecord {
    toml::from_str(&format!("path = {:?}\n{keys}", folder.display().to_string())).unwrap()
}

const RAW: &str = "image = \"image/raw\"\nraw = [2, 3, 3]\n";

fn open_with(config: &Tfrecord) -> Result<Sets> {
    open(config, &DataShared::default(), Target { input: Shape::new(2, 3, 3), outputs: 3 })
}

fn open_raw(folder: &Path) -> Result<Sets> {
    open_with(&config(folder, RAW))
}

/// What record `index` of the oracle holds at `at`.
fn byte(index: usize, at: usize) -> u8 {
    (index * 37 + at * 11) as u8
}

fn record(features: impl IntoIterator<Item = (&'static str, Kind)>) -> Vec<u8> {
    let data = Example::new(features).encode_to_vec();
    let (header, footer) = frame(&data);
    [&header[..], &data, &footer].concat()
}

/// Records like the oracle's, one for each label.
fn records(labels: &[i64]) -> Vec<u8> {
    let record = |(index, &label): (usize, &i64)| {
        let image: Vec<u8> = (0..18).map(|at| byte(index, at)).collect();
        record([("image/raw", Kind::bytes(image)), ("image/class/label", Kind::integer(label))])
    };
    labels.iter().enumerate().flat_map(record).collect()
}

fn labels(set: &dyn Dataset) -> Vec<u32> {
    (0..set.len()).map(|index| set.label(index)).collect()
}

fn pixels(set: &dyn Dataset, index: usize) -> Result<[u8; 18]> {
    let mut image = Image::default();
    set.read(index, &mut image)?;
    Ok(image.bytes().try_into().unwrap())
}

#[test]
fn what_tensorflow_writes_is_read() {
    let folder = folder(&[("train-00000-of-00001", ORACLE), ("validation-00000-of-00001", ORACLE)]);
    let base = format!("{RAW}label_base = 1");
    let sets = open_with(&config(folder.path(), &base)).unwrap();
    for set in [sets.train, sets.test] {
        assert_eq!((set.len(), set.shape(), set.classes()), (5, Some(Shape::new(2, 3, 3)), 3));
        assert_eq!(labels(&*set), [0, 2, 1, 2, 0]);
        for index in 0..5 {
            assert_eq!(pixels(&*set, index).unwrap(), std::array::from_fn(|at| byte(index, at)));
        }
    }
    let parts = Parts::open(&config(folder.path(), "label_base = 1")).unwrap();
    let encoded = Encoded(parts.train);
    let mut bytes = vec![1; 1000];
    for index in 0..5 {
        encoded.read(index, &mut bytes).unwrap();
        let expected = [&b"\xff\xd8 not an image, but bytes \x00 "[..], &vec![index as u8; index]].concat();
        assert_eq!(bytes, expected);
    }
    assert_eq!(encoded.classes(), ["1", "2", "3"]);
    assert!(encoded.name(3).ends_with("train-00000-of-00001, record 3"));
}

#[test]
fn records_are_numbered_through_the_files_and_files_may_be_empty() {
    let folder = folder(&[
        ("train-00000-of-00003", &records(&[0, 1])),
        ("train-00001-of-00003", &[]),
        ("train-00002-of-00003", &records(&[2, 3, 4])),
        ("test-00000-of-00001", &records(&[4])),
    ]);
    let set = open_raw(folder.path()).unwrap().train;
    assert_eq!(labels(&*set), [0, 1, 2, 3, 4]);
    let expected = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 2)];
    for (index, in_file) in expected {
        assert_eq!(pixels(&*set, index).unwrap()[1], byte(in_file, 1), "sample {index}");
    }
    assert_eq!(set.layout().unwrap(), Layout { files: vec![0..2, 2..2, 2..5], window: 10_000 });

    let records = Parts::open(&config(folder.path(), RAW)).unwrap().train.records;
    assert!(records.name(3).ends_with("train-00002-of-00003, record 1"), "{}", records.name(3));
    let (error, second) = (records.error(3, "bad").to_string(), self::records(&[2]).len());
    assert!(error.ends_with(&format!("train-00002-of-00003, record 1 at byte {second}: bad")), "{error}");
}

#[test]
fn names_of_classes_come_from_a_file() {
    let files = [("train.tfrecord", &records(&[0, 1])[..]), ("test.tfrecord", &records(&[2]))];
    let unnamed = folder(&files);
    assert!(
        message(open_raw(unnamed.path())).contains("test.tfrecord, record 0 at byte 0: label 2; with data.label_base")
    );

    let beside = folder(&[&files[..], &[("classes.txt", b"cat\ndog\nsea lion\nemu\n")]].concat());
    let parts = Parts::open(&config(beside.path(), RAW)).unwrap();
    assert_eq!(*parts.test.classes, ["cat", "dog", "sea lion", "emu"]);

    fs::write(beside.path().join("few.txt"), "cat\ndog\n\n").unwrap();
    let named = format!("{RAW}class_names = {:?}", beside.path().join("few.txt").display().to_string());
    assert!(message(open_with(&config(beside.path(), &named))).contains("few.txt: line 3 is empty"));
}

/// Whether images are encoded or raw; what is too few is refused with the model.
#[test]
fn a_model_may_have_more_outputs_than_there_are_classes() {
    let folder = folder(&[("train.tfrecord", &records(&[0, 1])), ("test.tfrecord", &records(&[1]))]);
    for keys in [RAW, ""] {
        for (outputs, classes) in [(1, 2), (2, 2), (10, 10)] {
            let target = Target { input: Shape::new(2, 3, 3), outputs };
            let sets = open(&config(folder.path(), keys), &DataShared::default(), target).unwrap();
            assert_eq!([sets.train.classes(), sets.test.classes()], [classes; 2], "{outputs} outputs, keys {keys:?}");
            assert_eq!(sets.train.class_names(), ["0", "1"]);
        }
    }
}

/// One damaged training file; the message has the file, the record, its place, and what is wrong.
#[test]
fn damage_has_one_clear_error() {
    let whole = records(&[0, 1, 0]);
    let second = records(&[0]).len();
    let changed = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let with = |features: &[(&'static str, Kind)]| [&records(&[0]), &record(features.to_vec())[..]].concat();
    let (image, label) = (("image/raw", Kind::bytes([7; 18])), ("image/class/label", Kind::integer(1)));
    for (bytes, expected) in [
        (changed(second), "the CRC of its length is"),
        (changed(second + 20), "the CRC of its data is"),
        (whole[..second + 9].to_vec(), "truncated: 9 bytes are left in the file, a record has at least 16"),
        (whole[..2 * second - 1].to_vec(), "truncated: its header says"),
        (with(std::slice::from_ref(&image)), "it has no feature `image/class/label`; it has `image/raw`"),
        (with(&[image.clone(), ("image/class/label", Kind::bytes(*b"1"))]), "holds bytes, but integers are needed"),
        (with(&[image.clone(), ("image/class/label", Kind::integer(-1))]), "label -1; with data.label_base = 0"),
        (with(&[image, ("image/class/label", Kind::integer(1 << 40))]), "need data.class_names"),
    ] {
        let folder = folder(&[("train.tfrecord", &bytes), ("test.tfrecord", &records(&[0]))]);
        let error = message(open_raw(folder.path()));
        let place = format!("train.tfrecord, record 1 at byte {second}: ");
        assert!(error.contains(&place) && error.contains(expected), "{expected}: {error}");
    }
    for (features, expected) in [
        (vec![label.clone()], "it has no feature `image/raw`"),
        (vec![("image/raw", Kind::bytes([7; 17])), label], "`image/raw` holds 17 bytes, data.raw = 2x3x3 is 18"),
    ] {
        let folder = folder(&[("train.tfrecord", &with(&features)), ("test.tfrecord", &records(&[0]))]);
        let set = open_raw(folder.path()).unwrap().train;
        pixels(&*set, 0).unwrap();
        let error = message(pixels(&*set, 1));
        assert!(error.contains("train.tfrecord, record 1 at byte") && error.contains(expected), "{expected}: {error}");
    }
}

fn index_of(folder: &Path) -> PathBuf {
    folder.join("train.tfrecord.index")
}

/// A file that changes behind its index's back, with size and time kept, is only found when the record is read: so the
/// index was used, and a record is checked each time.
#[test]
fn an_index_saves_the_pass_and_records_are_checked_when_they_are_read() {
    let folder = folder(&[("train.tfrecord", &records(&[0, 1, 0])), ("test.tfrecord", &records(&[0]))]);
    open_raw(folder.path()).unwrap();
    assert!(index_of(folder.path()).is_file());

    let path = folder.path().join("train.tfrecord");
    let modified = path.metadata().unwrap().modified().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let second = records(&[0]).len();
    bytes[second + 20] ^= 1;
    fs::write(&path, &bytes).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    let set = open_raw(folder.path()).unwrap().train;
    pixels(&*set, 0).unwrap();
    let error = message(pixels(&*set, 1));
    assert!(error.contains(&format!("record 1 at byte {second}: the CRC of its data")), "{error}");

    fs::write(&path, &bytes[..second]).unwrap();
    assert!(message(pixels(&*set, 2)).contains("record 2 at byte"), "a file that is cut while it is used");
}

#[test]
fn a_stale_or_damaged_index_is_made_anew() {
    let folder = folder(&[("train.tfrecord", &records(&[0, 1, 2])), ("test.tfrecord", &records(&[0]))]);
    let train = || open_raw(folder.path()).map(|sets| labels(&*sets.train)).unwrap();
    assert_eq!(train(), [0, 1, 2]);
    let path = folder.path().join("train.tfrecord");
    // Files written at about the same time can have the same time.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    for (labels, time) in [([1, 0, 2], later), ([2, 1, 0], later + std::time::Duration::from_nanos(1))] {
        fs::write(&path, records(&labels)).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_eq!(train(), labels.map(|label| label as u32), "another file of the same size");
    }

    let good = fs::read(index_of(folder.path())).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(index_of(folder.path()), bad).unwrap();
        assert_eq!(train(), [2, 1, 0], "byte {at}");
    }
    for length in [0, 1, 60, good.len() - 1] {
        fs::write(index_of(folder.path()), &good[..length]).unwrap();
        assert_eq!(train(), [2, 1, 0], "cut to {length}");
    }
    let wrong = [index::Entry { length: 1, label: 1 }; 3];
    index::store(&path, &path.metadata().unwrap(), "image/class/label", &wrong).unwrap();
    assert_eq!(train(), [2, 1, 0], "lengths that do not add up to the file's");
    assert_eq!(fs::read(index_of(folder.path())).unwrap(), good);

    let other = config(folder.path(), &format!("{RAW}label = \"another\""));
    assert!(message(open_with(&other)).contains("no feature `another`"), "an index of another label is not this one");
}

#[test]
fn without_a_place_for_it_the_index_stays_in_memory() {
    let folder = folder(&[("train.tfrecord", &records(&[0, 1])), ("test.tfrecord", &records(&[0]))]);
    fs::create_dir(index_of(folder.path())).unwrap();
    for _ in 0..2 {
        assert_eq!(labels(&*open_raw(folder.path()).unwrap().train), [0, 1]);
    }
    assert!(index_of(folder.path()).is_dir());
}

/// As ranks of one machine do, several open a set without indexes at the same time.
#[test]
fn ranks_that_index_at_the_same_time_find_the_same() {
    let files: Vec<(String, Vec<u8>)> =
        (0..12).map(|i| (format!("train-{i:05}-of-00012"), records(&vec![i % 3; 20 + i as usize]))).collect();
    let mut files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    let test = records(&[0]);
    files.push(("test.tfrecord", &test));
    let folder = folder(&files);
    let found: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..4).map(|_| scope.spawn(|| labels(&*open_raw(folder.path()).unwrap().train))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let expected: Vec<u32> = (0..12).flat_map(|i| vec![i % 3; 20 + i as usize]).collect();
    assert!(found.iter().all(|labels| *labels == expected));
}

/// Other programs read the label and the name of the class from where TensorFlow's data sets have them.
#[test]
fn a_written_record_has_the_features_of_tensorflows_data_sets() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.tfrecord");
    let mut shard = writer::ShardWriter::create(folder.path(), "mark").unwrap();
    let images = [(&b"first"[..], 3, "sea lion"), (b"second", 0, "cat")];
    images.iter().for_each(|(image, label, class)| shard.write(writer::ENCODED, image, *label, class).unwrap());
    shard.name(&path).unwrap();
    let file = fs::read(path).unwrap();
    let mut scanner = framing::Scanner::new(&file[..], file.len() as u64);
    for (image, label, class) in images {
        let data = scanner.next().unwrap().unwrap();
        assert_eq!(example::bytes(data, "image/encoded").unwrap(), image);
        assert_eq!(example::integer(data, "image/class/label"), Ok(label.into()));
        assert_eq!(example::bytes(data, "image/class/text").unwrap(), class.as_bytes());
    }
    assert_eq!(scanner.next(), Ok(None));
}
