//! The mathematics that several layers share, on the CPU: free functions over slices.

pub mod gemm;
pub mod winograd;
