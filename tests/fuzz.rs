//! Damaged files: whatever the bytes say, a reader answers with data or with one error of kind `Data`, never with a panic,
//! and it never takes memory that the file does not account for.
//!
//! Each corpus is a few whole files. A case takes one, changes it, and reads all that it then holds. The changes are those
//! that find something: bits and bytes, numbers that lengths like to be, cuts, pieces moved, repeated and taken from
//! another file of the corpus; where a checksum would refuse every change at once, it is put right afterwards. The number
//! of cases is fixed and each is a function of its number, so a failure comes again: `case 1234 of idx`.
//!
//! This file's allocator counts. It allows `FREE` for what reading takes anyway (buffers, threads' first use), and `FACTOR`
//! bytes for each byte of the files: a compressed file may honestly expand a hundredfold (`data::files`), a plain one
//! must not.

use lockstep::config::raw::{Data, DataShared, Format};
use lockstep::data::image::Image;
use lockstep::data::{self, Target};
use lockstep::error::{Error, Kind, Result};
use lockstep::model::Shape;
use lockstep::optim::loss_scale::LossScale;
use lockstep::rng::{Purpose, Rng};
use lockstep::train::checkpoint::{self, State, Tensor};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

const FREE: usize = 4 << 20;

/// Calls to the allocator, in bytes.
struct Counting;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = CURRENT.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Files that one reader reads.
struct Corpus {
    name: &'static str,
    cases: u64,
    /// The file in the folder that is damaged.
    file: &'static str,
    /// What it holds when it is whole; parts of one are spliced into another.
    whole: Vec<Vec<u8>>,
    /// Files beside it.
    beside: Vec<(&'static str, Vec<u8>)>,
    /// Puts checksums right, in every second case.
    repair: fn(&mut [u8]),
    /// Reads all that the folder holds.
    read: fn(&Path) -> Result<()>,
    /// Bytes that may be taken for a byte of the damaged file, and beside that.
    factor: usize,
    free: usize,
}

/// One test for all corpora: what other threads allocate would be counted too.
#[test]
fn damaged_files_are_refused_without_panic_and_within_memory() {
    let corpora = [idx(), idx_gz(), cifar(), cifar_xz(), images(), tfrecord(), index(), checkpoint()];
    for corpus in corpora {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(corpus.file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for (name, bytes) in &corpus.beside {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        // What only the first reading takes: threads, tables.
        for whole in &corpus.whole {
            fs::write(&path, whole).unwrap();
            (corpus.read)(folder.path()).unwrap_or_else(|error| panic!("{}, undamaged: {error}", corpus.name));
        }
        let mut refused = 0;
        for case in 0..corpus.cases {
            refused += u64::from(run(&corpus, case, folder.path()));
        }
        let Corpus { name, cases, .. } = corpus;
        println!("{name}: {refused} of {cases} refused");
        assert!(refused * 10 > cases, "{name}: only {refused} of {cases} are refused; nothing is damaged here");
    }
}

/// Whether the damaged file is refused.
fn run(corpus: &Corpus, case: u64, folder: &Path) -> bool {
    let bytes = damaged(corpus, case);
    fs::write(folder.join(corpus.file), &bytes).unwrap();
    let before = CURRENT.load(Relaxed);
    PEAK.store(before, Relaxed);
    let outcome = catch_unwind(AssertUnwindSafe(|| (corpus.read)(folder)));
    let taken = PEAK.load(Relaxed) - before;
    let what = format!("case {case} of {}", corpus.name);
    let outcome = outcome.unwrap_or_else(|_| panic!("{what} panics"));
    let allowed = corpus.free + corpus.factor * bytes.len();
    assert!(taken <= allowed, "{what}: {taken} bytes for a file of {}, {allowed} are allowed", bytes.len());
    if let Err(error) = &outcome {
        assert_eq!(error.kind(), Kind::Data, "{what}: {error}");
    }
    outcome.is_err()
}

/// A whole file with one to four changes.
fn damaged(corpus: &Corpus, case: u64) -> Vec<u8> {
    let mut rng = Rng::new(case, Purpose::Test, 0, 0);
    let mut below = |n: usize| rng.below(n.max(1) as u32) as usize;
    let mut bytes = corpus.whole[below(corpus.whole.len())].clone();
    for _ in 0..1 + below(4) {
        // Half of the changes go where headers are.
        let reach = if below(2) == 0 { bytes.len().min(64) } else { bytes.len() };
        let at = below(reach);
        let end = (at + 1 + below(40)).min(bytes.len());
        match below(9) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][below(5)],
            2 | 3 => {
                let number =
                    [0, 1, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, i64::MAX as u64, u64::MAX][below(9)];
                let number =
                    [number.to_le_bytes(), number.to_be_bytes(), number.rotate_left(32).to_be_bytes()][below(3)];
                bytes.iter_mut().skip(at).zip(&number[..[4, 8][below(2)]]).for_each(|(byte, new)| *byte = *new);
            }
            4 => bytes.truncate(at),
            5 => _ = bytes.drain(at..end.max(at)),
            6 if !bytes.is_empty() => {
                let piece = bytes[at..end].to_vec();
                for _ in 0..1 + below(200) {
                    bytes.splice(at..at, piece.iter().copied());
                }
            }
            7 => {
                let other = &corpus.whole[below(corpus.whole.len())];
                let from = below(other.len());
                let piece = &other[from..(from + 1 + below(300)).min(other.len())];
                bytes.splice(at..end.max(at), piece.iter().copied());
            }
            _ => bytes.extend((0..below(30)).map(|_| below(256) as u8).collect::<Vec<_>>()),
        }
    }
    if case.is_multiple_of(2) {
        (corpus.repair)(&mut bytes);
    }
    bytes
}

/// Reads every sample of the set that this `[data]` section means.
fn read_all(section: &str) -> Result<()> {
    let format: Format = toml::from_str(section).unwrap();
    let shared = DataShared { max_pixels: MAX_PIXELS, max_image_bytes: 1 << 20, ..DataShared::default() };
    let target = Target { input: Shape::new(2, 3, 3), outputs: 2 };
    let sets = data::open(&Data { format, shared }, target, 0)?;
    for set in [sets.train, sets.test] {
        let mut image = Image::default();
        for index in 0..set.len() {
            assert!((set.label(index) as usize) < set.classes());
            set.read(index, &mut image)?;
        }
    }
    Ok(())
}

fn no_repair(_: &mut [u8]) {}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that depend on their place.
fn ramp(count: usize) -> impl Iterator<Item = u8> {
    (0..count).map(|at| (at * 31 % 251) as u8)
}

fn idx() -> Corpus {
    let header = |magic: u8, dims: &[u32]| {
        [0, 0, 8, magic].into_iter().chain(dims.iter().flat_map(|dim| dim.to_be_bytes())).collect::<Vec<u8>>()
    };
    let images = |count: u32, side: u32| {
        [header(3, &[count, side, side]), ramp((count * side * side) as usize).collect()].concat()
    };
    let labels = |count: usize| [header(1, &[count as u32]), vec![7; count]].concat();
    Corpus {
        name: "idx",
        cases: 3000,
        file: "train-images-idx3-ubyte",
        whole: vec![images(3, 28), images(3, 1)],
        beside: vec![
            ("train-labels-idx1-ubyte", labels(3)),
            ("t10k-images-idx3-ubyte", images(2, 28)),
            ("t10k-labels-idx1-ubyte", labels(2)),
        ],
        repair: no_repair,
        read: |folder| match read_all(&format!("format = \"idx\"\npath = {folder:?}")) {
            // Another shape than the test part's is not damage of a file.
            Err(error) if error.to_string().contains("both must be one shape") => Ok(()),
            outcome => outcome,
        },
        factor: 4,
        free: FREE,
    }
}

/// Of a compressed file, a hundred times its size may be read, and that twice while a vector grows.
fn idx_gz() -> Corpus {
    let plain = idx();
    Corpus {
        name: "idx.gz",
        cases: 1500,
        file: "train-images-idx3-ubyte.gz",
        whole: plain.whole.iter().map(|bytes| gzip(bytes)).collect(),
        factor: 300,
        ..plain
    }
}

const CIFAR_RECORD: usize = 1 + 3 * 32 * 32;

fn cifar() -> Corpus {
    let records = |labels: &[u8]| -> Vec<u8> {
        labels.iter().flat_map(|&label| std::iter::once(label).chain(ramp(CIFAR_RECORD - 1))).collect()
    };
    Corpus {
        name: "cifar",
        cases: 1500,
        file: "data_batch_1.bin",
        whole: vec![records(&[1, 2, 9]), records(&[0])],
        beside: vec![("test_batch.bin", records(&[3]))],
        repair: no_repair,
        read: |folder| read_all(&format!("format = \"cifar\"\npath = {folder:?}")),
        factor: 8,
        free: FREE,
    }
}

/// An xz stream may ask for a dictionary of 64 MiB, which is what `xz -9` needs to be read.
fn cifar_xz() -> Corpus {
    let plain = cifar();
    Corpus {
        name: "cifar.xz",
        cases: 1500,
        file: "data_batch_1.bin.xz",
        whole: plain.whole.iter().map(|bytes| xz(bytes)).collect(),
        factor: 800,
        free: FREE + (80 << 20),
        ..plain
    }
}

/// So many pixels are allowed; a decoder takes some bytes for each, and a PNG 16 MiB beside (`data::images`).
const MAX_PIXELS: u64 = 1 << 16;

/// JPEG, plain and progressive, and PNG in several types. A file's name does not matter.
fn images() -> Corpus {
    let (w, h) = (40, 24);
    let jpeg = |progressive: bool, colours: jpeg_encoder::ColorType, channels: usize| {
        let mut bytes = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 80);
        encoder.set_progressive(progressive);
        let pixels: Vec<u8> = ramp(w * h * channels).collect();
        encoder.encode(&pixels, w as u16, h as u16, colours).unwrap();
        bytes
    };
    let png = |colours: png::ColorType, depth: png::BitDepth, bytes_a_pixel: usize| {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, w as u32, h as u32);
        encoder.set_color(colours);
        encoder.set_depth(depth);
        encoder.set_palette(ramp(256 * 3).collect::<Vec<u8>>());
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&ramp(w * h * bytes_a_pixel).collect::<Vec<u8>>()).unwrap();
        drop(writer);
        bytes
    };
    Corpus {
        name: "images",
        cases: 6000,
        file: "a/image.jpg",
        whole: vec![
            jpeg(false, jpeg_encoder::ColorType::Rgb, 3),
            jpeg(true, jpeg_encoder::ColorType::Rgb, 3),
            jpeg(false, jpeg_encoder::ColorType::Luma, 1),
            jpeg(false, jpeg_encoder::ColorType::Cmyk, 4),
            png(png::ColorType::Rgb, png::BitDepth::Eight, 3),
            png(png::ColorType::Rgba, png::BitDepth::Sixteen, 8),
            png(png::ColorType::Indexed, png::BitDepth::Eight, 1),
        ],
        beside: vec![],
        repair: repair_png,
        read: |folder| read_all(&format!("format = \"images\"\npath = {folder:?}")),
        factor: 16,
        free: FREE + (16 << 20) + 16 * MAX_PIXELS as usize,
    }
}

