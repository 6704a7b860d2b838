//! Memory and copies.

use crate::{
    ALREADY_REGISTERED, Code, Driver, INVALID_VALUE, NOT_REGISTERED, OUT_OF_MEMORY, SUCCESS, fails, give, in_context,
    require, streams,
};
use std::env;
use std::ffi::{c_int, c_long, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

/// Of a GPU: as many MiB as LOCKSTEP_EMULATOR_MEMORY_MIB says, else 8 GiB.
pub fn total_bytes() -> usize {
    mebibytes("LOCKSTEP_EMULATOR_MEMORY_MIB").unwrap_or(8 << 30)
}

/// What other processes hold of it: as many MiB as LOCKSTEP_EMULATOR_TAKEN_MIB says, else nothing.
fn taken_bytes() -> usize {
    mebibytes("LOCKSTEP_EMULATOR_TAKEN_MIB").unwrap_or(0)
}

fn mebibytes(variable: &str) -> Option<usize> {
    let text = env::var(variable).ok()?;
    Some(text.parse::<usize>().unwrap_or_else(|_| panic!("{variable} is a number")) << 20)
}

const PAGE: usize = 4096;
/// The driver promises 256; less, so that more of an overrun meets the page behind.
const ALIGN: usize = 64;
/// What lies between the end of an allocation and the page behind.
const WATCHED: u8 = 0xA5;

/// Between two pages without access.
pub struct Allocation {
    bytes: usize,
    mapping: usize,
    mapped: usize,
}

impl Driver {
    /// Device memory that lies within one allocation.
    pub fn device_range(&self, address: u64, bytes: usize) -> Result<usize, Code> {
        let address = address as usize;
        let allocation = self.device_memory.range(..=address).next_back();
        let inside = allocation.is_some_and(|(start, a)| a.bytes - (address - start).min(a.bytes) >= bytes);
        require(inside && bytes > 0, INVALID_VALUE)?;
        Ok(address)
    }

    /// Host memory, of which only what this driver gave is known.
    pub fn host_range(&self, address: *const c_void, bytes: usize) -> Result<usize, Code> {
        let address = address as usize;
        require(address != 0 && self.device_range(address as u64, 1).is_err(), INVALID_VALUE)?;
        match self.host_memory.range(..=address).next_back() {
            Some((start, a)) if address - start < a.bytes => {
                require(a.bytes - (address - start) >= bytes, INVALID_VALUE)?
            }
            _ => {}
        }
        Ok(address)
    }

    /// Whether the GPU reads and writes this host memory by itself.
    fn is_pinned(&self, address: usize) -> bool {
        let allocated =
            self.host_memory.range(..=address).next_back().map(|(start, allocation)| (start, allocation.bytes));
        let registered = self.registered.range(..=address).next_back().map(|(start, bytes)| (start, *bytes));
        allocated.into_iter().chain(registered).any(|(start, bytes)| address - start < bytes)
    }

    fn free(&self) -> usize {
        let used: usize = self.device_memory.values().map(|allocation| allocation.bytes).sum();
        (total_bytes() - taken_bytes()).saturating_sub(used)
    }

    /// An allocation of which the bytes behind its end were written since the last look.
    pub fn overrun(&self) -> Option<String> {
        let written = |(address, allocation): (&usize, &Allocation)| unsafe {
            let end = allocation.mapping + allocation.mapped - PAGE;
            let behind = std::slice::from_raw_parts_mut(
                (address + allocation.bytes) as *mut u8,
                end - address - allocation.bytes,
            );
            let whole = behind.iter().all(|byte| *byte == WATCHED);
            behind.fill(WATCHED);
            (!whole).then(|| format!("wrote behind the end of the {} bytes at {address:#x}", allocation.bytes))
        };
        self.device_memory.iter().find_map(written)
    }
}

/// Memory full of 0xFF between two pages without access.
fn map(bytes: usize) -> Option<(usize, Allocation)> {
    let mapped = bytes.checked_next_multiple_of(PAGE)? + 2 * PAGE;
    unsafe {
        let mapping = mmap(null_mut(), mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) as usize;
        if mapping as isize == -1 || mprotect((mapping + PAGE) as *mut c_void, mapped - 2 * PAGE, PROT_READ_WRITE) != 0
        {
            return None;
        }
        let end = mapping + mapped - PAGE;
        let address = end - bytes.next_multiple_of(ALIGN);
        (address as *mut u8).write_bytes(0xFF, bytes);
        ((address + bytes) as *mut u8).write_bytes(WATCHED, end - address - bytes);
        Some((address, Allocation { bytes, mapping, mapped }))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        unsafe { munmap(self.mapping as *mut c_void, self.mapped) };
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    in_context(|driver| unsafe {
        give(free, driver.free())?;
        give(total, total_bytes())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Code {
    in_context(|driver| {
        driver.outside_captures()?;
        require(bytes > 0, INVALID_VALUE)?;
        require(bytes <= driver.free(), OUT_OF_MEMORY)?;
        let (at, allocation) = map(bytes).ok_or(OUT_OF_MEMORY)?;
        unsafe { give(address, at as u64) }?;
        driver.device_memory.insert(at, allocation);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> Code {
    streams::run_everything();
    in_context(|driver| {
        driver.outside_captures()?;
        driver.device_memory.remove(&(address as usize)).map(drop).ok_or(INVALID_VALUE)
    })
}

/// With LOCKSTEP_EMULATOR_TELLS=pinned it says so, a line an allocation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint) -> Code {
    in_context(|driver| {
        driver.outside_captures()?;
        require(bytes > 0 && flags <= 7, INVALID_VALUE)?;
        let (at, allocation) = map(bytes).ok_or(OUT_OF_MEMORY)?;
        unsafe { give(address, at as *mut c_void) }?;
        if env::var("LOCKSTEP_EMULATOR_TELLS").is_ok_and(|what| what == "pinned") {
            eprintln!("pinned {bytes} bytes");
        }
        driver.host_memory.insert(at, allocation);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> Code {
    streams::run_everything();
    in_context(|driver| {
        driver.outside_captures()?;
        driver.host_memory.remove(&(address as usize)).map(drop).ok_or(INVALID_VALUE)
    })
}

/// Told to fail (`register`), it refuses all memory, as a driver does under a limit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint) -> Code {
    in_context(|driver| {
        require(!address.is_null() && bytes > 0 && flags <= 15, INVALID_VALUE)?;
        driver.outside_captures()?;
        require(!fails("register"), OUT_OF_MEMORY)?;
        let address = address as usize;
        let before = driver.registered.range(..address + bytes).next_back();
        require(before.is_none_or(|(start, bytes)| start + bytes <= address), ALREADY_REGISTERED)?;
        driver.registered.insert(address, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(address: *mut c_void) -> Code {
    in_context(|driver| driver.registered.remove(&(address as usize)).map(drop).ok_or(NOT_REGISTERED))
}

/// Puts a copy of checked ranges into the stream.
fn put_copy(stream: usize, (from, to): (usize, usize), bytes: usize) -> Code {
    let copy = move || {
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    };
    streams::put(stream, Arc::new(copy))
}

/// The addresses that `find` gives, once the call's arguments are right, and whether the GPU reaches each by itself.
fn ranges(
    stream: usize,
    find: impl FnOnce(&Driver) -> Result<(usize, usize), Code>,
) -> Result<((usize, usize), [bool; 2]), Code> {
    let mut found = Err(SUCCESS);
    let code = in_context(|driver| {
        let capture = driver.stream(stream)?.capture;
        let (from, to) = find(driver)?;
        let at_hand =
            [from, to].map(|address| driver.is_pinned(address) || driver.device_range(address as u64, 1).is_ok());
        if let Some(capture) = capture.filter(|_| at_hand != [true; 2]) {
            return driver.invalidate(capture);
        }
        found = Ok(((from, to), at_hand));
        Ok(())
    });
    found.map_err(|_| code)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: usize) -> Code {
    match ranges(stream, |driver| Ok((driver.host_range(from, bytes)?, driver.device_range(to, bytes)?))) {
        Ok((addresses, [true, _])) => put_copy(stream, addresses, bytes),
        // The driver takes what is not pinned to a place of its own before it returns.
        Ok(((from, to), _)) => {
            let taken = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.to_vec();
            let copy = move || {
                unsafe { (to as *mut u8).copy_from_nonoverlapping(taken.as_ptr(), taken.len()) };
                Ok(())
            };
            streams::put(stream, Arc::new(copy))
        }
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: usize) -> Code {
    match ranges(stream, |driver| Ok((driver.device_range(from, bytes)?, driver.host_range(to, bytes)?))) {
        Ok((addresses, [_, pinned])) => match put_copy(stream, addresses, bytes) {
            // To what is not pinned it copies before it returns.
            SUCCESS if !pinned => {
                streams::run_all(stream);
                SUCCESS
            }
            code => code,
        },
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Code {
    match ranges(stream, |driver| Ok((driver.device_range(from, bytes)?, driver.device_range(to, bytes)?))) {
        Ok((addresses, _)) => put_copy(stream, addresses, bytes),
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: usize) -> Code {
    match ranges(stream, |driver| driver.device_range(to, bytes).map(|to| (to, to))) {
        Ok(((_, to), _)) => {
            let set = move || {
                unsafe { (to as *mut u8).write_bytes(value, bytes) };
                Ok(())
            };
            streams::put(stream, Arc::new(set))
        }
        Err(code) => code,
    }
}

const PROT_NONE: c_int = 0;
const PROT_READ_WRITE: c_int = 3;
const MAP_PRIVATE: c_int = 2;
const MAP_ANONYMOUS: c_int = 0x20;

unsafe extern "C" {
    fn mmap(
        address: *mut c_void,
        bytes: usize,
        access: c_int,
        flags: c_int,
        file: c_int,
        offset: c_long,
    ) -> *mut c_void;
    fn munmap(address: *mut c_void, bytes: usize) -> c_int;
    fn mprotect(address: *mut c_void, bytes: usize, access: c_int) -> c_int;
}
