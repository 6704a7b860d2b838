//! GPUs through CUDA. Nothing of it is linked: the libraries are looked for when a GPU is asked for (`libraries`), and what
//! is missing is an error that says which package brings it. `probe` lists the GPUs; `Gpu` is the one that this rank works
//! on, with its memory and streams; `kernels` compiles the `.cu` files that stand beside their layers; `nvml` reads what the
//! driver measures; `nccl` has NCCL's functions, with which `comm::nccl` sums over ranks.
//!
//! The crate cudarc has the declarations and looks functions up by name. Only its `sys` modules are used: what its safe
//! wrappers add, events at each allocation and allocations at each launch, is what a captured step must not have. A function
//! that a library lacks makes cudarc panic, so those that are called are listed in `libraries` and asked for first.

#[macro_use]
mod call;
mod choices;
pub mod cublaslt;
pub mod cudnn;
mod elementwise;
mod gpu;
mod graph;
pub mod kernels;
pub mod libraries;
pub mod nccl;
pub mod nvml;
pub mod probe;
mod registered;
mod search;
mod stream;

pub use elementwise::Elementwise;
pub use gpu::{Gpu, Memory, WORKSPACE_PART, mib};
pub use graph::{Capture, Graph};
pub use registered::Registered;
pub use stream::{Event, Stream};
