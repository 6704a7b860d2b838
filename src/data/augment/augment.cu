#include "lanes.cuh"

// What is done to one sample, as `Placement` in cuda.rs has it: output pixel (y, x) shows pixel (y + top, x + left) of the image, x
// counted from the right where it is mirrored, or the border where that lies outside. An image is (height, width, C), of as many
// bytes as the output has values or fewer.
struct Placement {
    u32 image, height, width;
    i32 top, left;
    u32 mirrored;
    float light[3];
};

struct Sizes {
    u32 h, w, c;
};

// A byte becomes a float through a table of 256 values a channel, as in augment.rs: gathered from shared memory, where few
// channels' tables fit, or else from the caches.
constexpr u32 CHANNELS = 4;

template <u32 N>
__device__ inline void augment_rows(const u8* images, const Placement* placements, const float* tables, const float* border,
                                    T* out, Sizes sizes, u32 samples, u32 lights) {
    const u32 line = sizes.w * sizes.c, packs = line / N;
    const u64 image_bytes = u64(sizes.h) * line;
    for (u64 item = first_item(); item < u64(samples) * sizes.h * packs; item += item_stride()) {
        const u32 row = u32(item) / packs, first = u32(item) % packs * N, sample = row / sizes.h;
        const Placement& placement = placements[sample];
        const i32 source_y = i32(row % sizes.h) + placement.top;
        const u8* source = images + placement.image * image_bytes + (long long)(source_y) * (placement.width * sizes.c);
        const bool on_image = source_y >= 0 && source_y < i32(placement.height);
        u32 x = first / sizes.c, channel = first % sizes.c;
        Lanes<N> values;
        for (u32 j = 0; j < N; j++) {
            const i32 source_x = i32(placement.mirrored ? sizes.w - 1 - x : x) + placement.left;
            if (on_image && source_x >= 0 && source_x < i32(placement.width)) {
                const u8 byte = source[u32(source_x) * sizes.c + channel];
                const float light = lights ? placement.light[channel] : 0.0f;
                values.at[j] = tables[channel * 256 + byte] + light;
            } else {
                values.at[j] = border[channel];
            }
            channel++;
            if (channel == sizes.c) {
                channel = 0;
                x++;
            }
        }
        store<N>(out + u64(row) * line + first, values);
    }
}

// images (N) of H W C bytes each, placements (samples), tables (C,256), border (C), out (samples,H,W,C). With `lights` there are 3 channels.
// Moves what is seen of each image once, a byte a value, and out once. While an H200 moves the three bytes of a value in 16 bits, it
// has time for about ten operations on integers, fewer than a division takes; so a pack has divisions, and a value has none.
extern "C" __global__ void __launch_bounds__(256) augment(
    const u8* images, const Placement* placements, const float* tables, const float* border, T* out, Sizes sizes,
    u32 samples, u32 lights) {
    __shared__ float near[CHANNELS * 256];
    if (sizes.c <= CHANNELS) {
        for (u32 i = threadIdx.x; i < sizes.c * 256; i += blockDim.x) {
            near[i] = tables[i];
        }
        __syncthreads();
        tables = near;
    }
    if (sizes.w * sizes.c % WIDE == 0) {
        augment_rows<WIDE>(images, placements, tables, border, out, sizes, samples, lights);
    } else {
        augment_rows<1>(images, placements, tables, border, out, sizes, samples, lights);
    }
}
