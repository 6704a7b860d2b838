use super::*;
use crate::rng::Purpose;

const RATIO: [f64; 2] = [0.75, 4.0 / 3.0];

fn framing(scaling: Scaling, crop: Crop) -> Framing {
    Framing { scaling, crop, filter: raw::Filter::Bilinear }
}

fn rng(index: u64) -> Rng {
    Rng::new(5, Purpose::Test, 0, index)
}

/// Smooth, with an edge, and different in every pixel and channel.
fn picture(shape: Shape) -> Vec<u8> {
    let value = |at: usize| {
        let (y, x, c) = (at / shape.c / shape.w, at / shape.c % shape.w, at % shape.c);
        let wave = (y as f64 * 0.31 + x as f64 * 0.17 + c as f64).sin() * 60.0;
        (100.0 + wave + if 3 * x > 2 * y + 9 { 70.0 } else { 0.0 } + (at % 5) as f64) as u8
    };
    (0..shape.len()).map(value).collect()
}

/// The whole image at another size by the plain definition, in double precision: each output pixel is the mean of the input
/// pixels, weighted by the filter around its centre, which is as wide as the scale where that shrinks. Values are not rounded.
fn resized(source: &[u8], shape: Shape, (h, w): (usize, usize), filter: raw::Filter) -> Vec<f64> {
    let (kernel, support): (fn(f64) -> f64, f64) = match filter {
        raw::Filter::Bilinear => (|x| (1.0 - x.abs()).max(0.0), 1.0),
        raw::Filter::Lanczos3 => (|x| if x.abs() < 3.0 { sinc(x) * sinc(x / 3.0) } else { 0.0 }, 3.0),
    };
    let weights = |at: usize, from: usize, to: usize| {
        let scale = from as f64 / to as f64;
        let (centre, stretch) = ((at as f64 + 0.5) * scale, scale.max(1.0));
        let near = (0..from).filter(move |&x| (x as f64 + 0.5 - centre).abs() < support * stretch);
        let weights: Vec<(usize, f64)> = near.map(|x| (x, kernel((x as f64 + 0.5 - centre) / stretch))).collect();
        let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        weights.into_iter().map(move |(x, weight)| (x, weight / sum)).collect::<Vec<_>>()
    };
    let mut out = Vec::with_capacity(h * w * shape.c);
    for y in 0..h {
        let down = weights(y, shape.h, h);
        for x in 0..w {
            let across = weights(x, shape.w, w);
            for c in 0..shape.c {
                let pixel = |y: usize, x: usize| f64::from(source[(y * shape.w + x) * shape.c + c]);
                let row = |y: usize| across.iter().map(|&(x, weight)| weight * pixel(y, x)).sum::<f64>();
                out.push(down.iter().map(|&(y, weight)| weight * row(y)).sum());
            }
        }
    }
    out
}

fn sinc(x: f64) -> f64 {
    let x = x * std::f64::consts::PI;
    if x == 0.0 { 1.0 } else { x.sin() / x }
}

