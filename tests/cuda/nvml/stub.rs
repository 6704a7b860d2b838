//! A stand-in for NVML: one GPU, whose counter of energy goes on by 1.5 kJ at each look.
//!
//! STUB_NVML_FAULT makes it fail: `no-driver`; `another-gpu`, the one asked for is unknown; `no-power`, a GPU without a meter
//! for it.

use std::env;
use std::ffi::{CStr, c_char, c_uint, c_void};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

type Code = c_uint;

const SUCCESS: Code = 0;
const INVALID_ARGUMENT: Code = 2;
const NOT_SUPPORTED: Code = 3;
const NOT_FOUND: Code = 6;
const DRIVER_NOT_LOADED: Code = 9;

const DEVICE: usize = 0xD0;

static ENERGY_MJ: AtomicU64 = AtomicU64::new(9_000_000_000);

/// `nvmlMemory_v2_t`
#[repr(C)]
struct Memory {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlUtilization_t`
#[repr(C)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

fn fault_is(name: &str) -> bool {
    env::var("STUB_NVML_FAULT").is_ok_and(|fault| fault == name)
}

/// Writes what a function gives.
unsafe fn give<V>(to: *mut V, value: V) -> Code {
    // SAFETY: the caller gives an address that it may write.
    unsafe { to.write(value) };
    SUCCESS
}

unsafe fn give_text(to: *mut c_char, len: c_uint, text: &CStr) -> Code {
    let bytes = text.to_bytes_with_nul();
    assert!(len as usize >= bytes.len());
    // SAFETY: as many bytes as the caller says.
    unsafe { to.copy_from(bytes.as_ptr().cast(), bytes.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> Code {
    if fault_is("no-driver") { DRIVER_NOT_LOADED } else { SUCCESS }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, len: c_uint) -> Code {
    // SAFETY: the caller's contract is passed on, here and below.
    unsafe { give_text(version, len, c"580.65.06") }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetNVMLVersion(version: *mut c_char, len: c_uint) -> Code {
    unsafe { give_text(version, len, c"13.580.65.06") }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: *mut *mut c_void) -> Code {
    let known = unsafe { CStr::from_ptr(uuid) } == c"GPU-00010203-0405-0607-0809-0a0b0c0d0e0f";
    if !known || fault_is("another-gpu") {
        return NOT_FOUND;
    }
    unsafe { give(device, DEVICE as *mut c_void) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: *mut c_void, memory: *mut Memory) -> Code {
    let version = unsafe { (*memory).version };
    if device as usize != DEVICE || version != (2 << 24) + 40 {
        return INVALID_ARGUMENT;
    }
    let (total, reserved, used) = (1 << 30, 100 << 20, 512 << 20);
    unsafe { give(memory, Memory { version, total, reserved, free: total - reserved - used, used }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUtilizationRates(_device: *mut c_void, rates: *mut Utilization) -> Code {
    unsafe { give(rates, Utilization { gpu: 87, memory: 34 }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPowerUsage(_device: *mut c_void, milliwatts: *mut c_uint) -> Code {
    if fault_is("no-power") {
        return NOT_SUPPORTED;
    }
    unsafe { give(milliwatts, 312_500) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetEnforcedPowerLimit(_device: *mut c_void, milliwatts: *mut c_uint) -> Code {
    if fault_is("no-power") {
        return NOT_SUPPORTED;
    }
    unsafe { give(milliwatts, 700_000) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTotalEnergyConsumption(_device: *mut c_void, millijoules: *mut u64) -> Code {
    if fault_is("no-power") {
        return NOT_SUPPORTED;
    }
    unsafe { give(millijoules, ENERGY_MJ.fetch_add(1_500_000, SeqCst)) }
}
