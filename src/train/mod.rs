//! The loop: forward, backward, all-reduce, step; evaluation; checkpoints.

pub mod checkpoint;