#[test]
fn a_window_of_the_source_is_the_crop_of_the_resized_image() {
    for (shape, input, side, filter) in [
        (Shape::new(40, 61, 3), Shape::new(17, 17, 3), 20, raw::Filter::Bilinear),
        (Shape::new(61, 40, 3), Shape::new(17, 19, 3), 23, raw::Filter::Lanczos3),
        (Shape::new(9, 11, 1), Shape::new(20, 20, 1), 24, raw::Filter::Lanczos3),
        (Shape::new(9, 11, 3), Shape::new(20, 14, 3), 20, raw::Filter::Bilinear),
        // No channel is an alpha, not the last of two or four either.
        (Shape::new(31, 23, 2), Shape::new(11, 12, 2), 14, raw::Filter::Bilinear),
        (Shape::new(23, 31, 4), Shape::new(12, 11, 4), 14, raw::Filter::Lanczos3),
    ] {
        let source = picture(shape);
        let framing = Framing { filter, ..framing(Scaling::Shorter(side), Crop::Random { padding: 3 }) };
        let (h, w) = framing.scaled(shape, input);
        let whole = resized(&source, shape, (h, w), filter);
        let mut corners = std::collections::HashSet::new();
        for number in 0..200 {
            let window = framing.draw(shape, input, &mut rng(number));
            let (mut resizer, mut out) = (Resizer::new(), vec![1; 9]);
            let out = window.resample((&source, shape), filter, &mut resizer, &mut out).unwrap();
            // The same draws, in this order.
            let mut draws = rng(number);
            let mut corner = |scaled: usize, size: usize| i64::from(draws.below((scaled + 6 - size + 1) as u32)) - 3;
            let (top, left) = (corner(h, input.h), corner(w, input.w));
            corners.insert((top, left));
            for (at, &byte) in out.iter().enumerate() {
                let (y, x, c) = (
                    at / shape.c / window.columns.len() + window.rows.start,
                    at / shape.c % window.columns.len() + window.columns.start,
                    at % shape.c,
                );
                let (from_y, from_x) = (y as i64 + top, x as i64 + left);
                assert!((0..h as i64).contains(&from_y) && (0..w as i64).contains(&from_x), "{window:?}");
                let expected = whole[(from_y as usize * w + from_x as usize) * shape.c + c].clamp(0.0, 255.0);
                // Two roundings, one a direction; Lanczos' second one is stretched by its negative weights.
                let error = (f64::from(byte) - expected).abs();
                assert!(error < 1.6, "{shape} to {h}x{w}, {window:?}, {y} {x} {c}: {byte} instead of {expected}");
            }
            let seen = |corner: i64, scaled: usize, size: usize| {
                (0..size as i64).filter(|at| (0..scaled as i64).contains(&(at + corner))).count()
            };
            assert_eq!((window.rows.len(), window.columns.len()), (seen(top, h, input.h), seen(left, w, input.w)));
        }
        assert!(corners.len() > 50, "{} corners", corners.len());
    }
}

#[test]
fn an_image_of_the_right_size_is_taken_as_it_is() {
    let shape = Shape::new(12, 10, 3);
    for scaling in [Scaling::Native, Scaling::Cover(1.0)] {
        let window = framing(scaling, Crop::Centre).draw(shape, shape, &mut rng(0));
        assert!(window.is_native());
        assert_eq!((window.top, window.left, window.rows, window.columns), (0.0, 0.0, 0..12, 0..10));
    }
    let window =
        framing(Scaling::Shorter(10), Crop::Centre).draw(Shape::new(20, 10, 3), Shape::new(10, 10, 3), &mut rng(0));
    assert!(window.is_native());
    assert_eq!((window.top, window.left, window.height), (5.0, 0.0, 10.0), "the middle");
}

/// The longer side is rounded down, as torchvision does it.
#[test]
fn the_shorter_side_becomes_what_is_asked_for_and_the_ratio_stays() {
    let scaled = |h, w| framing(Scaling::Shorter(256), Crop::Centre).scaled(Shape::new(h, w, 3), Shape::new(9, 9, 3));
    assert_eq!(scaled(171, 100), (437, 256), "437.76");
    assert_eq!(scaled(100, 171), (256, 437));
    assert_eq!(scaled(500, 375), (341, 256), "341.33");
}

#[test]
fn evaluation_takes_the_middle_of_the_covering_image() {
    let (source, input) = (Shape::new(300, 400, 3), Shape::new(224, 224, 3));
    let trained = framing(Scaling::RandomPart { area: [0.08, 1.0], ratio: RATIO }, Crop::Centre);
    let evaluated = trained.without_randomness();
    assert_eq!(evaluated.scaled(source, input), (256, 341));
    let window = evaluated.draw(source, input, &mut rng(1));
    assert_eq!(window, evaluated.draw(source, input, &mut rng(2)));
    assert_eq!((window.top, window.height), (18.75, 262.5));
    assert!((window.left - 58.0 * 400.0 / 341.0).abs() < 1e-9);
    // What is not square covers a shape that is not square either.
    let tall = framing(Scaling::Cover(1.0), Crop::Centre);
    assert_eq!(tall.scaled(Shape::new(10, 30, 3), Shape::new(40, 20, 3)), (40, 120));
    assert_eq!(tall.scaled(Shape::new(333, 1, 3), Shape::new(7, 7, 3)), (2331, 7));
}

