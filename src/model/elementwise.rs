//! What is done to whole buffers between the layers, on the device where they lie.

use super::precision::{self, Precision};
use crate::device::cuda::{self, Gpu};
use crate::device::{self, Place, Slice, SliceMut};
use crate::error::Result;
use half::bf16;
use std::borrow::Cow;

/// For values of one precision. On a GPU the work is put into its compute stream; what the CPU is to see or to change is waited for.
pub enum Elementwise {
    Host(Precision),
    Cuda { gpu: Gpu, kernels: cuda::Elementwise, precision: Precision },
}

impl Elementwise {
    pub fn new(place: Place, precision: Precision) -> Result<Elementwise> {
        match place {
            Place::Host => Ok(Elementwise::Host(precision)),
            Place::Cuda => {
                let gpu = Gpu::of_this_rank()?;
                let kernels = cuda::Elementwise::new(&gpu, precision.element())?;
                Ok(Elementwise::Cuda { gpu, kernels, precision })
            }
        }
    }

    /// All bytes are 0.
    ///
    /// # Safety
    /// On a GPU: it stays allocated, and nobody else touches it, until the compute stream has come past this.
    pub unsafe fn clear(&self, mut buffer: SliceMut<'_>) -> Result<()> {
        match self {
            Elementwise::Host(_) => buffer.u8().fill(0),
            // SAFETY: the caller's promise.
            Elementwise::Cuda { gpu, .. } => unsafe { gpu.compute().zero(buffer) }?,
        }
        Ok(())
    }

    /// `sum += term`
    ///
    /// # Safety
    /// On a GPU: both stay allocated, and nobody else touches them, until the compute stream has come past it.
    pub unsafe fn add(&self, sum: SliceMut<'_>, term: Slice<'_>) -> Result<()> {
        match self {
            Elementwise::Host(Precision::F32) => device::add(sum, term),
            Elementwise::Host(Precision::Bf16) => precision::add_bf16(sum.into_bf16(), term.bf16()),
            // SAFETY: the caller's promise.
            Elementwise::Cuda { kernels, .. } => unsafe { kernels.add(sum, term) }?,
        }
        Ok(())
    }

    /// `to = from`, f32 rounded to this precision, which is not f32 itself.
    ///
    /// # Safety
    /// As for `add`.
    pub unsafe fn narrow(&self, from: Slice<'_>, to: SliceMut<'_>) -> Result<()> {
        match self {
            Elementwise::Host(_) => precision::narrow(from.f32(), to.into_bf16()),
            // SAFETY: the caller's promise.
            Elementwise::Cuda { kernels, .. } => unsafe { kernels.narrow(from, to) }?,
        }
        Ok(())
    }

    /// `to = from`, of this precision, which is not f32 itself, in f32.
    ///
    /// # Safety
    /// As for `add`.
    pub unsafe fn widen(&self, from: Slice<'_>, to: SliceMut<'_>) -> Result<()> {
        match self {
            Elementwise::Host(_) => precision::widen(from.bf16(), to.into_f32()),
            // SAFETY: the caller's promise.
            Elementwise::Cuda { kernels, .. } => unsafe { kernels.widen(from, to) }?,
        }
        Ok(())
    }

    pub fn is_finite(&self, values: Slice<'_>) -> Result<bool> {
        Ok(match self {
            Elementwise::Host(precision) => precision.is_finite(values),
            Elementwise::Cuda { gpu, precision: Precision::F32, .. } => {
                copy::<f32>(gpu, values)?.iter().all(|value| value.is_finite())
            }
            Elementwise::Cuda { gpu, precision: Precision::Bf16, .. } => {
                copy::<bf16>(gpu, values)?.iter().all(|value| value.is_finite())
            }
        })
    }

    /// f32 values for the CPU to read.
    pub fn to_host<'a>(&self, from: Slice<'a>) -> Result<Cow<'a, [f32]>> {
        match self {
            Elementwise::Host(_) => Ok(Cow::Borrowed(from.f32())),
            Elementwise::Cuda { gpu, .. } => copy(gpu, from).map(Cow::Owned),
        }
    }

    /// Lends the f32 values to the CPU for writing.
    pub fn edit<T>(&self, buffer: SliceMut<'_>, edit: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
        match self {
            Elementwise::Host(_) => Ok(edit(buffer.into_f32())),
            Elementwise::Cuda { gpu, .. } => {
                let mut values = copy::<f32>(gpu, buffer.as_slice())?;
                let result = edit(&mut values);
                gpu.compute().copy_and_wait(Slice::from(&values[..]), buffer)?;
                Ok(result)
            }
        }
    }
}

/// What a buffer holds, once the GPU has done all that was asked of it.
fn copy<T>(gpu: &Gpu, from: Slice<'_>) -> Result<Vec<T>>
where
    T: bytemuck::Pod,
    for<'a> SliceMut<'a>: From<&'a mut [T]>,
{
    let mut values = vec![T::zeroed(); from.bytes() / size_of::<T>()];
    gpu.compute().copy_and_wait(from, SliceMut::from(&mut values[..]))?;
    Ok(values)
}
