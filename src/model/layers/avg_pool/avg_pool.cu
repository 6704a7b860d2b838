#include "lanes.cuh"
#include "window.cuh"

// A thread makes a pack of channels of one pixel, in either direction; what neighbouring windows share comes from the caches.
// Zeros of the padding count as values.
__device__ inline float share(const Window& window) {
    return 1.0f / (float(window.rows.size) * float(window.columns.size));
}

template <u32 N>
__device__ inline void forward(const T* x, T* y, const Window& window, u32 c, u32 pixels) {
    const Axis &rows = window.rows, &columns = window.columns;
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(pixels) * packs; item += item_stride()) {
        const u32 number = u32(item) / packs, channel = u32(item) % packs * N;
        const Pixel out(number, rows.output, columns.output);
        const T* image = x + u64(out.sample) * rows.input * columns.input * c + channel;
        Lanes<N> sum = {};
        for (u32 kh = rows.first_tap(out.row); kh < rows.end_tap(out.row); kh++) {
            for (u32 kw = columns.first_tap(out.column); kw < columns.end_tap(out.column); kw++) {
                const u32 pixel = rows.position(out.row, kh) * columns.input + columns.position(out.column, kw);
                const Lanes<N> value = load<N>(image + u64(pixel) * c);
                for (u32 j = 0; j < N; j++) {
                    sum.at[j] += value.at[j];
                }
            }
        }
        for (u32 j = 0; j < N; j++) {
            sum.at[j] *= share(window);
        }
        store<N>(y + u64(number) * c + channel, sum);
    }
}

// x (N,H,W,C), y (N,OH,OW,C), pixels = N*OH*OW. Moves x once and y once.
extern "C" __global__ void avg_pool_forward(const T* x, T* y, Window window, u32 c, u32 pixels) {
    if (c % WIDE == 0) {
        forward<WIDE>(x, y, window, c, pixels);
    } else {
        forward<1>(x, y, window, c, pixels);
    }
}

template <u32 N>
__device__ inline void backward(const T* dy, T* dx, const Window& window, u32 c, u32 pixels) {
    const Axis &rows = window.rows, &columns = window.columns;
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(pixels) * packs; item += item_stride()) {
        const u32 number = u32(item) / packs, channel = u32(item) % packs * N;
        const Pixel in(number, rows.input, columns.input);
        const T* image = dy + u64(in.sample) * rows.output * columns.output * c + channel;
        Lanes<N> sum = {};
        for (u32 oh = rows.first_window(in.row); oh < rows.end_window(in.row); oh++) {
            for (u32 ow = columns.first_window(in.column); ow < columns.end_window(in.column); ow++) {
                const Lanes<N> gradient = load<N>(image + u64(oh * columns.output + ow) * c);
                for (u32 j = 0; j < N; j++) {
                    sum.at[j] += gradient.at[j] * share(window);
                }
            }
        }
        store<N>(dx + u64(number) * c + channel, sum);
    }
}

// dy (N,OH,OW,C), dx (N,H,W,C), pixels = N*H*W. Moves dy once and dx once.
extern "C" __global__ void avg_pool_backward(const T* dy, T* dx, Window window, u32 c, u32 pixels) {
    if (c % WIDE == 0) {
        backward<WIDE>(dy, dx, window, c, pixels);
    } else {
        backward<1>(dy, dx, window, c, pixels);
    }
}
