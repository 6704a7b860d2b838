// Sums of a gradient over its pixels, by channel: `ChannelSums` in mod.rs, where the steps are explained. In a block threadIdx.x
// goes over packs of channels and threadIdx.y over pixels.
#pragma once
#include "lanes.cuh"

// Threads of a block at most.
constexpr u32 THREADS = 256;

// A block's shared memory for `store_part`.
typedef Pack<float, WIDE> Shared[THREADS];

// part (C) = the block's sums, of which each thread has found some for the channels from `channel` on. All threads come here,
// those beyond the channels too.
template <u32 N>
__device__ inline void store_part(const Lanes<N>& found, float* part, u32 channel, u32 c, Shared& shared) {
    float* own = shared[0].values + (threadIdx.y * blockDim.x + threadIdx.x) * N;
    store<N>(own, found);
    for (u32 left = blockDim.y, half; left > 1; left = half) {
        half = (left + 1) / 2;
        __syncthreads();
        if (threadIdx.y + half < left) {
            for (u32 j = 0; j < N; j++) {
                own[j] += own[half * blockDim.x * N + j];
            }
        }
    }
    if (threadIdx.y == 0 && channel < c) {
        store<N>(part + channel, load<N>(own));
    }
    // The next channels use the memory again.
    __syncthreads();
}
