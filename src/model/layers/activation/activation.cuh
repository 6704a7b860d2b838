// The activations, as in cpu.rs; their numbers are those of `Activation::number`.
#pragma once
#include "common.cuh"

enum Activation : u32 { NONE = 0, RELU = 1, SIGMOID = 2, TANH = 3 };

// f(x). A NaN stays one.
__device__ inline float activate(u32 activation, float x) {
    switch (activation) {
        case RELU:
            return x < 0.0f ? 0.0f : x;
        case SIGMOID:
            return 1.0f / (1.0f + expf(-x));
        case TANH:
            return tanhf(x);
        default:
            return x;
    }
}

// f'(x) dy, with f'(x) from the output y = f(x).
__device__ inline float activation_gradient(u32 activation, float y, float dy) {
    switch (activation) {
        case RELU:
            return y > 0.0f ? dy : 0.0f;
        case SIGMOID:
            return dy * y * (1.0f - y);
        case TANH:
            return dy * (1.0f - y * y);
        default:
            return dy;
    }
}
