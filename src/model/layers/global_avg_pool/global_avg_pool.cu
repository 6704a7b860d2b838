#include "lanes.cuh"

// A block's threads: packs of channels, and pixels, of one sample. A thread adds up every ROWS-th pixel, then the block adds
// up its rows in their order. Sums are in double, as in cpu.rs: an image may have many pixels.
constexpr u32 COLUMNS = 32, ROWS = 8;

template <u32 N>
__device__ inline void forward(const T* x, T* y, u32 samples, u32 pixels, u32 c, double* sums) {
    double* own = sums + (threadIdx.y * COLUMNS + threadIdx.x) * N;
    for (u32 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        for (u32 first = blockIdx.y * COLUMNS; first < c / N; first += gridDim.y * COLUMNS) {
            const u32 channel = (first + threadIdx.x) * N;
            double sum[N] = {};
            for (u32 pixel = threadIdx.y; pixel < pixels && channel < c; pixel += ROWS) {
                const Lanes<N> value = load<N>(x + (u64(sample) * pixels + pixel) * c + channel);
                for (u32 j = 0; j < N; j++) {
                    sum[j] += value.at[j];
                }
            }
            for (u32 j = 0; j < N; j++) {
                own[j] = sum[j];
            }
            __syncthreads();
            if (threadIdx.y == 0 && channel < c) {
                Lanes<N> mean;
                for (u32 j = 0; j < N; j++) {
                    for (u32 row = 1; row < ROWS; row++) {
                        sum[j] += own[row * COLUMNS * N + j];
                    }
                    mean.at[j] = float(sum[j] / pixels);
                }
                store<N>(y + u64(sample) * c + channel, mean);
            }
            __syncthreads();
        }
    }
}

// x (N,HW,C), y (N,C). Moves x once.
extern "C" __global__ void __launch_bounds__(256) global_avg_pool_forward(
    const T* x, T* y, u32 samples, u32 pixels, u32 c) {
    __shared__ double sums[ROWS * COLUMNS * WIDE];
    if (c % WIDE == 0) {
        forward<WIDE>(x, y, samples, pixels, c, sums);
    } else {
        forward<1>(x, y, samples, pixels, c, sums);
    }
}

template <u32 N>
__device__ inline void backward(const T* dy, T* dx, u32 samples, u32 pixels, u32 c) {
    const float share = 1.0f / float(pixels);
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(samples) * pixels * packs; item += item_stride()) {
        const u32 pixel = u32(item) / packs, channel = u32(item) % packs * N;
        Lanes<N> gradient = load<N>(dy + u64(pixel / pixels) * c + channel);
        for (u32 j = 0; j < N; j++) {
            gradient.at[j] *= share;
        }
        store<N>(dx + u64(pixel) * c + channel, gradient);
    }
}

// dy (N,C), dx (N,HW,C). Moves dx once.
extern "C" __global__ void global_avg_pool_backward(const T* dy, T* dx, u32 samples, u32 pixels, u32 c) {
    if (c % WIDE == 0) {
        backward<WIDE>(dy, dx, samples, pixels, c);
    } else {
        backward<1>(dy, dx, samples, pixels, c);
    }
}
