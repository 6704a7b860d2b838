//! What a GPU's driver measures: memory in use, utilization, power and energy, through NVML, the library behind nvidia-smi.
//! It comes with the driver and is loaded when it is first asked for. Where it or one of its values is missing, nothing
//! else changes: they are for people to look at.
//!
//! <https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html> says what its functions give.

use super::gpu::Gpu;
use super::probe::Device;
use crate::error::{Context, Error, Kind, Result};
use crate::report::log::SAID_ONCE;
use nvml_wrapper::{Nvml, error::NvmlError};
use std::sync::{Arc, OnceLock};

/// Reads one GPU. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gauge {
    device: Arc<nvml_wrapper::Device<'static>>,
    /// By the driver's counter, when the gauge was made.
    energy_mj: Option<u64>,
}

/// What a GPU does, with all processes on it. What NVML does not offer for it is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    pub memory_mib: Option<u64>,
    /// Share of the time in which a kernel ran, 0 to 100, over the last second or less.
    pub utilization_percent: Option<u32>,
    /// On average over the last second; of an A100 and older GPUs at this moment.
    pub power_watts: Option<f64>,
}

impl Gauge {
    /// Of the GPU that this rank has taken. None without one; without NVML too, which `-v` tells.
    pub fn of_this_rank() -> Option<Gauge> {
        let gpu = Gpu::of_this_rank().ok()?;
        let missing = |error: &Error| {
            tracing::debug!(target: SAID_ONCE, "no memory, utilization, power and energy of the GPU in the metrics: {error}");
        };
        Gauge::of(gpu.device()).inspect_err(missing).ok()
    }

    /// By its UUID: NVML knows nothing of CUDA_VISIBLE_DEVICES and numbers GPUs in its own way.
    pub fn of(device: &Device) -> Result<Gauge> {
        let device =
            nvml()?.device_by_uuid(&*device.uuid).or_kind(Kind::Device, format_args!("NVML, asked for {device}"))?;
        Ok(Gauge { energy_mj: device.total_energy_consumption().ok(), device: Arc::new(device) })
    }

    /// Calls into the driver, which may take milliseconds.
    pub fn sample(&self) -> Sample {
        Sample {
            memory_mib: self.device.memory_info().ok().map(|memory| memory.used >> 20),
            utilization_percent: self.device.utilization_rates().ok().map(|rates| rates.gpu),
            power_watts: self.device.power_usage().ok().map(watts),
        }
    }

    /// What the GPU has used since the gauge was made. NVML has it from Volta on.
    pub fn energy_joules(&self) -> Option<f64> {
        let now = self.device.total_energy_consumption().ok()?;
        Some(now.saturating_sub(self.energy_mj?) as f64 / 1e3)
    }

    /// Above which the GPU lowers its clocks.
    pub fn power_limit_watts(&self) -> Option<f64> {
        self.device.enforced_power_limit().ok().map(watts)
    }
}

/// NVML's version, such as 13.580.65.06.
pub fn version() -> Result<String> {
    nvml()?.sys_nvml_version().or_kind(Kind::Device, "NVML")
}

/// The driver's version, such as 580.65.06.
pub fn driver_version() -> Option<String> {
    nvml().ok()?.sys_driver_version().ok()
}

/// Stays loaded until the process ends.
fn nvml() -> Result<&'static Nvml> {
    static FOUND: OnceLock<Result<Nvml, NvmlError>> = OnceLock::new();
    FOUND.get_or_init(Nvml::init).as_ref().map_err(|error| {
        Error::device(match error {
            NvmlError::LibloadingError(error) => format!(
                "NVML was not found: {error}. It comes with the GPU's driver; a container gets it from the host if \
                 NVIDIA_DRIVER_CAPABILITIES there has `utility`"
            ),
            error => format!("NVML: {error}"),
        })
    })
}

fn watts(milliwatts: u32) -> f64 {
    f64::from(milliwatts) / 1e3
}
