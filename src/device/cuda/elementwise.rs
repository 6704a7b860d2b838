//! What is done to whole buffers outside of layers: filled, scaled, added up, converted.

use super::kernels::{Element, Kernel, Read, Source, T, Write};
use super::{Gpu, Stream};
use crate::device::{Slice, SliceMut};
use crate::error::Result;

static SOURCE: Source = Source { name: "elementwise", text: include_str!("elementwise.cu") };

/// For buffers of one type, on the compute stream.
///
/// The functions are unsafe as every launch is: the buffers stay allocated, and nobody else touches them, until the stream
/// has come past it.
pub struct Elementwise {
    gpu: Gpu,
    element: Element,
    fill: Kernel<(Write<T>, f32, u64)>,
    scale: Kernel<(Write<T>, f32, u64)>,
    add: Kernel<(Write<T>, Read<T>, u64)>,
    narrow: Kernel<(Read<f32>, Write<T>, u64)>,
    widen: Kernel<(Read<T>, Write<f32>, u64)>,
}

impl Elementwise {
    pub fn new(gpu: &Gpu, element: Element) -> Result<Elementwise> {
        let module = gpu.module(&SOURCE, element)?;
        Ok(Elementwise {
            gpu: gpu.clone(),
            element,
            fill: module.kernel("fill")?,
            scale: module.kernel("scale")?,
            add: module.kernel("add")?,
            narrow: module.kernel("narrow")?,
            widen: module.kernel("widen")?,
        })
    }

    /// `x = value`
    ///
    /// # Safety
    /// As the type says.
    pub unsafe fn fill(&self, mut x: SliceMut<'_>, value: f32) -> Result<()> {
        let n = self.values(x.bytes());
        // SAFETY: n values; the caller vouches for the rest.
        unsafe { self.fill.launch(self.gpu.compute(), self.gpu.grid_over(n), ((&mut x).into(), value, n as u64)) }
    }

    /// `x = factor x`
    ///
    /// # Safety
    /// As the type says.
    pub unsafe fn scale(&self, mut x: SliceMut<'_>, factor: f32) -> Result<()> {
        let n = self.values(x.bytes());
        // SAFETY: n values; the caller vouches for the rest.
        unsafe { self.scale.launch(self.gpu.compute(), self.gpu.grid_over(n), ((&mut x).into(), factor, n as u64)) }
    }

    /// `sum = sum + term`, of one length.
    ///
    /// # Safety
    /// As the type says.
    pub unsafe fn add(&self, mut sum: SliceMut<'_>, term: Slice<'_>) -> Result<()> {
        assert_eq!(sum.bytes(), term.bytes());
        let n = self.values(sum.bytes());
        // SAFETY: n values each; the caller vouches for the rest.
        unsafe {
            self.add.launch(self.gpu.compute(), self.gpu.grid_over(n), ((&mut sum).into(), term.into(), n as u64))
        }
    }

    /// f32 to this type, rounded to nearest even.
    ///
    /// # Safety
    /// As the type says.
    pub unsafe fn narrow(&self, x: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.narrow_in(self.gpu.compute(), x, y) }
    }

    /// The same in another stream.
    ///
    /// # Safety
    /// As the type says, of that stream.
    pub unsafe fn narrow_in(&self, stream: &Stream, x: Slice<'_>, mut y: SliceMut<'_>) -> Result<()> {
        let n = self.values(y.bytes());
        assert_eq!(x.bytes(), n * size_of::<f32>());
        // SAFETY: n values each; the caller vouches for the rest.
        unsafe { self.narrow.launch(stream, self.gpu.grid_over(n), (x.into(), (&mut y).into(), n as u64)) }
    }

    /// This type to f32.
    ///
    /// # Safety
    /// As the type says.
    pub unsafe fn widen(&self, x: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.widen_in(self.gpu.compute(), x, y) }
    }

    /// The same in another stream.
    ///
    /// # Safety
    /// As the type says, of that stream.
    pub unsafe fn widen_in(&self, stream: &Stream, x: Slice<'_>, mut y: SliceMut<'_>) -> Result<()> {
        let n = self.values(x.bytes());
        assert_eq!(y.bytes(), n * size_of::<f32>());
        // SAFETY: n values each; the caller vouches for the rest.
        unsafe { self.widen.launch(stream, self.gpu.grid_over(n), (x.into(), (&mut y).into(), n as u64)) }
    }

    fn values(&self, bytes: usize) -> usize {
        bytes / self.element.bytes()
    }
}
