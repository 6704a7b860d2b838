//! What runs on a GPU against the same on the CPU. Without a GPU it runs in the emulator, which shows that kernels compute what
//! they should, not that they are fast. With one: `LOCKSTEP_TEST_GPU=1 cargo test --test gpu -- --nocapture`.

mod allocations;
mod augment;
mod bench_step;
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "../common/configs.rs"]
mod configs;
mod conv2d;
mod devices;
#[path = "../emulator/mod.rs"]
mod emulator;
mod fusion;
mod graphs;
mod layers;
mod loss_scale;
mod memory;
mod nccl;
mod numa;
mod operands;
mod oracles;
mod products;
mod rounding;
#[path = "../common/runs.rs"]
mod runs;
mod sharded;
mod step;
mod strictness;
mod training;
mod values;
