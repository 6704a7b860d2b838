//! Windows that slide over an image: the geometry that pooling and convolution share.

mod cuda;

use super::super::Shape;
use super::addressable;
pub use cuda::DeviceWindow;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// `padding = "valid" | "same" | number`: zeros around the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected \"valid\", \"same\", or the number of zeros on each side")]
pub enum Padding {
    Named(NamedPadding),
    /// So many on each side.
    Zeros(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NamedPadding {
    /// None: every window lies inside the image.
    Valid,
    /// So many that the output has ceil(input / stride) positions; the odd one goes below and to the right.
    Same,
}

impl Default for Padding {
    fn default() -> Self {
        Padding::Named(NamedPadding::Valid)
    }
}

/// Where the windows of a layer lie on its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub rows: Axis,
    pub columns: Axis,
}

impl Window {
    /// Square windows over `input`. The error says what does not fit.
    pub fn new(input: Shape, size: usize, stride: usize, padding: Padding) -> Result<Window, String> {
        let axis = |length| Axis::new(length, size, stride, padding);
        match (axis(input.h), axis(input.w)) {
            (Some(rows), Some(columns)) => Ok(Window { rows, columns }),
            _ => {
                let padding = if let Padding::Zeros(zeros) = padding { zeros } else { 0 };
                Err(format!(
                    "a {size}x{size} window does not fit into {input} (after padding {padding}): \
                     use a smaller size, or padding"
                ))
            }
        }
    }

    /// Windows of a pooling layer, each of which must see at least one value of the image.
    pub fn for_pooling(input: Shape, size: usize, stride: Option<usize>, padding: Padding) -> Result<Window, String> {
        match padding {
            Padding::Zeros(zeros) if zeros >= size => {
                Err(format!("padding {zeros} with a {size}x{size} window: it must be below the window's size"))
            }
            _ => {
                let window = Window::new(input, size, stride.unwrap_or(size), padding)?;
                addressable("output", &window.output(input.c).lengths())?;
                Ok(window)
            }
        }
    }

    /// Shape of one value a window and channel.
    pub fn output(&self, channels: usize) -> Shape {
        Shape::new(self.rows.output, self.columns.output, channels)
    }

    /// The first tap of window (oh, ow) that lies on the image.
    #[inline(always)]
    pub fn first_tap(&self, oh: usize, ow: usize) -> usize {
        self.rows.taps(oh).start * self.columns.size + self.columns.taps(ow).start
    }

    /// Visits what window (oh, ow) sees of the image: the number of each tap, and the pixel under it.
    #[inline(always)]
    pub fn each_tap(&self, oh: usize, ow: usize, mut visit: impl FnMut(usize, usize)) {
        let columns = self.columns.taps(ow);
        for kh in self.rows.taps(oh) {
            let row = self.rows.position(oh, kh) * self.columns.input;
            for kw in columns.clone() {
                visit(kh * self.columns.size + kw, row + self.columns.position(ow, kw));
            }
        }
    }
}

/// Windows along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    pub input: usize,
    pub output: usize,
    pub size: usize,
    pub stride: usize,
    /// Zeros in front of the input.
    pub before: usize,
}

impl Axis {
    /// None where not even one window fits.
    pub fn new(input: usize, size: usize, stride: usize, padding: Padding) -> Option<Axis> {
        let (output, before) = match padding {
            Padding::Named(NamedPadding::Same) => {
                let output = input.div_ceil(stride);
                let zeros = (output.checked_sub(1)? * stride + size).saturating_sub(input);
                (output, zeros / 2)
            }
            Padding::Named(NamedPadding::Valid) => (input.checked_sub(size)? / stride + 1, 0),
            Padding::Zeros(zeros) => (zeros.checked_mul(2)?.checked_add(input)?.checked_sub(size)? / stride + 1, zeros),
        };
        Some(Axis { input, output, size, stride, before })
    }

    /// The taps of window `o` that lie on the input rather than on padding.
    #[inline(always)]
    pub fn taps(&self, o: usize) -> Range<usize> {
        let start = o * self.stride;
        self.before.saturating_sub(start)..self.size.min((self.input + self.before).saturating_sub(start))
    }

