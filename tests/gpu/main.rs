//! What runs on a GPU against the same on the CPU. Without a GPU it runs in the emulator, which shows that kernels compute what
//! they should, not that they are fast. With one: `LOCKSTEP_TEST_GPU=1 cargo test --test gpu -- --nocapture`.

mod allocations;
mod augment;
mod conv2d;
mod devices;
#[path = "../emulator/mod.rs"]
mod emulator;
mod graphs;
mod layers;
mod memory;
mod nccl;
mod operands;
mod products;
#[path = "../common/runs.rs"]
mod runs;
mod step;
mod strictness;
mod training;
mod values;
