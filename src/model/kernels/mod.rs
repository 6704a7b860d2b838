//! The mathematics that several layers share, on the CPU: free functions over slices.

pub mod convert;
pub mod gemm;
pub mod gemm16;
pub mod winograd;
