use super::*;
use crate::data::Reading;
use crate::data::memory::InMemory;
use raw::Augment::{HorizontalFlip, RandomCrop};

const SEED: u64 = 11;

/// Images whose bytes all differ from their neighbours'.
fn set(shape: Shape, len: usize) -> InMemory {
    let images = (0..len * shape.len()).map(|at| (at * 37 + at / 7) as u8).collect();
    InMemory::new(shape, 10, images, (0..len).map(|index| (index % 10) as u8).collect())
}

fn image_of(set: &InMemory, index: usize) -> Image {
    let mut image = Image::default();
    assert!(matches!(set.read(index, &mut image), Ok(Reading::Whole)));
    image
}

/// By the training set's own statistics.
const NORMALIZE: Augment = Augment::Normalize { statistics: raw::Statistics::TrainingSet, mean: None, std: None };

/// For images that have the model's shape.
fn native(steps: &[Augment], set: &InMemory) -> Result<Augmenter> {
    Augmenter::new(steps, set, set.shape().unwrap())
}

fn applied(augmenter: &Augmenter, image: &Image, epoch: u32, index: u32) -> Vec<f32> {
    let mut out = vec![f32::NAN; augmenter.output().len()];
    augmenter.apply(image, &mut Workspace::default(), &mut out, (SEED, epoch, index.into())).unwrap();
    out
}

/// Pixel (y, x) of the augmented image the slow way: where it came from in the original, or none in the border.
fn origin(shape: Shape, padding: usize, draw: &Drawn, y: usize, x: usize) -> Option<(usize, usize)> {
    let x = if draw.mirrored { shape.w - 1 - x } else { x };
    let (y, x) = ((y + draw.top).checked_sub(padding)?, (x + draw.left).checked_sub(padding)?);
    (y < shape.h && x < shape.w).then_some((y, x))
}

/// What must be drawn for a sample that is padded, cropped and flipped: these draws, in this order, from this stream. A run
/// that goes on from a checkpoint of an earlier version depends on it.
#[derive(Debug)]
struct Drawn {
    top: usize,
    left: usize,
    mirrored: bool,
}

fn drawn(padding: usize, epoch: u32, index: u64) -> Drawn {
    let mut rng = Rng::new(SEED, Purpose::Augment, epoch, index);
    let mut offset = || rng.below(2 * padding as u32 + 1) as usize;
    Drawn { top: offset(), left: offset(), mirrored: rng.below(2) == 1 }
}

#[test]
fn every_draw_agrees_with_the_plain_definition() {
    for shape in [Shape::new(5, 7, 1), Shape::new(6, 4, 3), Shape::new(4, 4, 2)] {
        let set = set(shape, 3);
        let steps = [RandomCrop { padding: 3 }, HorizontalFlip {}, NORMALIZE];
        let augmenter = native(&steps, &set).unwrap();
        let statistics = Statistics::of(&set, shape.c).unwrap();
        let image = image_of(&set, 1);
        let mut seen = std::collections::HashSet::new();
        for epoch in 0..2000 {
            let draw = drawn(3, epoch, 1);
            seen.insert((draw.top, draw.left, draw.mirrored));
            for (at, value) in applied(&augmenter, &image, epoch, 1).into_iter().enumerate() {
                let (y, x, c) = (at / (shape.w * shape.c), at / shape.c % shape.w, at % shape.c);
                let byte =
                    origin(shape, 3, &draw, y, x).map_or(0, |(y, x)| image.bytes()[(y * shape.w + x) * shape.c + c]);
                let expected = (f64::from(byte) / 255.0 - statistics.mean[c]) / statistics.std[c];
                assert_eq!(value, expected as f32, "{shape}, {draw:?}, y {y}, x {x}, channel {c}");
            }
        }
        assert_eq!(seen.len(), 7 * 7 * 2, "every offset, mirrored and not, comes up");
    }
}

#[test]
fn padding_after_normalize_is_zero_and_evaluation_has_no_randomness() {
    let set = set(Shape::new(4, 4, 1), 2);
    let augmenter = native(&[NORMALIZE, RandomCrop { padding: 2 }], &set).unwrap();
    let epoch = (0..).find(|&epoch| drawn(2, epoch, 0).top == 0).unwrap();
    let image = image_of(&set, 0);
    assert_eq!(applied(&augmenter, &image, epoch, 0)[..8], [0.0; 8], "two rows of border");

    let evaluation = augmenter.without_randomness();
    let plain: Vec<f32> = image.bytes().iter().map(|&byte| augmenter.tables[0][usize::from(byte)]).collect();
    assert_eq!(applied(&evaluation, &image, epoch, 0), plain);
}

#[test]
fn without_normalize_bytes_become_zero_to_one() {
    let set = InMemory::new(Shape::new(1, 3, 1), 1, vec![0, 51, 255], vec![0]);
    assert_eq!(applied(&native(&[], &set).unwrap(), &image_of(&set, 0), 0, 0), [0.0, 0.2, 1.0]);
}

#[test]
fn statistics_equal_the_two_pass_ones_for_any_number_of_threads() {
    let shape = Shape::new(3, 5, 3);
    let set = set(shape, 101);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Statistics::of(&set, shape.c).unwrap())
    };
    let statistics = on(1);
    assert_eq!(statistics, on(3));
    for c in 0..shape.c {
        let pixels: Vec<f64> = (0..set.len())
            .flat_map(|index| image_of(&set, index).bytes().to_vec().into_iter().skip(c).step_by(shape.c))
            .map(|byte| f64::from(byte) / 255.0)
            .collect();
        let mean = pixels.iter().sum::<f64>() / pixels.len() as f64;
        let variance = pixels.iter().map(|pixel| (pixel - mean).powi(2)).sum::<f64>() / pixels.len() as f64;
        assert!((statistics.mean[c] - mean).abs() < 1e-12 && (statistics.std[c] - variance.sqrt()).abs() < 1e-12);
    }
}

#[test]
fn a_constant_channel_is_only_centred() {
    let set = InMemory::new(Shape::vector(1), 1, vec![51; 4], vec![0; 4]);
    let out = applied(&native(&[NORMALIZE], &set).unwrap(), &image_of(&set, 0), 0, 0);
    assert!(out[0].abs() < 1e-7, "{out:?}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let set = set(Shape::new(4, 6, 1), 1);
    let refusal = |steps: &[raw::Augment]| native(steps, &set).unwrap_err().to_string();
    assert!(refusal(&[RandomCrop { padding: 4 }]).contains("use at most 3"));
    assert!(refusal(&[HorizontalFlip {}, NORMALIZE, HorizontalFlip {}]).contains("twice"));
}