/// Puts right the CRCs of a PNG's chunks: length, type, data, CRC.
fn repair_png(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(length) = bytes.get(at..at + 4).map(|length| u32::from_be_bytes(length.try_into().unwrap()) as usize)
    {
        let Some(chunk) = bytes.get_mut(at + 4..).and_then(|rest| rest.get_mut(..length + 8)) else { return };
        let (said, crc) = chunk.split_at_mut(length + 4);
        let mut right = flate2::Crc::new();
        right.update(said);
        crc.copy_from_slice(&right.sum().to_be_bytes());
        at += length + 12;
    }
}

const TFRECORD: &[u8] = include_bytes!("oracles/tfrecord.bin");

fn tfrecord_section(folder: &Path) -> String {
    format!("format = \"tfrecord\"\npath = {folder:?}\nimage = \"image/raw\"\nraw = [2, 3, 3]")
}

/// Framing, and behind it the message: in every second case all CRCs are right.
fn tfrecord() -> Corpus {
    Corpus {
        name: "tfrecord",
        cases: 6000,
        file: "train.tfrecord",
        whole: vec![TFRECORD.to_vec(), TFRECORD[..record_ends(TFRECORD)[0]].to_vec()],
        beside: vec![("test.tfrecord", TFRECORD.to_vec()), ("classes.txt", b"a\nb\nc\nd\n".to_vec())],
        repair: repair_tfrecord,
        read: |folder| {
            // A folder in its place keeps the index in memory, so each case reads the file.
            let _ = fs::create_dir(folder.join("train.tfrecord.index"));
            read_all(&tfrecord_section(folder))
        },
        factor: 16,
        free: FREE,
    }
}

