//! Lockstep: N ranks train one network in lock step. The modules stand in the order of the data flow.

/// The one error type and the exit codes.
pub mod error;
/// Counter-based random numbers: each a pure function of what it is for.
pub mod rng;

/// Files that are there whole or not at all.
pub mod atomic_file;
/// The command line.
pub mod cli;
/// Collectives between ranks: shared memory and TCP.
pub mod comm;
/// One TOML file is one experiment: parsed (`raw`), then every number derived (`plan`).
pub mod config;
/// Samples: formats, partition over ranks, augmentation, the prefetching queue.
pub mod data;
/// What a buffer is, on the CPU and elsewhere.
pub mod device;
/// Who am I among the ranks; starting them; finding and watching each other.
pub mod launch;
/// The network: layers, parameters, memory plan, forward and backward.
pub mod model;
/// Optimizers, schedules, clipping.
pub mod optim;
/// What a run says: progress, metrics, summary.
pub mod report;
/// The loop: forward, backward, all-reduce, step; evaluation; checkpoints.
pub mod train;
