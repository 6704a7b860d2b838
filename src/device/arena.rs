//! One block of memory from which a plan cuts buffers.

use super::{Place, Slice, SliceMut};
use crate::error::{Error, Result};
use std::any::Any;
use std::ops::Range;

/// Buffers start at multiples of this many bytes: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// A fixed block of zeroed memory. It knows where it lives and, through `owner`, how it is given back; it does not know
/// whether it came from the heap, from a shared mapping, or from a GPU.
#[derive(Debug)]
pub struct Arena {
    place: Place,
    address: usize,
    bytes: usize,
    _owner: Box<dyn Any + Send + Sync>,
}

impl Arena {
    /// Zeroed host memory, private to this process.
    pub fn host(bytes: usize) -> Result<Arena> {
        let mut owner: Vec<[u8; ALIGN]> = Vec::new();
        let lines = bytes.div_ceil(ALIGN).max(1);
        owner.try_reserve_exact(lines + 1).map_err(|_| out_of_memory(bytes))?;
        owner.resize(lines + 1, [0; ALIGN]);
        let address = (owner.as_mut_ptr() as usize).next_multiple_of(ALIGN);
        // SAFETY: the vector has a line to spare for the alignment and moves into the arena without moving its heap block.
        Ok(unsafe { Arena::from_raw(Place::Host, address, bytes, Box::new(owner)) })
    }

    /// Whether `host` would give so many bytes, as far as the system says before it is held to it.
    pub fn check_room(bytes: usize) -> Result<()> {
        Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| out_of_memory(bytes))
    }

    /// Memory that something else made: a shared mapping, a device allocation.
    ///
    /// # Safety
    /// `address..address + bytes` is valid memory of `place`, aligned to `ALIGN`, for as long as `owner` lives.
    pub unsafe fn from_raw(place: Place, address: usize, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Arena {
        assert_eq!(address % ALIGN, 0);
        Arena { place, address, bytes, _owner: owner }
    }

    pub fn place(&self) -> Place {
        self.place
    }
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    pub fn address(&self) -> usize {
        self.address
    }

    /// # Safety
    /// Nobody writes `range` during the returned lifetime.
    pub unsafe fn slice<'a>(&self, range: Range<usize>) -> Slice<'a> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of an arena of {} bytes", self.bytes);
        // SAFETY: in bounds; the caller vouches for the rest.
        unsafe { Slice::from_raw(self.place, self.address + range.start, range.len()) }
    }

    /// # Safety
    /// Nobody else touches `range` during the returned lifetime.
    pub unsafe fn slice_mut<'a>(&self, range: Range<usize>) -> SliceMut<'a> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of an arena of {} bytes", self.bytes);
        // SAFETY: in bounds; the caller vouches for the rest.
        unsafe { SliceMut::from_raw(self.place, self.address + range.start, range.len()) }
    }
}

fn out_of_memory(bytes: usize) -> Error {
    Error::device(format!("out of memory: {bytes} bytes were asked for at once"))
}
