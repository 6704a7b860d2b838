//! Failures to order, and whether the program gets over them: runs of a small net, each of which ends with the stated words
//! and exit code, and, where the same command goes on, with the weights of a run in which nothing fails.

#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "../common/configs.rs"]
mod configs;
mod harness;
mod inject;
mod restart;
