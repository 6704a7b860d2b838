//! What a buffer is. Layers and communicators see `Slice` and `SliceMut`: a run of bytes at an address on some device.
//! A CPU kernel asks for `f32()` and gets a slice; a CUDA kernel asks for `address()` and gets a device pointer. Asking
//! for the wrong one is a bug and asserts, so the choice of device is made once, where a layer is built, and nowhere else.

mod arena;

use crate::error::{Error, Result};
pub use arena::{ALIGN, Arena};
use std::marker::PhantomData;

/// Where memory lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    #[default]
    Host,
    /// A GPU's memory; the address is meaningless to the CPU.
    Cuda,
}

/// Zeroed memory of a device.
pub fn allocate(place: Place, bytes: usize) -> Result<Arena> {
    match place {
        Place::Host => Arena::host(bytes),
        Place::Cuda => Err(Error::device("this build has no CUDA support; run on the CPU")),
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
    pub fn into_u8(self) -> &'a mut [u8] {
        assert_eq!(self.place, Place::Host, "a CPU kernel was given memory of the {:?}", self.place);
        // SAFETY: from_raw's contract.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }
    pub fn into_f32(self) -> &'a mut [f32] {
        bytemuck::cast_slice_mut(self.into_u8())
    }
}

impl<'a> From<&'a [f32]> for Slice<'a> {
    fn from(values: &'a [f32]) -> Self {
        Slice { address: values.as_ptr() as usize, bytes: size_of_val(values), place: Place::Host, life: PhantomData }
    }
}

impl<'a> From<&'a mut [f32]> for SliceMut<'a> {
    fn from(values: &'a mut [f32]) -> Self {
        SliceMut {
            address: values.as_mut_ptr() as usize,
            bytes: size_of_val(values),
            place: Place::Host,
            life: PhantomData,
        }
    }
}

/// `sum += term`, both of the same length and place.
pub fn add(mut sum: SliceMut<'_>, term: Slice<'_>) {
    sum.f32().iter_mut().zip(term.f32()).for_each(|(sum, term)| *sum += term);
}
