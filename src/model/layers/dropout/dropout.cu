#include "lanes.cuh"

// A thread makes the eight values of a sample that one Philox block decides, two a word, the low half the first.
constexpr u32 OF_A_BLOCK = 8;

extern "C" __global__ void begin_pass(u64* to, u64 first_sample) {
    *to = first_sample;
}

// to = scale * from where the half word that is drawn for a value is not below threshold, or else 0. from, to (samples,values).
// Stream and counter are those of `Rng::new(seed, Purpose::Dropout, layer, *first_sample + sample)`. Moves from once and to once.
extern "C" __global__ void dropout(
    const T* from, T* to, u32 samples, u32 values, const u64* first_sample, u32 layer, u32 key_0, u32 key_1,
    u32 threshold, float scale) {
    const u32 blocks = (values + OF_A_BLOCK - 1) / OF_A_BLOCK;
    const u64 first = *first_sample;
    for (u64 item = first_item(); item < u64(samples) * blocks; item += item_stride()) {
        const u32 sample = u32(item) / blocks, block = u32(item) % blocks;
        const u64 index = first + sample, start = u64(sample) * values + block * OF_A_BLOCK;
        const Words words = philox({{block, u32(index), u32(index >> 32), layer}}, key_0, key_1);
        auto keep = [&](u32 number, float value) {
            const u32 drawn = words.at[number / 2] >> number % 2 * 16 & 0xffff;
            return drawn < threshold ? 0.0f : value * scale;
        };
        if (values % OF_A_BLOCK == 0) {
            Lanes<OF_A_BLOCK> value = load<OF_A_BLOCK>(from + start);
            for (u32 j = 0; j < OF_A_BLOCK; j++) {
                value.at[j] = keep(j, value.at[j]);
            }
            store<OF_A_BLOCK>(to + start, value);
        } else {
            for (u32 j = 0; j < OF_A_BLOCK; j++) {
                if (block * OF_A_BLOCK + j < values) {
                    to[start + j] = from_float<T>(keep(j, to_float(from[start + j])));
                }
            }
        }
    }
}
