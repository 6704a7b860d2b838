#include "common.cuh"

// A warp makes a row, so that sums are in one order; what it reads twice is in the nearest cache the second time.
constexpr u32 LANES = 32;
constexpr u32 ALL = 0xffffffff;

__device__ inline float sum_of_warp(float value) {
    for (u32 apart = LANES / 2; apart > 0; apart /= 2) {
        value += __shfl_xor_sync(ALL, value, apart);
    }
    return value;
}

// NaN where there is one, so that a broken value is seen.
__device__ inline float larger(float a, float b) {
    return a > b || a != a ? a : b;
}

// y = exp(x - the largest) / the sum of that: x, y (rows,C). Moves x once and y once.
extern "C" __global__ void __launch_bounds__(256) softmax_forward(const T* x, T* y, u32 rows, u32 c) {
    const u32 lane = threadIdx.x % LANES;
    for (u64 row = first_item() / LANES; row < rows; row += item_stride() / LANES) {
        const T* from = x + row * c;
        float largest = __uint_as_float(0xff800000), sum = 0.0f;
        for (u32 i = lane; i < c; i += LANES) {
            largest = larger(to_float(from[i]), largest);
        }
        for (u32 apart = LANES / 2; apart > 0; apart /= 2) {
            largest = larger(__shfl_xor_sync(ALL, largest, apart), largest);
        }
        for (u32 i = lane; i < c; i += LANES) {
            sum += expf(to_float(from[i]) - largest);
        }
        sum = sum_of_warp(sum);
        for (u32 i = lane; i < c; i += LANES) {
            y[row * c + i] = from_float<T>(expf(to_float(from[i]) - largest) / sum);
        }
    }
}

// dx_i = y_i (dy_i - sum of y_j dy_j): y, dy, dx (rows,C). Moves each once.
extern "C" __global__ void __launch_bounds__(256) softmax_backward(const T* y, const T* dy, T* dx, u32 rows, u32 c) {
    const u32 lane = threadIdx.x % LANES;
    for (u64 row = first_item() / LANES; row < rows; row += item_stride() / LANES) {
        const u64 start = row * c;
        float mean = 0.0f;
        for (u32 i = lane; i < c; i += LANES) {
            mean += to_float(y[start + i]) * to_float(dy[start + i]);
        }
        mean = sum_of_warp(mean);
        for (u32 i = lane; i < c; i += LANES) {
            dx[start + i] = from_float<T>(to_float(y[start + i]) * (to_float(dy[start + i]) - mean));
        }
    }
}
