#include "channel_sums.cuh"
#include "window.cuh"

// As in cpu.rs: the winner is the first tap that holds the largest value, NaN wins, and NO_TAP stands where the ReLU in front
// lets no gradient through.
//
// A block takes rows of pixels, one after the other. Its threads share out a row: threadIdx.x goes over packs of channels,
// threadIdx.y over pixels, so that no pixel's place costs a division. What neighbouring windows share comes from the caches.
// The sizes and strides that networks use are known to the compiler, which unrolls their loops: there would be too many
// instructions a value otherwise.
constexpr u8 NO_TAP = 255;
constexpr u32 ANY = 0;

// What a window's taps hold, by channel: the largest value, and where.
template <u32 N>
struct Best {
    Lanes<N> value;
    u32 tap[N];
};

// Of the window at (row, column): image (H,W,C) from the first channel of the pack on.
template <u32 N, u32 SIZE>
__device__ inline Best<N> best_of(const T* image, const Axis& rows, const Axis& columns, u32 row, u32 column, u32 c) {
    // Loads that a thread has under way.
    constexpr u32 TAPS = SIZE == ANY ? 4 : SIZE;
    Best<N> best;
    for (u32 j = 0; j < N; j++) {
        best.value.at[j] = __uint_as_float(0xff800000);
        best.tap[j] = rows.first_tap(row) * columns.size + columns.first_tap(column);
    }
    for (u32 kh = 0; kh < rows.size; kh++) {
        const u32 from_row = rows.position(row, kh);
        for (u32 start = 0; start < columns.size && from_row < rows.input; start += TAPS) {
            Pack<T, N> seen[TAPS] = {};
            bool inside[TAPS];
            for (u32 k = 0; k < TAPS; k++) {
                const u32 from_column = columns.position(column, start + k);
                inside[k] = start + k < columns.size && from_column < columns.input;
                if (inside[k]) {
                    seen[k] = fetch<N>(image + u64(from_row * columns.input + from_column) * c);
                }
            }
            for (u32 k = 0; k < TAPS; k++) {
                const Lanes<N> value = to_lanes(seen[k]);
                for (u32 j = 0; j < N; j++) {
                    const bool larger = inside[k] && (value.at[j] > best.value.at[j] || value.at[j] != value.at[j]);
                    best.value.at[j] = larger ? value.at[j] : best.value.at[j];
                    best.tap[j] = larger ? kh * columns.size + start + k : best.tap[j];
                }
            }
        }
    }
    return best;
}

template <u32 N, u32 SIZE>
__device__ inline void forward(const T* x, T* y, u8* winner, Window window, u32 c, u32 samples, u32 masks) {
    Axis &rows = window.rows, &columns = window.columns;
    if (SIZE != ANY) {
        rows.size = columns.size = SIZE;
    }
    for (u32 number = blockIdx.x; number < samples * rows.output; number += gridDim.x) {
        const u32 sample = number / rows.output, row = number % rows.output;
        const T* image = x + u64(sample) * rows.input * columns.input * c;
        for (u32 channel = threadIdx.x * N; channel < c; channel += blockDim.x * N) {
            for (u32 column = threadIdx.y; column < columns.output; column += blockDim.y) {
                const Best<N> best = best_of<N, SIZE>(image + channel, rows, columns, row, column, c);
                Pack<u8, N> winners;
                for (u32 j = 0; j < N; j++) {
                    winners.values[j] = !masks || best.value.at[j] > 0.0f ? u8(best.tap[j]) : NO_TAP;
                }
                const u64 to = u64(number * columns.output + column) * c + channel;
                store<N>(y + to, best.value);
                *reinterpret_cast<Pack<u8, N>*>(winner + to) = winners;
            }
        }
    }
}

// x (N,H,W,C), y (N,OH,OW,C), winner (N,OH,OW,C). Moves x once, y once, and a byte a value of y.
extern "C" __global__ void __launch_bounds__(THREADS, 3) max_pool_forward(
    const T* __restrict__ x, T* __restrict__ y, u8* __restrict__ winner, Window window, u32 c, u32 samples, u32 masks) {
    const u32 size = window.rows.size;
    if (c % WIDE != 0) {
        forward<1, ANY>(x, y, winner, window, c, samples, masks);
    } else if (size == 3) {
        forward<WIDE, 3>(x, y, winner, window, c, samples, masks);
    } else if (size == 2) {
        forward<WIDE, 2>(x, y, winner, window, c, samples, masks);
    } else {
        forward<WIDE, ANY>(x, y, winner, window, c, samples, masks);
    }
}

// Gradients of SIDE x SIDE pixels, which a thread makes together.
template <u32 N, u32 SIDE>
struct Tile {
    Lanes<N> at[SIDE][SIDE];
};

