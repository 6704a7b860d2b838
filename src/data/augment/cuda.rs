//! The last pass on a GPU: images cross the bus as bytes, or lie there, and are framed, mirrored, lit and normalised in one kernel,
//! with the draws and to the bits of the CPU's. What must be resampled is cut out by the CPU first.

use super::frame::Scaling;
use super::{Augmenter, Draw, Workspace};
use crate::data::image::Image;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Argument, Element, Kernel, Read, Source, T, Value, Write};
use crate::device::{Arena, Slice, SliceMut};
use crate::error::{Error, Result};

static SOURCE: Source = Source { name: "augment", text: include_str!("augment.cu") };

/// What is done to one sample: `Placement` of `augment.cu`, where it is explained.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Placement {
    /// Its number among the images on the GPU, and its height and width.
    image: u32,
    height: u32,
    width: u32,
    top: i32,
    left: i32,
    mirrored: u32,
    light: [f32; 3],
}

// SAFETY: nine words without gaps, all of whose bits mean something.
unsafe impl bytemuck::Zeroable for Placement {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Placement {}

impl Value for Placement {
    const NAME: &'static str = "Placement";
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Sizes([u32; 3]);

// SAFETY: three words, as in the declaration.
unsafe impl Argument for Sizes {
    fn c_type() -> String {
        "Sizes".to_owned()
    }
}

impl Augmenter {
    /// Whether every sample shows pixels of its image as they are, so that a GPU that has the images needs nothing more but
    /// placements. All of them then have the model's shape.
    pub fn is_native(&self) -> bool {
        self.framing.scaling == Scaling::Native
    }

    /// What `apply` does to a sample, for a GPU that has its whole image as number `image`, where `is_native`.
    pub fn placement(&self, image: u32, (seed, epoch, index): (u64, u32, u64)) -> Result<Placement> {
        if !self.is_native() {
            return Err(Error::internal("a sample that must be resampled was left to the GPU"));
        }
        let draw = self.draw(self.input, seed, epoch, index);
        let corner = (draw.window.top as i32, draw.window.left as i32);
        Ok(self.placed(&draw, image, (self.input.h, self.input.w), corner))
    }

    /// Writes the pixels that a sample shows, one row behind the other, into `out`, which has room for the model's input; on the
    /// GPU they are image number `number`. Gives what is left to be done there.
    pub fn cut(
        &self,
        image: &Image,
        workspace: &mut Workspace,
        (out, number): (&mut [u8], u32),
        (seed, epoch, index): (u64, u32, u64),
    ) -> Result<Placement> {
        let draw = self.draw(image.shape(), seed, epoch, index);
        let Workspace { resizer, resampled, .. } = workspace;
        let (pixels, stride) = self.seen(image, &draw.window, resizer, resampled)?;
        let (height, width) = (draw.window.rows.len(), draw.window.columns.len());
        let row = width * self.input.c;
        for y in 0..height {
            out[y * row..][..row].copy_from_slice(&pixels[y * stride..][..row]);
        }
        Ok(self.placed(&draw, number, (height, width), (0, 0)))
    }

    /// For an image of this height and width; at `corner` is its first pixel that the window shows.
    fn placed(
        &self,
        Draw { window, mirrored, lighting }: &Draw,
        image: u32,
        (height, width): (usize, usize),
        corner: (i32, i32),
    ) -> Placement {
        Placement {
            image,
            height: height as u32,
            width: width as u32,
            top: corner.0 - window.rows.start as i32,
            left: corner.1 - window.columns.start as i32,
            mirrored: (*mirrored).into(),
            light: lighting.map_or([0.0; 3], |multiples| [0, 1, 2].map(|channel| self.shift(multiples, channel))),
        }
    }
}

/// images, placements, tables, border, out, sizes, samples, lights
type AugmentKernel = Kernel<(Read<u8>, Read<Placement>, Read<f32>, Read<f32>, Write<T>, Sizes, u32, u32)>;

/// An `Augmenter` made ready for a GPU.
pub struct OnGpu {
    gpu: Gpu,
    element: Element,
    sizes: Sizes,
    lights: bool,
    /// (C, 256), then the border (C).
    tables: Arena,
    kernel: AugmentKernel,
}

impl OnGpu {
    /// For samples with values of type `element`.
    pub fn new(gpu: &Gpu, augmenter: &Augmenter, element: Element) -> Result<OnGpu> {
        let sizes = augmenter.output().lengths().map(|length| length as u32);
        let tables = [augmenter.tables.as_flattened(), &augmenter.border].concat();
        let memory = gpu.allocate(size_of_val(&tables[..]))?;
        // SAFETY: nobody else knows the memory yet.
        gpu.compute().copy_and_wait(Slice::from(&tables[..]), unsafe { memory.slice_mut(0..memory.bytes()) })?;
        Ok(OnGpu {
            gpu: gpu.clone(),
            element,
            sizes: Sizes(sizes),
            lights: augmenter.lighting.is_some(),
            tables: memory,
            kernel: gpu.module(&SOURCE, element)?.kernel("augment")?,
        })
    }

    /// Writes as many samples as there are placements: images (N) of bytes, with H W C bytes from one to the next, out
    /// (samples, H, W, C).
    ///
    /// # Safety
    /// Every placement's image is there. Until the compute stream has come past it, all stay allocated, nobody else writes
    /// them, and nobody else touches `out`.
    pub unsafe fn apply(&self, images: Slice<'_>, placements: Slice<'_>, mut out: SliceMut<'_>) -> Result<()> {
        let samples = placements.bytes() / size_of::<Placement>();
        let Sizes([h, w, c]) = self.sizes;
        let values = samples * (h * w * c) as usize;
        assert_eq!(out.bytes(), values * self.element.bytes(), "{samples} samples of {h}x{w}x{c}");
        let border = self.tables.bytes() - c as usize * size_of::<f32>();
        // SAFETY: written before this was made, and never again.
        let (tables, border) =
            unsafe { (self.tables.slice(0..border), self.tables.slice(border..self.tables.bytes())) };
        let arguments = (
            images.into(),
            placements.into(),
            tables.into(),
            border.into(),
            (&mut out).into(),
            self.sizes,
            samples as u32,
            u32::from(self.lights),
        );
        let grid = self.gpu.grid_over(values.div_ceil(16 / self.element.bytes()));
        // SAFETY: of these shapes; the caller vouches for the rest.
        unsafe { self.kernel.launch(self.gpu.compute(), grid, arguments) }
    }
}
