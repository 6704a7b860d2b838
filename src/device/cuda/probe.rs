//! Which GPUs there are.

use super::libraries::{self, Library};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute};
use std::ffi::{CStr, c_char};
use std::{fmt, fs};

/// The driver and the GPUs that it shows to this process.
pub struct Found {
    pub driver: &'static Library,
    /// Version of the kernel's module, such as 580.65.06, where the system tells.
    pub module: Option<String>,
    pub devices: Vec<Device>,
}

/// A GPU.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its number among those that this process sees (CUDA_VISIBLE_DEVICES).
    pub ordinal: usize,
    pub name: String,
    pub memory_bytes: usize,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// As nvidia-smi writes it. A MIG instance has one of its own.
    pub uuid: String,
    /// Its place in the machine, as Linux writes it: `0000:3b:00.0`.
    pub bus_id: String,
    pub multiprocessors: u32,
}

/// In the name of a MIG instance, a part of a GPU: `NVIDIA H200 MIG 1g.18gb`.
const MIG: &str = " MIG ";

/// All GPUs. An error says why there is none: no driver, or what the driver says.
pub fn gpus() -> Result<Found> {
    let driver = libraries::driver()?;
    let mut count = 0;
    // SAFETY: the driver is loaded.
    unsafe {
        call!(cuInit(0))?;
        call!(cuDeviceGetCount(&mut count))?;
    }
    let devices = (0..count.unsigned_abs() as usize).map(Device::query).collect::<Result<Vec<_>>>()?;
    let module = fs::read_to_string("/sys/module/nvidia/version").ok().map(|version| version.trim().to_owned());
    Ok(Found { driver, module, devices })
}

impl Found {
    /// The GPU with this number.
    pub fn device(&self, ordinal: usize) -> Result<&Device> {
        self.devices.get(ordinal).ok_or_else(|| {
            Error::lacking(format!(
                "there is no GPU {ordinal}: this process sees {} (nvidia-smi -L)",
                self.devices.len()
            ))
        })
    }
}

impl Device {
    fn query(ordinal: usize) -> Result<Device> {
        let device = handle(ordinal)?;
        let (mut name, mut bus_id) = ([0 as c_char; 256], [0 as c_char; 32]);
        let (mut memory_bytes, mut uuid) = (0, sys::CUuuid { bytes: [0; 16] });
        // SAFETY: the driver writes at most so many characters, a zero among them, and the others as a whole.
        unsafe {
            call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
            call!(cuDeviceGetPCIBusId(bus_id.as_mut_ptr(), bus_id.len() as i32, device))?;
            call!(cuDeviceTotalMem_v2(&mut memory_bytes, device))?;
            call!(cuDeviceGetUuid_v2(&mut uuid, device))?;
        }
        // SAFETY: ended by a zero, the last of them in any case.
        let text =
            |characters: &[c_char]| unsafe { CStr::from_ptr(characters.as_ptr()) }.to_string_lossy().into_owned();
        let name = text(&name);
        let attribute = |attribute| attribute_of(device, attribute);
        Ok(Device {
            ordinal,
            uuid: format_uuid(uuid.bytes.map(|byte| byte as u8), name.contains(MIG)),
            name,
            bus_id: text(&bus_id).to_lowercase(),
            memory_bytes,
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        })
    }

    /// As compilers name it: `sm_90`.
    pub fn architecture(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {} ({})", self.ordinal, self.name)
    }
}

/// The driver's handle of a GPU. Needs `cuInit`.
pub(super) fn handle(ordinal: usize) -> Result<CUdevice> {
    let mut device = 0;
    // SAFETY: the driver writes the handle.
    unsafe { call!(cuDeviceGet(&mut device, ordinal as i32)) }?;
    Ok(device)
}

fn attribute_of(device: CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: the driver writes the value.
    unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, device)) }?;
    Ok(value.unsigned_abs())
}

fn format_uuid(bytes: [u8; 16], instance: bool) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [0..4, 4..6, 6..8, 8..10, 10..16].map(|group| hex[group].concat());
    format!("{}-{}", if instance { "MIG" } else { "GPU" }, groups.join("-"))
}
