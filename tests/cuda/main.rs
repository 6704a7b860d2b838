//! CUDA without a GPU: what is said where libraries are missing or unfit, whether the kernels compile, and all that is not a
//! kernel on a stub that stands for libcuda and NVRTC (`stub`).

#[path = "../common/program.rs"]
mod program;

mod engines;
mod harness;
mod header;
mod kernels;
mod libraries;
mod nvml;
mod work;

// Libraries of their own, which `harness` compiles; named here so that `cargo fmt` sees them.
#[cfg(any())]
#[path = "stub/lib.rs"]
mod stub;
#[cfg(any())]
#[path = "nvml/stub.rs"]
mod stub_of_nvml;