/// Where records end, as long as lengths make sense.
fn record_ends(bytes: &[u8]) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut at = 0;
    while let Some(length) = bytes.get(at..at + 8) {
        let length = u64::from_le_bytes(length.try_into().unwrap());
        match usize::try_from(length).ok().and_then(|length| length.checked_add(at + 16)) {
            Some(end) if end <= bytes.len() => at = end,
            _ => break,
        }
        ends.push(at);
    }
    ends
}

fn repair_tfrecord(bytes: &mut [u8]) {
    let masked = |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let mut start = 0;
    for end in record_ends(bytes) {
        let record = &mut bytes[start..end];
        let data = record.len() - 4;
        let crcs = [masked(&record[..8]), masked(&record[12..data])];
        record[8..12].copy_from_slice(&crcs[0]);
        record[data..].copy_from_slice(&crcs[1]);
        start = end;
    }
    // One more header, of which the length makes no sense, has a right CRC too.
    if let Some(header) = bytes.get_mut(start..start + 12) {
        let crc = masked(&header[..8]);
        header[8..].copy_from_slice(&crc);
    }
}

/// A damaged index is no error but made anew; `read` counts that as refused. One that was put right and says other labels
/// or lengths is believed, until a record is not as it says.
fn index() -> Corpus {
    let read = |folder: &Path| {
        // An index belongs to a file of a certain time.
        let train = fs::File::options().write(true).open(folder.join("train.tfrecord")).unwrap();
        train.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        let index = folder.join("train.tfrecord.index");
        let before = fs::read(&index).unwrap_or_default();
        read_all(&tfrecord_section(folder))?;
        match fs::read(&index).unwrap() == before {
            true => Ok(()),
            false => Err(Error::data("made anew")),
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let beside = vec![("train.tfrecord", TFRECORD.to_vec()), ("test.tfrecord", TFRECORD.to_vec())];
    beside.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    read(folder.path()).expect_err("there was none");
    Corpus {
        name: "index",
        cases: 500,
        file: "train.tfrecord.index",
        whole: vec![fs::read(folder.path().join("train.tfrecord.index")).unwrap()],
        beside,
        repair: repair_index,
        read,
        factor: 16,
        free: FREE,
    }
}

fn repair_index(bytes: &mut [u8]) {
    if let Some((said, hash)) = bytes.split_last_chunk_mut::<32>() {
        *hash = *blake3::hash(said).as_bytes();
    }
}

fn checkpoint() -> Corpus {
    let tensor = |name: &str, shape: &[usize]| Tensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        values: ramp(shape.iter().product()).map(f32::from).collect(),
    };
    let state = State {
        run: "run".into(),
        config: "[run]\nname = \"run\"\n".into(),
        seed: 1,
        world_size: 2,
        step: 3,
        epoch: 0,
        samples: 96,
        best_accuracy: None,
        data: None,
        loss_scale: Some(LossScale { scale: 1024.0, good_steps: 5, skipped: 2, skipped_in_a_row: 0 }),
        tensors: vec![tensor("conv1.weight", &[4, 3, 3, 3]), tensor("conv1.bias", &[4]), tensor("scale", &[])],
    };
    let folder = tempfile::tempdir().unwrap();
    let path = checkpoint::save(folder.path(), 1, &state).unwrap();
    Corpus {
        name: "checkpoint",
        cases: 6000,
        file: "step-00000003.safetensors",
        whole: vec![fs::read(path).unwrap()],
        beside: vec![],
        repair: no_repair,
        read: |folder| checkpoint::load(&folder.join("step-00000003.safetensors")).map(|_| ()),
        factor: 40,
        free: FREE,
    }
}
