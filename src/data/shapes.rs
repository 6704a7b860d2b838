//! The built-in set: ten kinds of figures, drawn from (seed, index) when they are read, so a first run needs no download.
//!
//! A figure is a signed distance function in units of its own size: negative inside, positive outside, zero on the
//! outline. For each pixel its place is turned and scaled into the figure's frame, and the distance, in pixels, becomes
//! the share of the pixel that the figure covers (clamped to half a pixel on each side), which is the anti-aliasing.
//! Formulas: Quilez, "2D distance functions", <https://iquilezles.org/articles/distfunctions2d>.
//!
//! Varied: place, size, rotation, both colours, a brightness gradient over the background, noise. Kept apart: no two
//! kinds are equal under rotation, a figure is at least 14 pixels wide, wholly inside, and its colour differs from the
//! background's by at least 0.3 in every channel.

use super::image::Image;
use super::{Dataset, Reading, Sets};
use crate::error::{Error, Result};
use crate::model::Shape;
use crate::rng::{Purpose, Rng};
use std::f32::consts::TAU;
use std::sync::Arc;

const SIDE: usize = 32;
const SHAPE: Shape = Shape::new(SIDE, SIDE, 3);
/// Distance from (x, y), in a frame where the figure about fills the unit disc.
type Distance = fn(f32, f32) -> f32;
const FIGURES: [Distance; 10] = [disc, ring, square, frame, triangle, cross, star, crescent, bar, stripes];

pub fn open(train: usize, test: usize, seed: u64) -> Result<Sets> {
    if train == 0 || test == 0 || train.max(test) > u32::MAX as usize {
        return Err(Error::data(format!(
            "shapes with {train} training and {test} test images: give at least one of each"
        )));
    }
    let part = |len, part| Arc::new(Shapes { len, part, seed });
    Ok(Sets { train: part(train, 0), test: part(test, 1) })
}

/// One part; they differ in the random stream.
struct Shapes {
    len: usize,
    part: u32,
    seed: u64,
}

impl Dataset for Shapes {
    fn len(&self) -> usize {
        self.len
    }
    fn shape(&self) -> Option<Shape> {
        Some(SHAPE)
    }
    fn classes(&self) -> usize {
        FIGURES.len()
    }
    fn label(&self, index: usize) -> u32 {
        (index % FIGURES.len()) as u32
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let mut rng = Rng::new(self.seed, Purpose::Synthetic, self.part, index as u64);
        Look::draw(&mut rng).paint(FIGURES[index % FIGURES.len()], &mut rng, image.reshape(SHAPE));
        Ok(Reading::Whole)
    }
}

/// Everything about a picture but the kind of its figure and the noise.
struct Look {
    /// Pixels from the centre to the farthest point.
    radius: f32,
    centre: [f32; 2],
    /// Cosine and sine of the rotation.
    turn: [f32; 2],
    figure: [f32; 3],
    ground: [f32; 3],
    /// Brightness that the background gains a pixel to the right and down.
    gradient: [f32; 2],
    noise: f32,
}

impl Look {
    fn draw(rng: &mut Rng) -> Look {
        const MARGIN: f32 = 1.0;
        let middle = SIDE as f32 / 2.0;
        let radius = rng.range(8.5, 13.0);
        let play = middle - radius - MARGIN;
        let centre = [0; 2].map(|_| middle + rng.range(-play, play));
        let angle = rng.range(0.0, TAU);
        let ground = [0; 3].map(|_| rng.uniform());
        // Around the circle of a channel's values by 0.3 to 0.7: never nearer than 0.3, to either side.
        let figure = ground.map(|value| (value + rng.range(0.3, 0.7)).fract());
        let gradient = [0; 2].map(|_| rng.range(-0.1, 0.1) / middle);
        Look { radius, centre, turn: [angle.cos(), angle.sin()], figure, ground, gradient, noise: rng.range(0.0, 0.06) }
    }

    /// image: (SIDE, SIDE, 3) bytes.
    fn paint(&self, distance: Distance, rng: &mut Rng, image: &mut [u8]) {
        const MIDDLE: f32 = SIDE as f32 / 2.0;
        let [cos, sin] = self.turn.map(|value| value / self.radius);
        let noise_step = self.noise / 127.5;
        for (number, pixel) in image.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let x = (number % SIDE) as f32 + 0.5;
            let y = (number / SIDE) as f32 + 0.5;
            let (dx, dy) = (x - self.centre[0], y - self.centre[1]);
            let pixels = self.radius * distance(cos * dx + sin * dy, cos * dy - sin * dx);
            let cover = (0.5 - pixels).clamp(0.0, 1.0);
            let light = self.gradient[0] * (x - MIDDLE) + self.gradient[1] * (y - MIDDLE);
            let noise = rng.next_u32().to_le_bytes();
            for channel in 0..3 {
                let ground = self.ground[channel] + light;
                let clean = ground + cover * (self.figure[channel] - ground);
                let noise = noise_step * (f32::from(noise[channel]) - 127.5);
                pixel[channel] = (255.0 * (clean + noise) + 0.5) as u8;
            }
        }
    }
}

