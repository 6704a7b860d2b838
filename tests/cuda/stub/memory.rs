//! Memory. What is allocated is poisoned, so that memory which should have been zeroed shows.

use crate::device::{MEMORY_BYTES, context};
use crate::{ALREADY_REGISTERED, Code, INVALID_VALUE, NOT_REGISTERED, OUT_OF_MEMORY, SUCCESS, fault_is, give};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{c_uchar, c_uint, c_void};
use std::sync::Mutex;

const ALIGN: usize = 256;
const POISON: u8 = 0xA5;

/// Bytes of each allocation, by its address: of the device, and pinned.
static DEVICE: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());
static PINNED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());
/// The same of host memory that the program has made and registered.
static REGISTERED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut usize, bytes: usize) -> Code {
    // SAFETY: the caller's contract is passed on, here and below.
    unsafe { allocate(&DEVICE, address, bytes) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(address: *mut usize, bytes: usize, flags: c_uint) -> Code {
    assert_eq!(flags, 0, "pinned memory that the CPU reads is cached");
    unsafe { allocate(&PINNED, address, bytes) }
}

unsafe fn allocate(of: &Mutex<BTreeMap<usize, usize>>, address: *mut usize, bytes: usize) -> Code {
    if let Err(code) = context() {
        return code;
    }
    let mut allocations = of.lock().unwrap();
    if bytes == 0 {
        return INVALID_VALUE;
    }
    if bytes > MEMORY_BYTES - allocations.values().sum::<usize>() {
        return OUT_OF_MEMORY;
    }
    let memory = unsafe { alloc(layout(bytes)) };
    unsafe { memory.write_bytes(POISON, bytes) };
    allocations.insert(memory as usize, bytes);
    unsafe { give(address, memory as usize) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFree_v2(address: usize) -> Code {
    unsafe { free(&DEVICE, address) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(address: usize) -> Code {
    unsafe { free(&PINNED, address) }
}

/// Nothing is done to it but to remember where it is.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint) -> Code {
    if let Err(code) = context() {
        return code;
    }
    if fault_is("register") {
        return OUT_OF_MEMORY;
    }
    if address.is_null() || bytes == 0 || flags != 0 {
        return INVALID_VALUE;
    }
    match REGISTERED.lock().unwrap().insert(address as usize, bytes) {
        Some(_) => ALREADY_REGISTERED,
        None => SUCCESS,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(address: usize) -> Code {
    REGISTERED.lock().unwrap().remove(&address).map_or(NOT_REGISTERED, |_| SUCCESS)
}

/// For tests: bytes of host memory that are registered.
#[unsafe(no_mangle)]
extern "C" fn stub_registered() -> usize {
    REGISTERED.lock().unwrap().values().sum()
}

unsafe fn free(of: &Mutex<BTreeMap<usize, usize>>, address: usize) -> Code {
    let Some(bytes) = of.lock().unwrap().remove(&address) else { return INVALID_VALUE };
    unsafe { dealloc(address as *mut u8, layout(bytes)) };
    SUCCESS
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGN).unwrap()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    let used: usize = DEVICE.lock().unwrap().values().sum();
    unsafe { give(free, MEMORY_BYTES - used).max(give(total, MEMORY_BYTES)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: usize, from: *const c_void, bytes: usize, _stream: usize) -> Code {
    unsafe { copy(from as usize, to, bytes, &[to]) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: usize, bytes: usize, _stream: usize) -> Code {
    unsafe { copy(from, to as usize, bytes, &[from]) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, _stream: usize) -> Code {
    unsafe { copy(from, to, bytes, &[from, to]) }
}

unsafe fn copy(from: usize, to: usize, bytes: usize, of_device: &[usize]) -> Code {
    if let Err(code) = context() {
        return code;
    }
    if !of_device.iter().all(|&address| is_allocated(address, bytes)) {
        return INVALID_VALUE;
    }
    unsafe { (to as *mut u8).copy_from(from as *const u8, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8Async(to: usize, value: c_uchar, bytes: usize, _stream: usize) -> Code {
    if !is_allocated(to, bytes) {
        return INVALID_VALUE;
    }
    unsafe { (to as *mut u8).write_bytes(value, bytes) };
    SUCCESS
}

/// Whether all bytes are of one allocation of the device.
pub fn is_allocated(address: usize, bytes: usize) -> bool {
    let allocations = DEVICE.lock().unwrap();
    allocations.range(..=address).next_back().is_some_and(|(start, len)| address + bytes <= start + len)
}
