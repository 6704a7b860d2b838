#include "common.cuh"
#include "activation.cuh"

// y = f(x): x, y (n)
extern "C" __global__ void activation_forward(const T* x, T* y, u32 activation, u64 n) {
    map(n, [=](float x) { return activate(activation, x); }, y, x);
}

// dx = f'(x) dy, with f'(x) from the output: y, dy, dx (n)
extern "C" __global__ void activation_backward(const T* y, const T* dy, T* dx, u32 activation, u64 n) {
    map(n, [=](float y, float dy) { return activation_gradient(activation, y, dy); }, dx, y, dy);
}
