//! What a buffer is. Layers and communicators see `Slice` and `SliceMut`: a run of bytes at an address on some device.
//! A CPU kernel asks for `f32()` or `bf16()` and gets a slice; a CUDA kernel asks for `address()` and gets a device pointer. Asking
//! for the wrong one is a bug and asserts, so the choice of device is made once, where a layer is built, and nowhere else.

mod arena;
pub mod cuda;

use crate::error::Result;
pub use arena::{ALIGN, Arena};
use half::{bf16, f16};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;
use std::ops::Range;

/// Where memory lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    #[default]
    Host,
    /// A GPU's memory; the address is meaningless to the CPU.
    Cuda,
}

impl Place {
    /// Bytes to whose multiples buffers of an arena are aligned: on the CPU a cache line, on a GPU what libraries want of a
    /// workspace.
    pub const fn align(self) -> usize {
        match self {
            Place::Host => ALIGN,
            Place::Cuda => 256,
        }
    }
}

/// `[run] device`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// A GPU where one can be used, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// Where a rank computes. `Auto` is the CPU until the ranks have settled it (`train::gpus`).
pub fn choose(choice: Choice) -> Place {
    match choice {
        Choice::Auto | Choice::Cpu => Place::Host,
        Choice::Cuda => Place::Cuda,
    }
}

/// Zeroed memory of a device.
pub fn allocate(place: Place, bytes: usize) -> Result<Arena> {
    match place {
        Place::Host => Arena::host(bytes),
        Place::Cuda => cuda::Gpu::of_this_rank()?.allocate(bytes),
    }
}

/// An error where so many bytes cannot be had at once; allocates nothing.
pub fn check_room(place: Place, bytes: usize) -> Result<()> {
    match place {
        Place::Host => Arena::check_room(bytes),
        Place::Cuda => cuda::Gpu::of_this_rank()?.check_room(bytes),
    }
}

/// Bytes that may be read. `Copy`, like `&[T]`.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    address: usize,
    bytes: usize,
    place: Place,
    life: PhantomData<&'a [u8]>,
}

/// Bytes that may be written. Unique, like `&mut [T]`.
#[derive(Debug)]
pub struct SliceMut<'a> {
    address: usize,
    bytes: usize,
    place: Place,
    life: PhantomData<&'a mut [u8]>,
}

impl<'a> Slice<'a> {
    /// # Safety
    /// `address..address + bytes` is valid memory of `place`, aligned to 4, that nobody writes during `'a`.
    pub unsafe fn from_raw(place: Place, address: usize, bytes: usize) -> Self {
        Slice { address, bytes, place, life: PhantomData }
    }
    pub fn empty() -> Self {
        Slice { address: 64, bytes: 0, place: Place::Host, life: PhantomData }
    }
    pub fn address(self) -> usize {
        self.address
    }
    pub fn bytes(self) -> usize {
        self.bytes
    }
    pub fn place(self) -> Place {
        self.place
    }
    /// Some of the bytes, from a multiple of 4 on.
    pub fn cut(self, range: Range<usize>) -> Slice<'a> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        Slice { address: self.address + range.start, bytes: range.len(), ..self }
    }
    /// The bytes on the CPU.
    pub fn u8(self) -> &'a [u8] {
        assert_eq!(self.place, Place::Host, "a CPU kernel was given memory of the {:?}", self.place);
        // SAFETY: from_raw's contract.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }
    /// The f32 values on the CPU.
    pub fn f32(self) -> &'a [f32] {
        bytemuck::cast_slice(self.u8())
    }
    /// The bf16 values on the CPU.
    pub fn bf16(self) -> &'a [bf16] {
        bytemuck::cast_slice(self.u8())
    }
}

impl<'a> SliceMut<'a> {
    /// # Safety
    /// `address..address + bytes` is valid memory of `place`, aligned to 4, that nobody else touches during `'a`.
    pub unsafe fn from_raw(place: Place, address: usize, bytes: usize) -> Self {
        SliceMut { address, bytes, place, life: PhantomData }
    }
    pub fn empty() -> Self {
        SliceMut { address: 64, bytes: 0, place: Place::Host, life: PhantomData }
    }
    pub fn address(&self) -> usize {
        self.address
    }
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    pub fn place(&self) -> Place {
        self.place
    }
    /// The same bytes for a shorter while.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut { address: self.address, bytes: self.bytes, place: self.place, life: PhantomData }
    }
    pub fn as_slice(&self) -> Slice<'_> {
        Slice { address: self.address, bytes: self.bytes, place: self.place, life: PhantomData }
    }
    /// Some of the bytes, from a multiple of 4 on, for a shorter while.
    pub fn cut(&mut self, range: Range<usize>) -> SliceMut<'_> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        SliceMut { address: self.address + range.start, bytes: range.len(), place: self.place, life: PhantomData }
    }
    /// Takes so many of the first bytes, a multiple of 4, out of it.
    pub fn take(&mut self, bytes: usize) -> SliceMut<'a> {
        assert!(bytes <= self.bytes, "{bytes} of {} bytes", self.bytes);
        let first = SliceMut { address: self.address, bytes, place: self.place, life: PhantomData };
        (self.address, self.bytes) = (self.address + bytes, self.bytes - bytes);
        first
    }
    /// Gives up the right to write.
    pub fn into_shared(self) -> Slice<'a> {
        Slice { address: self.address, bytes: self.bytes, place: self.place, life: PhantomData }
    }
    pub fn u8(&mut self) -> &mut [u8] {
        self.reborrow().into_u8()
    }
    pub fn f32(&mut self) -> &mut [f32] {
        self.reborrow().into_f32()
    }
    pub fn bf16(&mut self) -> &mut [bf16] {
        self.reborrow().into_bf16()
    }
    pub fn into_u8(self) -> &'a mut [u8] {
        assert_eq!(self.place, Place::Host, "a CPU kernel was given memory of the {:?}", self.place);
        // SAFETY: from_raw's contract.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }
    pub fn into_f32(self) -> &'a mut [f32] {
        bytemuck::cast_slice_mut(self.into_u8())
    }
    pub fn into_bf16(self) -> &'a mut [bf16] {
        bytemuck::cast_slice_mut(self.into_u8())
    }
}

/// A CPU buffer of one type of value.
macro_rules! from_values {
    ($value:ty) => {
        impl<'a> From<&'a [$value]> for Slice<'a> {
            fn from(values: &'a [$value]) -> Self {
                let (address, bytes) = (values.as_ptr() as usize, size_of_val(values));
                Slice { address, bytes, place: Place::Host, life: PhantomData }
            }
        }

        impl<'a> From<&'a mut [$value]> for SliceMut<'a> {
            fn from(values: &'a mut [$value]) -> Self {
                let (address, bytes) = (values.as_mut_ptr() as usize, size_of_val(values));
                SliceMut { address, bytes, place: Place::Host, life: PhantomData }
            }
        }
    };
}

from_values!(f32);
from_values!(bf16);
from_values!(f16);

/// `sum += term`, both f32, of the same length and place.
pub fn add(mut sum: SliceMut<'_>, term: Slice<'_>) {
    sum.f32().iter_mut().zip(term.f32()).for_each(|(sum, term)| *sum += term);
}
