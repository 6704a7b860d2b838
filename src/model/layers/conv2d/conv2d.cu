#include "activation.cuh"
#include "channel_sums.cuh"

// In these two, a block takes rows of pixels' channels: threadIdx.x goes over packs of channels, threadIdx.y over rows.

template <u32 N>
__device__ inline void add_bias_to_rows(T* y, const float* bias, u32 activation, u32 filters, u64 rows) {
    for (u32 filter = threadIdx.x * N; filter < filters; filter += blockDim.x * N) {
        const Lanes<N> shift = load<N>(bias + filter);
        for (u64 row = u64(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += u64(gridDim.x) * blockDim.y) {
            Lanes<N> value = load<N>(y + row * filters + filter);
            for (u32 j = 0; j < N; j++) {
                value.at[j] = activate(activation, value.at[j] + shift.at[j]);
            }
            store<N>(y + row * filters + filter, value);
        }
    }
}

// y = activation(y + bias), in place: y (rows, filters), bias (filters). Moves y once in and once out.
extern "C" __global__ void __launch_bounds__(THREADS) add_bias(
    T* y, const float* __restrict__ bias, u32 activation, u32 filters, u64 rows) {
    if (filters % WIDE == 0) {
        add_bias_to_rows<WIDE>(y, bias, activation, filters, rows);
    } else {
        add_bias_to_rows<1>(y, bias, activation, filters, rows);
    }
}

template <u32 N>
__device__ inline void sum_rows(T* dy, const T* y, float* sums, u32 activation, u32 filters, u64 rows, Shared& shared) {
    const u64 part = (rows + gridDim.x - 1) / gridDim.x, start = blockIdx.x * part;
    const u64 end = start + part < rows ? start + part : rows;
    for (u32 first = 0; first < filters; first += blockDim.x * N) {
        const u32 filter = first + threadIdx.x * N;
        Lanes<N> found = {};
        for (u64 row = start + threadIdx.y; row < end && filter < filters; row += blockDim.y) {
            const u64 at = row * filters + filter;
            Lanes<N> gradient = load<N>(dy + at);
            if (activation != NONE) {
                const Lanes<N> output = load<N>(y + at);
                for (u32 j = 0; j < N; j++) {
                    gradient.at[j] = activation_gradient(activation, output.at[j], gradient.at[j]);
                }
                store<N>(dy + at, gradient);
            }
            for (u32 j = 0; j < N; j++) {
                found.at[j] += gradient.at[j];
            }
        }
        store_part<N>(found, sums + u64(blockIdx.x) * filters, filter, filters, shared);
    }
}

// Undoes the activation in dy, in place, and sums it over the rows of each part: dy, y (rows, filters), sums (blocks, filters).
// Moves dy once in and, where there is an activation, once out, and y once.
extern "C" __global__ void __launch_bounds__(THREADS) sum_parts(
    T* dy, const T* y, float* __restrict__ sums, u32 activation, u32 filters, u64 rows) {
    __shared__ Shared shared;
    if (filters % WIDE == 0) {
        sum_rows<WIDE>(dy, y, sums, activation, filters, rows, shared);
    } else {
        sum_rows<1>(dy, y, sums, activation, filters, rows, shared);
    }
}

// What follows moves values between images and their arranged form, see cuda/arrangement.rs: a block of (block, block) pixels
// becomes one pixel with block * block * c channels. Filters are moved as if they were images. A thread has the same place in many
// images, so that the divisions that lead to the place are done once: the grid's columns are places, its rows take images in turn.

struct Place {
    u32 row, column, channel;
};

// Of value `at` of an image (height, width, channels).
__device__ inline Place place_of(u32 at, u32 width, u32 channels) {
    return {at / channels / width, at / channels % width, at % channels};
}

constexpr u32 OUTSIDE = 0xffffffff;

template <u32 N>
__device__ inline void arrange_packs(const T* from, T* to, u32 images, u32 h, u32 w, u32 c, u32 blocks_h, u32 blocks_w,
                                     u32 block, u32 top, u32 left) {
    const u32 channels = block * block * c, count = blocks_h * blocks_w * channels;
    for (u32 at = u32(first_item()) * N; at < count; at += u32(item_stride()) * N) {
        u32 sources[N];
        for (u32 j = 0; j < N; j++) {
            const Place place = place_of(at + j, blocks_w, channels);
            const u32 inner = place.channel / c;
            // In front of the image the subtraction wraps around, to beyond its end.
            const u32 row = place.row * block + inner / block - top, column = place.column * block + inner % block - left;
            sources[j] = row < h && column < w ? (row * w + column) * c + place.channel % c : OUTSIDE;
        }
        for (u64 image = blockIdx.y; image < images; image += gridDim.y) {
            const T* source = from + image * h * w * c;
            Pack<T, N> pack;
            for (u32 j = 0; j < N; j++) {
                pack.values[j] = sources[j] == OUTSIDE ? from_float<T>(0.0f) : source[sources[j]];
            }
            *reinterpret_cast<Pack<T, N>*>(to + image * count + at) = pack;
        }
    }
}

// to (images, blocks_h, blocks_w, block * block * c) = from (images, h, w, c) with zeros around it, of which `top` rows and
// `left` columns lie in front. Moves each once; `from` a value at a time, as its pixels begin anywhere.
extern "C" __global__ void __launch_bounds__(THREADS) arrange(
    const T* __restrict__ from, T* __restrict__ to, u32 images, u32 h, u32 w, u32 c, u32 blocks_h, u32 blocks_w, u32 block,
    u32 top, u32 left) {
    if (block * block * c % WIDE == 0) {
        arrange_packs<WIDE>(from, to, images, h, w, c, blocks_h, blocks_w, block, top, left);
    } else {
        arrange_packs<1>(from, to, images, h, w, c, blocks_h, blocks_w, block, top, left);
    }
}

// The other way, for gradients: to (images, h, w, c), 0 where `from` does not reach.
extern "C" __global__ void __launch_bounds__(THREADS) restore(
    const T* __restrict__ from, T* __restrict__ to, u32 images, u32 h, u32 w, u32 c, u32 blocks_h, u32 blocks_w, u32 block,
    u32 top, u32 left) {
    const u32 channels = block * block * c, count = h * w * c;
    for (u32 at = u32(first_item()); at < count; at += u32(item_stride())) {
        const Place place = place_of(at, w, c);
        const u32 row = place.row + top, column = place.column + left;
        const u32 channel = (row % block * block + column % block) * c + place.channel;
        const bool reached = row / block < blocks_h && column / block < blocks_w;
        const u64 source = (u64(row / block) * blocks_w + column / block) * channels + channel;
        for (u64 image = blockIdx.y; image < images; image += gridDim.y) {
            const T value = reached ? from[image * blocks_h * blocks_w * channels + source] : from_float<T>(0.0f);
            to[image * count + at] = value;
        }
    }
}
