//! An image with zeros around it, so that every window of a convolution lies inside.

use super::super::super::Shape;
use super::super::super::kernels::gemm::offset;
use super::Geometry;

/// Shape (h, w, c) of the padded image; the image of shape `image` starts at row `top` and column `left` of it. What
/// reaches beyond is cut off.
pub struct Padded {
    image: Shape,
    shape: Shape,
    pub top: usize,
    pub left: usize,
    /// Nothing is to be padded: the images serve as they are.
    plain: bool,
}

impl Padded {
    /// Room for all windows of the forward pass.
    pub fn of_input(geometry: &Geometry) -> Padded {
        let Geometry { input, rows, columns, .. } = *geometry;
        let (h, w) =
            ((rows.output - 1) * rows.stride + rows.size, (columns.output - 1) * columns.stride + columns.size);
        Padded::new(input, rows.before, columns.before, h, w)
    }

    /// Room around dy for all windows of the backward pass: ceil(size / stride) - 1 rows above, and below until the last
    /// row that an input pixel meets.
    pub fn of_grad(geometry: &Geometry) -> Padded {
        let Geometry { input, output, rows, columns, .. } = *geometry;
        let (top, left) = (rows.size.div_ceil(rows.stride) - 1, columns.size.div_ceil(columns.stride) - 1);
        let h = top + (input.h - 1 + rows.before) / rows.stride + 1;
        let w = left + (input.w - 1 + columns.before) / columns.stride + 1;
        Padded::new(output, top, left, h, w)
    }

    fn new(image: Shape, top: usize, left: usize, h: usize, w: usize) -> Padded {
        let plain = top == 0 && left == 0 && h <= image.h && w <= image.w;
        let shape = if plain { image } else { Shape { h, w, c: image.c } };
        Padded { image, shape, top, left, plain }
    }

    /// Height, width and channels of a padded image.
    pub fn lengths(&self) -> [usize; 3] {
        self.shape.lengths()
    }

    /// Values of a padded image.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Scratch values that `copy` needs an image.
    pub fn copy_len(&self) -> usize {
        if self.plain { 0 } else { self.len() }
    }

    /// Place of a value among the padded images.
    pub fn at(&self, image: usize, h: usize, w: usize, c: usize) -> u32 {
        let place = ((image * self.shape.h + h) * self.shape.w + w) * self.shape.c + c;
        offset(place)
    }

    /// The padded images, in `scratch`; or the images themselves where nothing is to be padded.
    pub fn copy<'a, T: Copy + Default>(&self, images: &'a [T], scratch: &'a mut [T]) -> &'a [T] {
        if self.plain {
            return images;
        }
        let count = images.len() / self.image.len();
        for (image, padded) in images.chunks_exact(self.image.len()).zip(scratch.chunks_exact_mut(self.len())) {
            self.copy_image(image, padded);
        }
        &scratch[..count * self.len()]
    }

    fn copy_image<T: Copy + Default>(&self, image: &[T], padded: &mut [T]) {
        let Shape { h, w, c } = self.shape;
        let below = h.min(self.top + self.image.h);
        let width = self.image.w.min(w - self.left) * c;
        let (head, rest) = padded.split_at_mut(self.top * w * c);
        let (body, tail) = rest.split_at_mut((below - self.top) * w * c);
        head.fill(T::default());
        tail.fill(T::default());
        for (row, source) in body.chunks_exact_mut(w * c).zip(image.chunks_exact(self.image.w * c)) {
            let (left, row) = row.split_at_mut(self.left * c);
            let (middle, right) = row.split_at_mut(width);
            left.fill(T::default());
            middle.copy_from_slice(&source[..width]);
            right.fill(T::default());
        }
    }
}
