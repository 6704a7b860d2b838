//! `trainer info`: what this machine offers and what this build can use.

use crate::comm;
use crate::device::cuda::libraries::{self, Library};
use crate::device::cuda::nvml::{self, Gauge};
use crate::device::cuda::probe::{self, Device, Found};
use crate::error::Result;
use crate::launch::numa::Node;
use crate::model::kernels::gemm16::Kernel;
use comfy_table::{Table, presets};
use std::fs;

pub fn describe() -> String {
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (what, found) in [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("target", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ("CPU", field(&cpu_info, "model name").unwrap_or("unknown").to_owned()),
        ("CPU features", features(&cpu_info)),
        ("bf16", bf16_products()),
        ("cores", format!("{cores} that this process may use")),
        ("memory", format!("{}, {} available", gib(&memory, "MemTotal"), gib(&memory, "MemAvailable"))),
        ("transports", "shm (ranks of one node), tcp (any)".to_owned()),
        ("MPI", mpi()),
    ] {
        table.add_row([what, &found]);
    }
    for (what, found) in gpus(probe::gpus()) {
        table.add_row([what, &found]);
    }
    format!("{}\n", table.trim_fmt())
}

/// What multiplies matrices where `[run] precision = "bf16"`.
fn bf16_products() -> String {
    let kernel = Kernel::best();
    match kernel.is_native() {
        true => format!("products by {}", kernel.name),
        false => "products in f32: this CPU has no instructions for bf16".to_owned(),
    }
}

fn mpi() -> String {
    match comm::mpi_library() {
        Some(library) => format!("{library}, of which the thread level serialized is asked"),
        None => "not built in".to_owned(),
    }
}

/// The GPUs and the libraries that work on them; without a GPU why there is none.
fn gpus(found: Result<Found>) -> Vec<(&'static str, String)> {
    let Found { driver, module, devices } = match found {
        Ok(found) => found,
        Err(error) => return vec![("GPU", format!("none: {error}"))],
    };
    let devices = devices.iter().map(|device| ("GPU", gpu(device)));
    // A container may hide the module.
    let module = module.or_else(nvml::driver_version).map_or(String::new(), |version| format!("driver {version}, "));
    let driver = ("CUDA", format!("{module}for CUDA up to {}, {}", driver.version, driver.path.display()));
    let libraries = [
        ("NVRTC", libraries::nvrtc()),
        ("cuBLASLt", libraries::cublas_lt()),
        ("cuDNN", libraries::cudnn()),
        ("NCCL", libraries::nccl()),
    ];
    let library = |found: Result<&Library>| match found {
        Ok(library) => format!("{}, {}", library.version, library.path.display()),
        Err(error) => error.to_string(),
    };
    let libraries = libraries.map(|(name, found)| (name, library(found)));
    let nvml = ("NVML", nvml::version().unwrap_or_else(|error| error.to_string()));
    devices.chain([driver]).chain(libraries).chain([nvml]).collect()
}

fn gpu(device: &Device) -> String {
    let Device { ordinal, name, memory_bytes, uuid, .. } = device;
    let (mib, architecture) = (memory_bytes >> 20, device.architecture());
    let limit = Gauge::of(device).ok().and_then(|gauge| gauge.power_limit_watts());
    let limit = limit.map_or(String::new(), |watts| format!(", power limit {watts} W"));
    let node = Node::next_to(&device.bus_id).map_or(String::new(), |node| format!(", {node}"));
    format!("{ordinal}: {name}, {mib} MiB, {architecture}, {uuid}{limit}{node}")
}

/// Those that the kernels ask for.
fn features(cpu_info: &str) -> String {
    let flags: Vec<&str> = field(cpu_info, "flags").unwrap_or_default().split_whitespace().collect();
    let known = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"];
    let (found, missing): (Vec<&str>, Vec<&str>) = known.into_iter().partition(|feature| flags.contains(feature));
    let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!("{}; not here: {}", list(found), list(missing))
}

fn gib(memory: &str, name: &str) -> String {
    let kib = field(memory, name).and_then(|value| value.trim_end_matches(" kB").parse::<f64>().ok());
    kib.map_or("unknown".to_owned(), |kib| format!("{:.1} GiB", kib / f64::from(1 << 20)))
}

/// The value of `name : value`, the first of its kind.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name)).map(|(_, v)| v.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_as_linux_writes_them() {
        let cpu = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: sse avx2 fma\n\nmodel name\t: Other\n";
        assert_eq!(field(cpu, "model name"), Some("Some CPU"));
        assert_eq!(features(cpu), "avx2, fma; not here: avx512f, avx512_bf16, amx_tile, amx_bf16");
        assert_eq!(gib("MemTotal:        3145728 kB\n", "MemTotal"), "3.0 GiB");
        assert_eq!(gib("", "MemTotal"), "unknown");
    }
}
