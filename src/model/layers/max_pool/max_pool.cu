#include "lanes.cuh"
#include "window.cuh"

// As in cpu.rs: the winner is the first tap that holds the largest value, NaN wins, and NO_TAP stands where the ReLU in front
// lets no gradient through. A thread makes a pack of channels of one pixel; what neighbouring windows share comes from the caches.
constexpr u8 NO_TAP = 255;
// Loads that a thread has under way: of a window's line in forward, of the windows that see a pixel in backward.
constexpr u32 TAPS = 4, WINDOWS = 2;

template <u32 N>
__device__ inline void forward(const T* x, T* y, u8* winner, const Window& window, u32 c, u32 pixels, u32 masks) {
    const Axis &rows = window.rows, &columns = window.columns;
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(pixels) * packs; item += item_stride()) {
        const u32 number = u32(item) / packs, channel = u32(item) % packs * N;
        const Pixel out(number, rows.output, columns.output);
        const T* image = x + u64(out.sample) * rows.input * columns.input * c + channel;
        Lanes<N> best;
        u32 at[N];
        for (u32 j = 0; j < N; j++) {
            best.at[j] = __uint_as_float(0xff800000);
            at[j] = rows.first_tap(out.row) * columns.size + columns.first_tap(out.column);
        }
        const u32 first = columns.first_tap(out.column), end = columns.end_tap(out.column);
        for (u32 kh = rows.first_tap(out.row); kh < rows.end_tap(out.row); kh++) {
            const T* line = image + u64(rows.position(out.row, kh) * columns.input) * c;
            for (u32 start = first; start < end; start += TAPS) {
                Pack<T, N> seen[TAPS] = {};
                for (u32 k = 0; k < TAPS; k++) {
                    if (start + k < end) {
                        seen[k] = fetch<N>(line + u64(columns.position(out.column, start + k)) * c);
                    }
                }
                for (u32 k = 0; k < TAPS && start + k < end; k++) {
                    const Lanes<N> value = to_lanes(seen[k]);
                    for (u32 j = 0; j < N; j++) {
                        const bool larger = value.at[j] > best.at[j] || value.at[j] != value.at[j];
                        best.at[j] = larger ? value.at[j] : best.at[j];
                        at[j] = larger ? kh * columns.size + start + k : at[j];
                    }
                }
            }
        }
        Pack<u8, N> winners;
        for (u32 j = 0; j < N; j++) {
            winners.values[j] = !masks || best.at[j] > 0.0f ? u8(at[j]) : NO_TAP;
        }
        const u64 to = u64(number) * c + channel;
        store<N>(y + to, best);
        *reinterpret_cast<Pack<u8, N>*>(winner + to) = winners;
    }
}

// x (N,H,W,C), y (N,OH,OW,C), winner (N,OH,OW,C), pixels = N*OH*OW. Moves x once, y once, and a byte a value of y.
extern "C" __global__ void max_pool_forward(const T* x, T* y, u8* winner, Window window, u32 c, u32 pixels, u32 masks) {
    if (c % WIDE == 0) {
        forward<WIDE>(x, y, winner, window, c, pixels, masks);
    } else {
        forward<1>(x, y, winner, window, c, pixels, masks);
    }
}

// Each value is gathered from the windows that see it, in their order.
template <u32 N>
__device__ inline void backward(const T* dy, const u8* winner, T* dx, const Window& window, u32 c, u32 pixels) {
    const Axis &rows = window.rows, &columns = window.columns;
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(pixels) * packs; item += item_stride()) {
        const u32 number = u32(item) / packs, channel = u32(item) % packs * N;
        const Pixel in(number, rows.input, columns.input);
        const u64 image = u64(in.sample) * rows.output * columns.output * c + channel;
        const u32 first = columns.first_window(in.column), end = columns.end_window(in.column);
        Lanes<N> sum = {};
        for (u32 oh = rows.first_window(in.row); oh < rows.end_window(in.row); oh++) {
            for (u32 start = first; start < end; start += WINDOWS) {
                Pack<T, N> gradients[WINDOWS] = {};
                Pack<u8, N> winners[WINDOWS] = {};
                for (u32 k = 0; k < WINDOWS; k++) {
                    if (start + k < end) {
                        const u64 from = image + u64(oh * columns.output + start + k) * c;
                        gradients[k] = fetch<N>(dy + from);
                        winners[k] = fetch<N>(winner + from);
                    }
                }
                for (u32 k = 0; k < WINDOWS && start + k < end; k++) {
                    const Lanes<N> gradient = to_lanes(gradients[k]);
                    const u32 tap = rows.tap(oh, in.row) * columns.size + columns.tap(start + k, in.column);
                    for (u32 j = 0; j < N; j++) {
                        sum.at[j] += winners[k].values[j] == tap ? gradient.at[j] : 0.0f;
                    }
                }
            }
        }
        store<N>(dx + u64(number) * c + channel, sum);
    }
}

// dy (N,OH,OW,C), winner (N,OH,OW,C), dx (N,H,W,C), pixels = N*H*W. Moves dy once, a byte a value of it, and dx once.
extern "C" __global__ void max_pool_backward(const T* dy, const u8* winner, T* dx, Window window, u32 c, u32 pixels) {
    if (c % WIDE == 0) {
        backward<WIDE>(dy, winner, dx, window, c, pixels);
    } else {
        backward<1>(dy, winner, dx, window, c, pixels);
    }
}
