#include "common.cuh"
#include "activation.cuh"

// y = activation(y + bias), in place: y (n / filters, filters), bias (filters)
extern "C" __global__ void add_bias(T* y, const float* bias, u32 activation, u32 filters, u64 n) {
    for (u64 i = first_item(); i < n; i += item_stride()) {
        y[i] = from_float<T>(activate(activation, to_float(y[i]) + bias[i % filters]));
    }
}

// Sums of dy's columns, over LANES rows of threads, each thread its filter. All threads of the block come here; the sum
// is the first lane's.
constexpr u32 COLUMNS = 32, LANES = 8;

__device__ inline float sum_lanes(float sum) {
    __shared__ float lanes[LANES][COLUMNS];
    lanes[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0) {
        for (u32 lane = 1; lane < LANES; lane++) {
            sum += lanes[lane][threadIdx.x];
        }
    }
    return sum;
}

// Undoes the activation in dy, in place, and sums it over the rows of each part: dy, y (rows, filters), sums (parts, filters).
// Blocks are (COLUMNS, LANES), the grid (filters / COLUMNS, parts), rounded up.
extern "C" __global__ void sum_parts(T* dy, const T* y, float* sums, u32 activation, u32 filters, u64 rows, u64 rows_per_part) {
    const u32 filter = blockIdx.x * COLUMNS + threadIdx.x;
    const u64 start = blockIdx.y * rows_per_part;
    const u64 end = start + rows_per_part < rows ? start + rows_per_part : rows;
    float sum = 0.0f;
    if (filter < filters) {
        for (u64 row = start + threadIdx.y; row < end; row += LANES) {
            const u64 i = row * filters + filter;
            float gradient = to_float(dy[i]);
            if (activation != NONE) {
                dy[i] = from_float<T>(activation_gradient(activation, to_float(y[i]), gradient));
                gradient = to_float(dy[i]);
            }
            sum += gradient;
        }
    }
    sum = sum_lanes(sum);
    if (threadIdx.y == 0 && filter < filters) {
        sums[u64(blockIdx.y) * filters + filter] = sum;
    }
}

// dbias = the sum of the parts' sums: sums (parts, filters), dbias (filters). Blocks are (COLUMNS, LANES).
extern "C" __global__ void add_parts(const float* sums, float* dbias, u32 filters, u32 parts) {
    const u32 filter = blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (filter < filters) {
        for (u32 part = threadIdx.y; part < parts; part += LANES) {
            sum += sums[u64(part) * filters + filter];
        }
    }
    sum = sum_lanes(sum);
    if (threadIdx.y == 0 && filter < filters) {
        dbias[filter] = sum;
    }
}

// What follows moves values between images and their arranged form, see cuda/arrangement.rs: a block of (block, block) pixels
// becomes one pixel with block * block * c channels. Filters are moved as if they were images.

struct Place {
    u32 row, column, channel;
};

// Of value `at` of an image (height, width, channels).
__device__ inline Place place_of(u32 at, u32 width, u32 channels) {
    return {at / channels / width, at / channels % width, at % channels};
}

// to (images, blocks_h, blocks_w, block * block * c) = from (images, h, w, c) with zeros around it, of which `top` rows and
// `left` columns lie in front. The grid's rows take images in turn.
extern "C" __global__ void arrange(
    const T* from, T* to, u32 images, u32 h, u32 w, u32 c, u32 blocks_h, u32 blocks_w, u32 block, u32 top, u32 left
) {
    const u32 channels = block * block * c, count = blocks_h * blocks_w * channels;
    for (u32 at = first_item(); at < count; at += item_stride()) {
        const Place place = place_of(at, blocks_w, channels);
        const u32 inner = place.channel / c;
        // In front of the image the subtraction wraps around, to beyond its end.
        const u32 row = place.row * block + inner / block - top, column = place.column * block + inner % block - left;
        const bool inside = row < h && column < w;
        for (u64 image = blockIdx.y; image < images; image += gridDim.y) {
            const u64 source = ((image * h + row) * w + column) * c + place.channel % c;
            to[image * count + at] = inside ? from[source] : from_float<T>(0.0f);
        }
    }
}

// The other way, for gradients: to (images, h, w, c), 0 where `from` does not reach.
extern "C" __global__ void restore(
    const T* from, T* to, u32 images, u32 h, u32 w, u32 c, u32 blocks_h, u32 blocks_w, u32 block, u32 top, u32 left
) {
    const u32 channels = block * block * c, count = h * w * c;
    for (u32 at = first_item(); at < count; at += item_stride()) {
        const Place place = place_of(at, w, c);
        const u32 row = place.row + top, column = place.column + left;
        const u32 channel = (row % block * block + column % block) * c + place.channel;
        const bool reached = row / block < blocks_h && column / block < blocks_w;
        for (u64 image = blockIdx.y; image < images; image += gridDim.y) {
            const u64 source = ((image * blocks_h + row / block) * blocks_w + column / block) * channels + channel;
            to[image * count + at] = reached ? from[source] : from_float<T>(0.0f);
        }
    }
}
