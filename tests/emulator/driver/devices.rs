//! The GPUs and their contexts. As many as LOCKSTEP_EMULATOR_GPUS says, else one, of which a process sees those that
//! CUDA_VISIBLE_DEVICES lists.

use crate::memory::total_bytes;
use crate::{
    CURRENT, Code, Driver, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NOT_INITIALIZED, NOT_SUPPORTED, SUCCESS, driver,
    give, in_context, require,
};
use std::env;
use std::ffi::{c_char, c_int, c_uint};

/// Of the first GPU; those of the others follow.
const CONTEXT: usize = 0xC0;
/// Few, so that kernels stride over their grid even where tensors are small.
const MULTIPROCESSORS: c_int = 1;

/// The machine's GPUs that this process sees, by their numbers in the machine.
fn visible() -> Vec<u8> {
    let count = env::var("LOCKSTEP_EMULATOR_GPUS").map_or(1, |count| count.parse().expect("LOCKSTEP_EMULATOR_GPUS is a number"));
    match env::var("CUDA_VISIBLE_DEVICES") {
        // As the real driver: what follows a number that is none does not count.
        Ok(list) => list.split(',').map_while(|number| number.parse().ok().filter(|number| *number < count)).collect(),
        Err(_) => (0..count).collect(),
    }
}

/// For calls that need a GPU's number and nothing else.
fn of_device(device: c_int, call: impl FnOnce(&mut Driver, u8) -> Result<(), Code>) -> Code {
    let mut driver = driver();
    let done = match usize::try_from(device).ok().and_then(|device| visible().get(device).copied()) {
        _ if !driver.initialized => Err(NOT_INITIALIZED),
        None => Err(INVALID_DEVICE),
        Some(number) => call(&mut driver, number),
    };
    done.err().unwrap_or(SUCCESS)
}

impl Driver {
    pub fn is_context(&self, context: usize) -> bool {
        context.checked_sub(CONTEXT).is_some_and(|device| self.retained.contains_key(&(device as c_int)))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    match driver().initialized {
        true => unsafe { give(count, visible().len() as c_int) }.err().unwrap_or(SUCCESS),
        false => NOT_INITIALIZED,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    of_device(ordinal, |_, _| unsafe { give(device, ordinal) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) -> Code {
    of_device(device, |_, _| unsafe { give_text(name, length, "Emulated GPU") })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, length: c_int, device: c_int) -> Code {
    of_device(device, |_, number| unsafe { give_text(id, length, &format!("0000:{number:02X}:00.0")) })
}

unsafe fn give_text(to: *mut c_char, length: c_int, text: &str) -> Result<(), Code> {
    require(!to.is_null() && length as usize > text.len(), INVALID_VALUE)?;
    unsafe {
        to.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> Code {
    let of = |number| {
        let mut uuid = *b"lockstepemulate0";
        uuid[15] += number;
        uuid
    };
    of_device(device, |_, number| unsafe { give(uuid, of(number)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Code {
    of_device(device, |_, _| unsafe { give(bytes, total_bytes()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) -> Code {
    of_device(device, |_, _| {
        // By the numbers of CUdevice_attribute: multiprocessors, compute capability.
        let known = match attribute {
            16 => MULTIPROCESSORS,
            75 => 9,
            76 => 0,
            _ => return Err(NOT_SUPPORTED),
        };
        unsafe { give(value, known) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Code {
    of_device(device, |driver, _| {
        unsafe { give(context, CONTEXT + device as usize) }?;
        *driver.retained.entry(device).or_default() += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Code {
    of_device(device, |driver, _| {
        let times = driver.retained.get_mut(&device).ok_or(INVALID_CONTEXT)?;
        *times -= 1;
        if *times == 0 {
            driver.retained.remove(&device);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> Code {
    match driver().initialized {
        true => unsafe { give(context, CURRENT.get()) }.err().unwrap_or(SUCCESS),
        false => NOT_INITIALIZED,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Code {
    in_context(|_| unsafe { give(device, (CURRENT.get() - CONTEXT) as c_int) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: usize) -> Code {
    let driver = driver();
    match () {
        () if !driver.initialized => NOT_INITIALIZED,
        () if context != 0 && !driver.is_context(context) => INVALID_CONTEXT,
        () => {
            CURRENT.set(context);
            SUCCESS
        }
    }
}
