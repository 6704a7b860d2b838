//! Images and filters arranged so that cuDNN takes them, or takes them faster.
//!
//! **Space to depth.** The first layer of a net has few channels, which leaves most of a matrix unit idle, and often a
//! stride s. Cut the image, with its zeros, into blocks of s x s pixels, and make each a pixel with s * s * C channels; do
//! the same to the filters, which get zeros behind them up to a multiple of s. Then a convolution with stride s is one with
//! stride 1: output (oh, ow) sees the pixels from (oh * s, ow * s) on, which is the block (oh, ow), and the filter's tap
//! (kh, kw) is tap (kh / s, kw / s), channel (kh % s, kw % s, c). The products are the same, but for some with the zeros of
//! the filters. AlexNet's 11x11 filters with stride 4 on 3 channels become 3x3 with stride 1 on 48, 432 products an
//! output instead of 363.
//!
//! **Padding.** Where there are more zeros behind the image than in front of it ("same" with an even sum), which cuDNN's
//! engines do not all know, a copy with its zeros serves: blocks of one pixel.
//!
//! Both cost a read and a write of the image, in forward and again in backward, whose scratch does not survive from one to
//! the other.

use super::super::Geometry;
use crate::device::cuda::cudnn::Convolution;
use crate::model::layers::Axis;

/// With so many channels an image fills a load of 16 bytes in any type: blocks are of no use.
const MANY_CHANNELS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrangement {
    /// Pixels of a block, along each axis.
    pub block: usize,
    /// Blocks of an image, as far as filters reach, and of a filter; down and across.
    pub image: [usize; 2],
    pub filter: [usize; 2],
}

impl Arrangement {
    /// None where cuDNN should have the image as it is.
    pub fn of(geometry: &Geometry) -> Option<Arrangement> {
        let Geometry { rows, columns, .. } = *geometry;
        let lopsided = [rows, columns].iter().any(|axis| symmetric(axis).is_none());
        match gathers(geometry) {
            true => Some(Arrangement::new(rows.stride, [rows, columns])),
            false => lopsided.then(|| Arrangement::new(1, [rows, columns])),
        }
    }

    fn new(block: usize, axes: [Axis; 2]) -> Arrangement {
        let filter = axes.map(|axis| axis.size.div_ceil(block));
        let image = [0, 1].map(|i| (axes[i].output - 1) * (axes[i].stride / block) + filter[i]);
        Arrangement { block, image, filter }
    }

    /// Values of an arranged image or filter with so many blocks.
    pub fn len(&self, blocks: [usize; 2], channels: usize) -> usize {
        blocks[0] * blocks[1] * self.block * self.block * channels
    }
}

/// Whether blocks are worth their copy.
fn gathers(geometry: &Geometry) -> bool {
    let Geometry { input, rows, columns, groups, .. } = *geometry;
    let stride = rows.stride;
    let whole = columns.stride == stride && rows.size >= stride && columns.size >= stride;
    stride > 1 && whole && groups == 1 && input.c < MANY_CHANNELS
}

/// The convolution that cuDNN computes.
pub fn convolution(geometry: &Geometry, arrangement: Option<&Arrangement>, batch: usize) -> Convolution {
    let Geometry { input, output, rows, columns, groups } = *geometry;
    let output = output.lengths();
    match arrangement {
        None => {
            let zeros = [rows, columns].map(|axis| symmetric(&axis).expect("other images are arranged"));
            Convolution {
                batch,
                input: input.lengths(),
                output,
                kernel: [rows.size, columns.size],
                stride: [rows.stride, columns.stride],
                before: zeros,
                after: zeros,
                groups,
            }
        }
        Some(&Arrangement { block, image, filter }) => Convolution {
            batch,
            input: [image[0], image[1], block * block * input.c],
            output,
            kernel: filter,
            stride: [rows.stride / block, columns.stride / block],
            before: [0; 2],
            after: [0; 2],
            groups,
        },
    }
}

/// The zeros on each side of an axis, if as many may lie behind the image as in front of it.
fn symmetric(axis: &Axis) -> Option<usize> {
    let room = (axis.input + 2 * axis.before).checked_sub(axis.size)?;
    (room / axis.stride + 1 == axis.output).then_some(axis.before)
}

#[cfg(test)]
mod tests {
    use super::super::super::Conv2d;
    use super::*;
    use crate::model::Shape;

    fn arranged(input: Shape, keys: &str) -> Option<Arrangement> {
        Arrangement::of(&toml::from_str::<Conv2d>(keys).unwrap().geometry(&[input]).unwrap())
    }

    #[test]
    fn a_first_layer_is_gathered_and_lopsided_padding_copied() {
        let image = Shape::new;
        let alexnet = Arrangement { block: 4, image: [57, 57], filter: [3, 3] };
        assert_eq!(arranged(image(227, 227, 3), "filters = 96\nkernel = 11\nstride = 4"), Some(alexnet));
        assert_eq!(arranged(image(224, 224, 3), "filters = 64\nkernel = 11\nstride = 4\npadding = 2"), Some(alexnet));
        let lopsided = Arrangement { block: 1, image: [7, 7], filter: [2, 2] };
        assert_eq!(arranged(image(6, 6, 9), "filters = 4\nkernel = 2\npadding = \"same\""), Some(lopsided));
        // Many channels, one stride, or another on each axis; zeros behind that no filter reaches.
        assert_eq!(arranged(image(27, 27, 8), "filters = 64\nkernel = 5\nstride = 2\npadding = 2"), None);
        assert_eq!(arranged(image(28, 28, 1), "filters = 32\nkernel = 3\npadding = \"same\""), None);
        assert_eq!(arranged(image(9, 9, 3), "filters = 4\nkernel = 3\nstride = [1, 2]\npadding = 1"), None);
        assert_eq!(arranged(image(8, 8, 9), "filters = 4\nkernel = 3\nstride = 2\npadding = 1"), None);
    }
}