    /// The input position under tap `k` of window `o`.
    #[inline(always)]
    pub fn position(&self, o: usize, k: usize) -> usize {
        o * self.stride + k - self.before
    }

    /// The windows that see input position `i`.
    #[inline(always)]
    pub fn windows(&self, i: usize) -> Range<usize> {
        let place = i + self.before;
        (place + 1).saturating_sub(self.size).div_ceil(self.stride)..self.output.min(place / self.stride + 1)
    }

    /// The tap of window `o` that lies on input position `i`.
    #[inline(always)]
    pub fn tap(&self, o: usize, i: usize) -> usize {
        i + self.before - o * self.stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAME: Padding = Padding::Named(NamedPadding::Same);
    const VALID: Padding = Padding::Named(NamedPadding::Valid);

    /// The positions that every window sees along one axis.
    fn seen(input: usize, size: usize, stride: usize, padding: Padding) -> Vec<Vec<usize>> {
        let axis = Axis::new(input, size, stride, padding).unwrap();
        (0..axis.output).map(|o| axis.taps(o).map(|k| axis.position(o, k)).collect()).collect()
    }

    #[test]
    fn windows_lie_where_drawn() {
        assert_eq!(seen(5, 2, 2, VALID), [[0, 1], [2, 3]]);
        assert_eq!(seen(4, 3, 2, Padding::Zeros(1)), [vec![0, 1], vec![1, 2, 3]]);
        assert_eq!(seen(5, 3, 2, SAME), [vec![0, 1], vec![1, 2, 3], vec![3, 4]]);
        // One zero is enough, and it goes behind.
        assert_eq!(seen(4, 3, 2, SAME), [vec![0, 1, 2], vec![2, 3]]);
        assert_eq!(seen(3, 1, 2, SAME), [[0], [2]]);
        // A window longer than the input.
        assert_eq!(seen(2, 5, 1, SAME), [[0, 1], [0, 1]]);
    }

    #[test]
    fn a_position_is_seen_by_the_windows_that_see_it() {
        for (input, size, stride) in [(5, 2, 2), (7, 3, 2), (9, 3, 1), (8, 2, 3), (4, 9, 2), (6, 4, 5)] {
            for padding in [VALID, SAME, Padding::Zeros(1)] {
                let Some(axis) = Axis::new(input, size, stride, padding) else { continue };
                for i in 0..input {
                    let sees = |o: &usize| axis.taps(*o).any(|k| axis.position(*o, k) == i);
                    let expected: Vec<_> = (0..axis.output).filter(sees).collect();
                    assert_eq!(axis.windows(i).collect::<Vec<_>>(), expected, "{axis:?} at {i}");
                    assert!(expected.iter().all(|&o| axis.position(o, axis.tap(o, i)) == i), "{axis:?} at {i}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = |size, stride, padding| Window::new(Shape::new(3, 3, 16), size, stride, padding).unwrap_err();
        assert_eq!(
            error(5, 1, VALID),
            "a 5x5 window does not fit into 3x3x16 (after padding 0): use a smaller size, or padding"
        );
        assert!(error(9, 1, Padding::Zeros(2)).contains("(after padding 2)"));
        assert!(Window::new(Shape::new(3, 3, 1), 2, 1, Padding::Zeros(usize::MAX)).is_err());
    }

    #[test]
    fn padding_is_a_name_or_a_number() {
        #[derive(Debug, Serialize, Deserialize)]
        struct Section {
            padding: Padding,
        }
        let parse = |text: &str| toml::from_str::<Section>(text).map(|section| section.padding);
        assert_eq!(parse("padding = \"same\"").unwrap(), SAME);
        assert_eq!(parse("padding = 2").unwrap(), Padding::Zeros(2));
        for wrong in ["padding = \"some\"", "padding = -1"] {
            assert!(parse(wrong).unwrap_err().message().contains("expected \"valid\", \"same\""), "{wrong}");
        }
    }
}