// The pixels under the first taps of window (row, column), as many as lie between two windows. They are seen by this window and
// by the REACH - 1 in front of it, down and across, each of which is read once for all of them. A pixel's sum is in the order of
// its windows. dy, winner (OH,OW,C) from the first channel of the pack on.
template <u32 N, u32 SIZE, u32 STRIDE>
__device__ inline Tile<N, STRIDE> gather(const T* dy, const u8* winner, const Axis& rows, const Axis& columns, u32 row,
                                         u32 column, u32 c) {
    constexpr u32 REACH = (SIZE + STRIDE - 1) / STRIDE;
    Pack<T, N> gradients[REACH][REACH] = {};
    Pack<u8, N> winners[REACH][REACH] = {};
    for (u32 up = 0; up < REACH; up++) {
        for (u32 left = 0; left < REACH; left++) {
            // In front of the first window the subtractions wrap around, to beyond the last.
            if (row - up < rows.output && column - left < columns.output) {
                const u64 from = u64((row - up) * columns.output + column - left) * c;
                gradients[up][left] = fetch<N>(dy + from);
                winners[up][left] = fetch<N>(winner + from);
            }
        }
    }
    Tile<N, STRIDE> tile = {};
    for (u32 at = 0; at < REACH * REACH; at++) {
        const u32 up = REACH - 1 - at / REACH, left = REACH - 1 - at % REACH;
        const Lanes<N> gradient = to_lanes(gradients[up][left]);
        for (u32 pixel = 0; pixel < STRIDE * STRIDE; pixel++) {
            const u32 down = pixel / STRIDE, across = pixel % STRIDE;
            const u32 kh = up * STRIDE + down, kw = left * STRIDE + across;
            for (u32 j = 0; j < N && kh < SIZE && kw < SIZE; j++) {
                const bool won = winners[up][left].values[j] == kh * SIZE + kw;
                tile.at[down][across].at[j] += won ? gradient.at[j] : 0.0f;
            }
        }
    }
    return tile;
}

// The same for one pixel, under windows of any size and stride.
template <u32 N>
__device__ inline Tile<N, 1> gather_any(const T* dy, const u8* winner, const Axis& rows, const Axis& columns, u32 row,
                                        u32 column, u32 c) {
    Tile<N, 1> sum = {};
    for (u32 oh = rows.first_window(row); oh < rows.end_window(row); oh++) {
        for (u32 ow = columns.first_window(column); ow < columns.end_window(column); ow++) {
            const u64 from = u64(oh * columns.output + ow) * c;
            const Lanes<N> gradient = load<N>(dy + from);
            const Pack<u8, N> winners = fetch<N>(winner + from);
            const u32 tap = rows.tap(oh, row) * columns.size + columns.tap(ow, column);
            for (u32 j = 0; j < N; j++) {
                sum.at[0][0].at[j] += winners.values[j] == tap ? gradient.at[j] : 0.0f;
            }
        }
    }
    return sum;
}

// A block makes its part of the rows of tiles, and leaves their sums where they are wanted.
template <u32 N, u32 SIZE, u32 STRIDE>
__device__ inline void backward(const T* dy, const u8* winner, T* dx, float* sums, const Window& window, u32 c, u32 samples,
                                u32 wants_sums, Shared& shared) {
    constexpr u32 SIDE = STRIDE == ANY ? 1 : STRIDE;
    const Axis &rows = window.rows, &columns = window.columns;
    // Tiles begin where windows do: in front of the image, if there are zeros.
    const u32 above = STRIDE == ANY ? 0 : rows.before, left = STRIDE == ANY ? 0 : columns.before;
    const u32 height = (rows.input + above + SIDE - 1) / SIDE, width = (columns.input + left + SIDE - 1) / SIDE;
    const u32 part = (samples * height + gridDim.x - 1) / gridDim.x;
    const u32 start = blockIdx.x * part, end = min(start + part, samples * height);
    for (u32 first = 0; first < c; first += blockDim.x * N) {
        const u32 channel = first + threadIdx.x * N;
        Lanes<N> found = {};
        for (u32 number = start; number < end && channel < c; number++) {
            const u32 sample = number / height, row = number % height;
            const u64 windows = u64(sample) * rows.output * columns.output * c + channel;
            for (u32 column = threadIdx.y; column < width; column += blockDim.y) {
                Tile<N, SIDE> tile;
                if constexpr (STRIDE == ANY) {
                    tile = gather_any<N>(dy + windows, winner + windows, rows, columns, row, column, c);
                } else {
                    tile = gather<N, SIZE, STRIDE>(dy + windows, winner + windows, rows, columns, row, column, c);
                }
                for (u32 pixel = 0; pixel < SIDE * SIDE; pixel++) {
                    const u32 y = row * SIDE + pixel / SIDE - above, x = column * SIDE + pixel % SIDE - left;
                    if (y < rows.input && x < columns.input) {
                        const Lanes<N>& gradient = tile.at[pixel / SIDE][pixel % SIDE];
                        store<N>(dx + ((u64(sample) * rows.input + y) * columns.input + x) * c + channel, gradient);
                        for (u32 j = 0; j < N; j++) {
                            found.at[j] += gradient.at[j];
                        }
                    }
                }
            }
        }
        if (wants_sums) {
            store_part<N>(found, sums + u64(blockIdx.x) * c, channel, c, shared);
        }
    }
}

// dy (N,OH,OW,C), winner (N,OH,OW,C), dx (N,H,W,C), and where they are wanted sums (blocks,C), of dx over the rows of each block.
// Moves dy once, a byte a value of it, and dx once.
extern "C" __global__ void __launch_bounds__(THREADS) max_pool_backward(
    const T* __restrict__ dy, const u8* __restrict__ winner, T* __restrict__ dx, float* __restrict__ sums, Window window,
    u32 c, u32 samples, u32 wants_sums) {
    __shared__ Shared shared;
    const bool halves = window.rows.stride == 2 && window.columns.stride == 2;
    if (c % WIDE != 0) {
        backward<1, ANY, ANY>(dy, winner, dx, sums, window, c, samples, wants_sums, shared);
    } else if (halves && window.rows.size == 3) {
        backward<WIDE, 3, 2>(dy, winner, dx, sums, window, c, samples, wants_sums, shared);
    } else if (halves && window.rows.size == 2) {
        backward<WIDE, 2, 2>(dy, winner, dx, sums, window, c, samples, wants_sums, shared);
    } else {
        backward<WIDE, ANY, ANY>(dy, winner, dx, sums, window, c, samples, wants_sums, shared);
    }
}
