//! What must hold of single layers beside their gradients and PyTorch's numbers.
