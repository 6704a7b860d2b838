#include "lanes.cuh"
#include "window.cuh"

// As in cpu.rs: the winner is the first tap that holds the largest value, NaN wins, and NO_TAP stands where the ReLU in front
// lets no gradient through. A thread makes a pack of channels of one pixel; what neighbouring windows share comes from the caches.
constexpr u8 NO_TAP = 255;

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
        for (u32 kh = rows.first_tap(out.row); kh < rows.end_tap(out.row); kh++) {
            for (u32 kw = columns.first_tap(out.column); kw < columns.end_tap(out.column); kw++) {
                const u32 pixel = rows.position(out.row, kh) * columns.input + columns.position(out.column, kw);
                const Lanes<N> value = load<N>(image + u64(pixel) * c);
                for (u32 j = 0; j < N; j++) {
                    const bool larger = value.at[j] > best.at[j] || value.at[j] != value.at[j];
                    best.at[j] = larger ? value.at[j] : best.at[j];
                    at[j] = larger ? kh * columns.size + kw : at[j];
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
        Lanes<N> sum = {};
        for (u32 oh = rows.first_window(in.row); oh < rows.end_window(in.row); oh++) {
            for (u32 ow = columns.first_window(in.column); ow < columns.end_window(in.column); ow++) {
                const u64 from = image + u64(oh * columns.output + ow) * c;
                const Lanes<N> gradient = load<N>(dy + from);
                const Pack<u8, N> winners = *reinterpret_cast<const Pack<u8, N>*>(winner + from);
                const u32 tap = rows.tap(oh, in.row) * columns.size + columns.tap(ow, in.column);
                for (u32 j = 0; j < N; j++) {
                    sum.at[j] += winners.values[j] == tap ? gradient.at[j] : 0.0f;
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
