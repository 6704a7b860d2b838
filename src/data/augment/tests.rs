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

/// Images of any size.
struct Sizes;

impl Dataset for Sizes {
    fn len(&self) -> usize {
        3
    }
    fn shape(&self) -> Option<Shape> {
        None
    }
    fn classes(&self) -> usize {
        1
    }
    fn label(&self, _: usize) -> u32 {
        0
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let shape = [Shape::new(7, 9, 3), Shape::new(4, 5, 3), Shape::new(30, 12, 3)][index];
        image.reshape(shape).iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 37 + at / 7 + index) as u8);
        Ok(if index == 1 { Reading::Damaged(Error::data("x")) } else { Reading::Whole })
    }
}

#[test]
fn statistics_of_images_of_any_size_count_every_pixel_and_leave_out_the_damaged() {
    let statistics = Statistics::of(&Sizes, 3).unwrap();
    let mut image = Image::default();
    let mut pixels = Vec::new();
    for index in [0, 2] {
        Sizes.read(index, &mut image).unwrap();
        pixels.extend(image.bytes().iter().skip(1).step_by(3).map(|&byte| f64::from(byte) / 255.0));
    }
    let mean = pixels.iter().sum::<f64>() / pixels.len() as f64;
    assert!((statistics.mean[1] - mean).abs() < 1e-12);
}

#[test]
fn without_a_word_on_sizes_every_image_covers_the_input_and_is_the_same_in_training_and_evaluation() {
    let input = Shape::new(6, 6, 3);
    let augmenter = Augmenter::new(&[], &Sizes, input).unwrap();
    let mut image = Image::default();
    for index in 0..3 {
        Sizes.read(index, &mut image).unwrap();
        let out = applied(&augmenter, &image, 0, index as u32);
        assert!(out.iter().all(|value| (0.0..=1.0).contains(value)));
        assert_eq!(out, applied(&augmenter.without_randomness(), &image, 7, 0));
    }
}

#[test]
fn all_draws_depend_on_seed_epoch_and_sample_alone() {
    let steps = [
        Augment::RandomResizedCrop { scale: [0.08, 1.0], ratio: [0.75, 1.33], filter: raw::Filter::Bilinear },
        HorizontalFlip {},
        Augment::Lighting { std: 0.1 },
    ];
    let augmenter = Augmenter::new(&steps, &Sizes, Shape::new(6, 6, 3)).unwrap();
    let source = Shape::new(300, 200, 3);
    let draw = augmenter.draw(source, 1, 2, 3);
    assert_eq!(draw, augmenter.draw(source, 1, 2, 3));
    for other in [augmenter.draw(source, 2, 2, 3), augmenter.draw(source, 1, 3, 3), augmenter.draw(source, 1, 2, 4)] {
        assert_ne!(draw, other);
    }
}

/// As `drawn`, with a lighting: it comes last.
#[test]
fn window_flip_and_lighting_are_drawn_in_this_order() {
    let steps = [Augment::Lighting { std: 0.1 }, HorizontalFlip {}, RandomCrop { padding: 3 }];
    let shape = Shape::new(6, 4, 3);
    let augmenter = native(&steps, &set(shape, 1)).unwrap();
    for epoch in 0..20 {
        let mut rng = Rng::new(SEED, Purpose::Augment, epoch, 4);
        let _corner = [0; 2].map(|_| rng.below(7));
        let mirrored = rng.below(2) == 1;
        let lighting = [0; 3].map(|_| 0.1 * rng.normal());
        let draw = augmenter.draw(shape, SEED, epoch, 4);
        assert_eq!((draw.mirrored, draw.lighting), (mirrored, Some(lighting)), "epoch {epoch}");
    }
}

/// A worker's buffers go from sample to sample; what was in them must not show.
#[test]
fn a_used_workspace_changes_nothing() {
    let part = Augment::RandomResizedCrop { scale: [0.08, 1.0], ratio: [0.75, 1.33], filter: raw::Filter::Bilinear };
    let augmenter = Augmenter::new(&[part, Augment::Lighting { std: 0.1 }], &Sizes, Shape::new(6, 6, 3)).unwrap();
    let (mut image, mut workspace) = (Image::default(), Workspace::default());
    for (epoch, index) in (0..4).flat_map(|epoch| [2, 0, 1].map(|index| (epoch, index))) {
        Sizes.read(index as usize, &mut image).unwrap();
        let mut out = vec![f32::NAN; augmenter.output().len()];
        augmenter.apply(&image, &mut workspace, &mut out, (SEED, epoch, index.into())).unwrap();
        assert_eq!(out, applied(&augmenter, &image, epoch, index), "epoch {epoch}, image {index}");
    }
}

#[test]
fn images_are_resized_by_the_filter_that_is_asked_for() {
    let (mut image, input) = (Image::default(), Shape::new(6, 6, 3));
    Sizes.read(2, &mut image).unwrap();
    let resize = |filter| Augment::Resize { shorter: 7, filter };
    let part = |filter| Augment::RandomResizedCrop { scale: [0.5, 1.0], ratio: [0.75, 1.33], filter };
    let out = |step| applied(&Augmenter::new(&[step], &Sizes, input).unwrap(), &image, 0, 2);
    assert_ne!(out(resize(raw::Filter::Bilinear)), out(resize(raw::Filter::Lanczos3)));
    assert_ne!(out(part(raw::Filter::Bilinear)), out(part(raw::Filter::Lanczos3)));
}

