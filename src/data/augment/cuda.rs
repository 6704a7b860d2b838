//! The last pass on a GPU: images cross the bus as bytes, or lie there, and are framed, mirrored, lit and normalised in one kernel,
//! with the draws and to the bits of the CPU's.

use super::{Augmenter, Draw};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Argument, Element, Kernel, Read, Source, T, Value, Write};
use crate::device::{Arena, Slice, SliceMut};
use crate::error::{Error, Result};
use crate::model::Shape;

static SOURCE: Source = Source { name: "augment", text: include_str!("augment.cu") };

/// What is done to one sample: `Placement` of `augment.cu`, where it is explained.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Placement {
    /// Its number among the images on the GPU.
    image: u32,
    top: i32,
    left: i32,
    mirrored: u32,
    light: [f32; 3],
}

// SAFETY: seven words without gaps, all of whose bits mean something.
unsafe impl bytemuck::Zeroable for Placement {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Placement {}

impl Value for Placement {
    const NAME: &'static str = "Placement";
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Sizes([u32; 5]);

// SAFETY: five words, as in the declaration.
unsafe impl Argument for Sizes {
    fn c_type() -> String {
        "Sizes".to_owned()
    }
}

impl Augmenter {
    /// What `apply` does to a sample, for the GPU, which has its pixels as image number `image`. None where they must be
    /// resampled first.
    pub fn placement(&self, source: Shape, image: u32, (seed, epoch, index): (u64, u32, u64)) -> Option<Placement> {
        let Draw { window, mirrored, lighting } = self.draw(source, seed, epoch, index);
        window.is_native().then(|| Placement {
            image,
            top: window.top as i32 - window.rows.start as i32,
            left: window.left as i32 - window.columns.start as i32,
            mirrored: mirrored.into(),
            light: lighting.map_or([0.0; 3], |multiples| [0, 1, 2].map(|channel| self.shift(multiples, channel))),
        })
    }
}

/// images, placements, tables, border, out, sizes, samples, lights
type AugmentKernel = Kernel<(Read<u8>, Read<Placement>, Read<f32>, Read<f32>, Write<T>, Sizes, u32, u32)>;

/// An `Augmenter` made ready for a GPU and images of one shape.
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
    /// For images of shape `source`, as values of type `element`.
    pub fn new(gpu: &Gpu, augmenter: &Augmenter, source: Shape, element: Element) -> Result<OnGpu> {
        let output = augmenter.output();
        let lengths = [source.h, source.w, output.h, output.w, output.c];
        let mut sizes = [0; 5];
        for (size, length) in sizes.iter_mut().zip(lengths) {
            *size = u32::try_from(length)
                .ok()
                .filter(|length| i32::try_from(*length).is_ok())
                .ok_or_else(|| Error::usage(format!("images of {source} are too large for a GPU")))?;
        }
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

    /// Writes as many samples as there are placements: images (N, H, W, C) bytes, out (samples, H, W, C).
    ///
    /// # Safety
    /// Every placement's image is there. Until the compute stream has come past it, all stay allocated, nobody else writes
    /// them, and nobody else touches `out`.
    pub unsafe fn apply(&self, images: Slice<'_>, placements: Slice<'_>, mut out: SliceMut<'_>) -> Result<()> {
        let samples = placements.bytes() / size_of::<Placement>();
        let Sizes([.., h, w, c]) = self.sizes;
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