fn disc(x: f32, y: f32) -> f32 {
    length(x, y) - 0.9
}

fn ring(x: f32, y: f32) -> f32 {
    (length(x, y) - 0.77).abs() - 0.16
}

fn square(x: f32, y: f32) -> f32 {
    rectangle(x, y, 0.68, 0.68)
}

fn frame(x: f32, y: f32) -> f32 {
    rectangle(x, y, 0.55, 0.55).abs() - 0.13
}

/// Equilateral, its corners on the unit circle: the farthest of its three sides.
fn triangle(x: f32, y: f32) -> f32 {
    const HALF_SQRT_3: f32 = 0.866_025_4;
    y.max(HALF_SQRT_3 * x.abs() - 0.5 * y) - 0.5
}

fn cross(x: f32, y: f32) -> f32 {
    rectangle(x, y, 0.95, 0.27).min(rectangle(x, y, 0.27, 0.95))
}

/// Five points, folded into a tenth by two mirrors; then the distance to one edge.
fn star(x: f32, y: f32) -> f32 {
    const POINT: f32 = 0.98;
    const NOTCH: f32 = 0.42;
    // The mirrors' normals lie at -36 and 216 degrees.
    const COS: f32 = 0.809_017;
    const SIN: f32 = 0.587_785_25;
    let mut p = [x.abs(), y];
    for side in [1.0, -1.0] {
        let over = 2.0 * (side * COS * p[0] - SIN * p[1]).max(0.0);
        p = [p[0] - over * side * COS, p[1] + over * SIN];
    }
    let p = [p[0].abs(), p[1] - POINT];
    let edge = [NOTCH * SIN, NOTCH * COS - POINT];
    let along = ((p[0] * edge[0] + p[1] * edge[1]) / (edge[0] * edge[0] + edge[1] * edge[1])).clamp(0.0, 1.0);
    let off = length(p[0] - edge[0] * along, p[1] - edge[1] * along);
    off.copysign(p[1] * edge[0] - p[0] * edge[1])
}

/// A disc without another one.
fn crescent(x: f32, y: f32) -> f32 {
    (length(x, y) - 0.95).max(0.75 - length(x - 0.45, y))
}

fn bar(x: f32, y: f32) -> f32 {
    rectangle(x, y, 0.95, 0.25)
}

/// Three bars side by side.
fn stripes(x: f32, y: f32) -> f32 {
    rectangle(x, y.abs() - 0.54, 0.7, 0.14).min(rectangle(x, y, 0.7, 0.14))
}

/// Half sides `a` and `b`.
fn rectangle(x: f32, y: f32, a: f32, b: f32) -> f32 {
    let (dx, dy) = (x.abs() - a, y.abs() - b);
    length(dx.max(0.0), dy.max(0.0)) + dx.max(dy).min(0.0)
}

/// `hypot` without its care for overflow, which costs most of a picture's time.
fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &dyn Dataset, index: usize) -> Vec<u8> {
        let mut image = Image::default();
        set.read(index, &mut image).unwrap();
        image.bytes().to_vec()
    }

    #[test]
    fn a_picture_is_a_function_of_seed_part_and_index() {
        let sets = open(100, 100, 1).unwrap();
        let image = read(&*sets.train, 42);
        assert_eq!(image, read(&*open(50, 1, 1).unwrap().train, 42));
        assert_ne!(image, read(&*sets.test, 42));
        assert_ne!(image, read(&*sets.train, 52));
        assert_ne!(image, read(&*open(100, 100, 2).unwrap().train, 42));
        assert_eq!(sets.train.label(42), 2);
        assert!(open(0, 1, 1).is_err());
    }

    /// Each figure lies in its frame, and each outline is where the distance says: the gradient is 1 almost everywhere.
    #[test]
    fn figures_stay_in_the_unit_disc_and_distances_are_distances() {
        let grid =
            |n: i32| (-n..=n).flat_map(move |y| (-n..=n).map(move |x| (x as f32 / n as f32, y as f32 / n as f32)));
        for (kind, distance) in FIGURES.iter().enumerate() {
            let outside = |x: f32, y: f32| x.hypot(y) > 1.0;
            assert!(grid(60).all(|(x, y)| !outside(x, y) || distance(x, y) > -1e-6), "kind {kind}");
            for (x, y) in grid(40) {
                let step = (distance(x + 0.01, y) - distance(x, y)).hypot(distance(x, y + 0.01) - distance(x, y));
                assert!(step < 0.0145, "kind {kind} at {x}, {y}: a step of 0.01 changes the distance by {step}");
            }
        }
    }

    #[test]
    fn figures_stand_out_from_the_background() {
        for index in 0..2000 {
            let look = Look::draw(&mut Rng::new(9, Purpose::Synthetic, 0, index));
            for channel in 0..3 {
                assert!((look.figure[channel] - look.ground[channel]).abs() > 0.299, "{index}");
            }
            assert!(look.centre.iter().all(|at| at - look.radius > 0.9 && at + look.radius < SIDE as f32 - 0.9));
        }
    }
}