/// With a ratio of 1 and parts that are no higher than the source no draw is refused: area and place are uniform.
#[test]
fn parts_have_uniform_area_and_place() {
    let (source, input) = (Shape::new(800, 1000, 3), Shape::new(8, 8, 3));
    let square = framing(Scaling::RandomPart { area: [0.1, 0.6], ratio: [1.0, 1.0] }, Crop::Centre);
    let (mut areas, mut places) = (Vec::new(), Vec::new());
    for number in 0..20_000 {
        let window = square.draw(source, input, &mut rng(number));
        areas.push(window.height * window.width / 8e5);
        places.push(window.top / (800.0 - window.height));
        places.push(window.left / (1000.0 - window.width));
        assert!(window.top + window.height <= 800.0 && window.left + window.width <= 1000.0);
    }
    for (values, [low, high]) in [(&mut areas, [0.1, 0.6]), (&mut places, [0.0, 1.0])] {
        values.sort_by(f64::total_cmp);
        for (number, value) in values.iter().enumerate() {
            let uniform = low + (high - low) * (number as f64 + 0.5) / values.len() as f64;
            assert!((value - uniform).abs() < 0.02, "quantile {number} is {value}, not {uniform}");
        }
    }
}

#[test]
fn the_logarithm_of_the_ratio_is_uniform_and_what_never_fits_becomes_the_middle() {
    let input = Shape::new(8, 8, 3);
    let part = framing(Scaling::RandomPart { area: [0.1, 0.2], ratio: [0.25, 1.0] }, Crop::Centre);
    let mut logs: Vec<f64> = (0..10_000)
        .map(|number| {
            let window = part.draw(Shape::new(1000, 1000, 3), input, &mut rng(number));
            (window.width / window.height).log2()
        })
        .collect();
    logs.sort_by(f64::total_cmp);
    for (number, log) in logs.iter().enumerate() {
        assert!((log - (2.0 * number as f64 / 10_000.0 - 2.0)).abs() < 0.05, "quantile {number} is {log}");
    }
    for (source, expected) in [
        (Shape::new(10, 1000, 3), [0.0, 493.0, 10.0, 13.0]),
        (Shape::new(1000, 9, 3), [494.0, 0.0, 12.0, 9.0]),
        (Shape::new(1, 1, 3), [0.0, 0.0, 1.0, 1.0]),
    ] {
        let large = framing(Scaling::RandomPart { area: [0.99, 1.0], ratio: RATIO }, Crop::Centre);
        let window = large.draw(source, input, &mut rng(0));
        assert_eq!([window.top, window.left, window.height, window.width], expected, "{source}");
    }
}

/// Of areas from 0.5 to 1 and ratios from 0.5 to 2, a part fits with probability 2 (1 - ln 2) / ln 2 - 1, or 0.443. All ten
/// draws fail with probability 0.0029; then the whole image is taken.
#[test]
fn a_part_that_does_not_fit_is_drawn_again() {
    let part = framing(Scaling::RandomPart { area: [0.5, 1.0], ratio: [0.5, 2.0] }, Crop::Centre);
    let whole = |number: &u64| {
        let window = part.draw(Shape::new(1000, 1000, 3), Shape::new(8, 8, 3), &mut rng(*number));
        (window.height, window.width) == (1000.0, 1000.0)
    };
    let count = (0..10_000).filter(whole).count();
    assert!((10..46).contains(&count), "{count} of 10,000, about 29 were expected");
}