/// The shift of a channel is the same for all of its pixels; over many draws its covariance is that of ImageNet's colours,
/// times the variance of the multiples.
#[test]
fn lighting_shifts_the_channels_along_the_principal_components() {
    let steps = [
        Augment::Lighting { std: 0.1 },
        Augment::Normalize { statistics: raw::Statistics::Imagenet, mean: None, std: None },
    ];
    let shape = Shape::new(4, 4, 3);
    let set = set(shape, 1);
    let (lit, plain) = (native(&steps, &set).unwrap(), native(&steps[1..], &set).unwrap());
    let image = image_of(&set, 0);
    let dark = applied(&plain, &image, 0, 0);
    assert_eq!(applied(&lit.without_randomness(), &image, 0, 0), dark);
    let draws = 20_000;
    let mut covariance = [[0.0; 3]; 3];
    for epoch in 0..draws {
        let light = applied(&lit, &image, epoch, 0);
        let shift: [f64; 3] = std::array::from_fn(|c| f64::from(light[c] - dark[c]) * [0.229, 0.224, 0.225][c]);
        for (at, (a, b)) in light.iter().zip(&dark).enumerate() {
            assert!((f64::from(a - b) * [0.229, 0.224, 0.225][at % 3] - shift[at % 3]).abs() < 1e-5);
        }
        for (i, row) in covariance.iter_mut().enumerate() {
            row.iter_mut().enumerate().for_each(|(j, sum)| *sum += shift[i] * shift[j] / f64::from(draws));
        }
    }
    let published = [
        (0.2175, [-0.5675, -0.5808, -0.5836]),
        (0.0188, [0.7192, -0.0045, -0.6948]),
        (0.0045, [0.4009, -0.8140, 0.4203]),
    ];
    for i in 0..3 {
        for j in 0..3 {
            let terms =
                published.iter().map(|(deviation, axis): &(f64, [f64; 3])| deviation.powi(2) * axis[i] * axis[j]);
            let expected = 0.01 * terms.sum::<f64>();
            assert!((covariance[i][j] / expected - 1.0).abs() < 0.05, "{i} {j}: {} not {expected}", covariance[i][j]);
        }
    }
}

#[test]
fn given_statistics_are_used_and_steps_that_contradict_each_other_are_refused() {
    let shape = Shape::new(1, 1, 3);
    let set = InMemory::new(shape, 1, vec![255, 0, 51], vec![0]);
    let given = |mean: &[f64], std: &[f64]| Augment::Normalize {
        statistics: raw::Statistics::TrainingSet,
        mean: Some(mean.to_vec()),
        std: Some(std.to_vec()),
    };
    let out = applied(&native(&[given(&[0.5, 0.25, 0.2], &[0.5, 0.5, 2.0])], &set).unwrap(), &image_of(&set, 0), 0, 0);
    assert_eq!(out, [1.0, -0.5, 0.0]);

    let part = Augment::RandomResizedCrop { scale: [0.1, 1.0], ratio: [1.0, 2.0], filter: raw::Filter::Bilinear };
    let resize = |shorter| Augment::Resize { shorter, filter: raw::Filter::Bilinear };
    let input = Shape::new(8, 8, 3);
    for (steps, expected) in [
        (vec![part.clone(), resize(9)], "beside another crop or resize"),
        (vec![part, RandomCrop { padding: 0 }], "beside another crop or resize"),
        (vec![resize(7)], "use at least 8"),
        (
            vec![Augment::RandomResizedCrop { scale: [0.5, 0.1], ratio: [1.0, 1.0], filter: raw::Filter::Bilinear }],
            "not [least, greatest]",
        ),
        (vec![given(&[0.5], &[0.5])], "1 means and 1 standard deviations; model.input has 3 channels"),
        (vec![NORMALIZE, Augment::Lighting { std: 0.1 }], "comes first"),
        (
            vec![Augment::Normalize { statistics: raw::Statistics::TrainingSet, mean: Some(vec![0.5; 3]), std: None }],
            "give both or neither",
        ),
    ] {
        let error = check(&steps, None, input).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let small = Some(Shape::new(4, 4, 3));
    assert!(check(&[], small, input).unwrap_err().to_string().contains("write input = [4, 4, 3], or add a resize"));
    check(&[resize(8)], small, input).unwrap();
    for (step, shape, input, expected) in [
        (resize(8), None, Shape::new(6, 9, 3), "no 6x9 can be cut; use at least 9"),
        (Augment::Lighting { std: 0.1 }, None, Shape::new(8, 8, 1), "lighting, which is of colours"),
        (resize(8), Some(Shape::new(4, 4, 5)), Shape::new(8, 8, 5), "resizes images of 5 channels; at most 4 can be"),
    ] {
        let error = check(&[step], shape, input).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    check(&[], None, input).unwrap();
    assert!(check(&[resize(8)], Some(Shape::new(4, 4, 1)), input).unwrap_err().to_string().contains("write input"));
}
