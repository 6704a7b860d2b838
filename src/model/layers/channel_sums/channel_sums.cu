#include "common.cuh"

// Columns of a block, and rows of threads that take turns at the parts.
constexpr u32 COLUMNS = 32, TURNS = 32;

// sums (channels) = the sums of parts (parts, channels). Blocks are (COLUMNS, TURNS), whose turns are added up in their order.
extern "C" __global__ void __launch_bounds__(COLUMNS * TURNS)
    add_parts(const float* __restrict__ parts, float* __restrict__ sums, u32 channels, u32 count) {
    __shared__ float found[TURNS][COLUMNS];
    const u32 channel = blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (channel < channels) {
        for (u32 part = threadIdx.y; part < count; part += TURNS) {
            sum += parts[u64(part) * channels + channel];
        }
    }
    found[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && channel < channels) {
        for (u32 turn = 1; turn < TURNS; turn++) {
            sum += found[turn][threadIdx.x];
        }
        sums[channel] = sum;
    }
}
