//! Every layer and loss through its public seam: finite differences, PyTorch's numbers, and what else must hold of each.

mod bf16;
mod gradients;
mod harness;
mod oracles;
mod properties;
mod refusals;
