#include "lanes.cuh"

// A block's threads: packs of channels, and pixels, of one sample. A thread looks at every ROWS-th pixel, then the block
// compares its rows.
constexpr u32 COLUMNS = 32, ROWS = 8;

struct Candidate {
    float value;
    u32 pixel;

    // The winner that cpu.rs finds going from pixel to pixel: the last NaN, or else the first of the largest.
    __device__ bool beats(const Candidate& other) const {
        if (value != value) {
            return other.value == other.value || pixel > other.pixel;
        }
        return value > other.value || (value == other.value && pixel < other.pixel);
    }
};

template <u32 N>
__device__ inline void forward(const T* x, T* y, u32* winner, u32 samples, u32 pixels, u32 c, Candidate* best) {
    Candidate* own = best + (threadIdx.y * COLUMNS + threadIdx.x) * N;
    for (u32 sample = blockIdx.x; sample < samples; sample += gridDim.x) {
        for (u32 first = blockIdx.y * COLUMNS; first < c / N; first += gridDim.y * COLUMNS) {
            const u32 channel = (first + threadIdx.x) * N;
            Candidate found[N];
            for (u32 j = 0; j < N; j++) {
                found[j] = {__uint_as_float(0xff800000), 0};
            }
            for (u32 pixel = threadIdx.y; pixel < pixels && channel < c; pixel += ROWS) {
                const Lanes<N> value = load<N>(x + (u64(sample) * pixels + pixel) * c + channel);
                for (u32 j = 0; j < N; j++) {
                    const Candidate next = {value.at[j], pixel};
                    found[j] = next.beats(found[j]) ? next : found[j];
                }
            }
            for (u32 j = 0; j < N; j++) {
                own[j] = found[j];
            }
            __syncthreads();
            if (threadIdx.y == 0 && channel < c) {
                const u64 to = u64(sample) * c + channel;
                Lanes<N> largest;
                for (u32 j = 0; j < N; j++) {
                    for (u32 row = 1; row < ROWS; row++) {
                        const Candidate next = own[row * COLUMNS * N + j];
                        found[j] = next.beats(found[j]) ? next : found[j];
                    }
                    largest.at[j] = found[j].value;
                    winner[to + j] = found[j].pixel;
                }
                store<N>(y + to, largest);
            }
            __syncthreads();
        }
    }
}

// x (N,HW,C), y (N,C), winner (N,C): a pixel. Moves x once.
extern "C" __global__ void __launch_bounds__(256) global_max_pool_forward(
    const T* x, T* y, u32* winner, u32 samples, u32 pixels, u32 c) {
    __shared__ Candidate best[ROWS * COLUMNS * WIDE];
    if (c % WIDE == 0) {
        forward<WIDE>(x, y, winner, samples, pixels, c, best);
    } else {
        forward<1>(x, y, winner, samples, pixels, c, best);
    }
}

template <u32 N>
__device__ inline void backward(const T* dy, const u32* winner, T* dx, u32 samples, u32 pixels, u32 c) {
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(samples) * pixels * packs; item += item_stride()) {
        const u32 pixel = u32(item) / packs, channel = u32(item) % packs * N;
        const u64 from = u64(pixel / pixels) * c + channel;
        Lanes<N> gradient = load<N>(dy + from);
        for (u32 j = 0; j < N; j++) {
            gradient.at[j] = winner[from + j] == pixel % pixels ? gradient.at[j] : 0.0f;
        }
        store<N>(dx + u64(pixel) * c + channel, gradient);
    }
}

// dy (N,C), winner (N,C), dx (N,HW,C). Moves dx once.
extern "C" __global__ void global_max_pool_backward(
    const T* dy, const u32* winner, T* dx, u32 samples, u32 pixels, u32 c) {
    if (c % WIDE == 0) {
        backward<WIDE>(dy, winner, dx, samples, pixels, c);
    } else {
        backward<1>(dy, winner, dx, samples, pixels, c);
    }
}
