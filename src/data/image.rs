//! One image on its way from a file to the network, in buffers that go from sample to sample.

use crate::model::Shape;

/// An image as HWC bytes. The buffers grow to the largest image that they have held and are not allocated anew after that.
#[derive(Debug)]
pub struct Image {
    shape: Shape,
    bytes: Vec<u8>,
    /// For what it is decoded from.
    pub(super) encoded: Vec<u8>,
    /// For pixels that are not yet in their final order or colours.
    pub(super) spare: Vec<u8>,
}

impl Default for Image {
    fn default() -> Self {
        Image { shape: Shape::new(0, 0, 0), bytes: Vec::new(), encoded: Vec::new(), spare: Vec::new() }
    }
}

impl Image {
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// (H, W, C)
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.shape.len()]
    }

    /// Makes it an image of this shape. The caller writes all of its bytes: they are left from images before.
    pub fn reshape(&mut self, shape: Shape) -> &mut [u8] {
        self.shape = shape;
        room(&mut self.bytes, shape.len())
    }

    /// Like `reshape`, with the bytes of the spare buffer to make the new ones from.
    pub(super) fn reshape_from_spare(&mut self, shape: Shape) -> (&[u8], &mut [u8]) {
        self.shape = shape;
        (&self.spare, room(&mut self.bytes, shape.len()))
    }

    /// Moves the image into the spare buffer.
    pub(super) fn move_to_spare(&mut self) {
        std::mem::swap(&mut self.bytes, &mut self.spare);
    }
}

/// The first `len` bytes of a buffer that grows as needed.
pub(super) fn room(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}
