// common.cuh by the host's compiler: what the test in header.rs compares with the CPU's.
#include <cstdio>

#define __device__
struct Dim {
    unsigned x;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

#include "../../src/device/cuda/kernels/common.cuh"

// x = 2 x + 1, in place, so that a value that is taken twice shows; by a grid of two blocks of three threads, one after the other.
template <typename V>
static void print_map(V* x, u64 n) {
    gridDim.x = 2, blockDim.x = 3;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) {
            map(n, [](float x) { return 2 * x + 1; }, x, x);
        }
    }
    std::printf("map");
    for (u64 i = 0; i < n; i++) {
        std::printf(" %g", to_float(x[i]));
    }
    std::printf("\n");
}

template <typename V>
static void print_maps() {
    const u64 most = 64;
    alignas(16) static V x[most];
    // From an address of a pack, and from one that is not.
    for (u64 start = 0; start < 2; start++) {
        for (u64 n = 0; n < most - 1; n += 31) {
            for (u64 i = 0; i < most; i++) {
                x[i] = from_float<V>(i);
            }
            print_map(x + start, n);
        }
    }
}

int main() {
    u32 a, b, c, d, key_0, key_1;
    while (std::scanf("%u %u %u %u %u %u", &a, &b, &c, &d, &key_0, &key_1) == 6) {
        const Words words = philox({{a, b, c, d}}, key_0, key_1);
        std::printf("%u %u %u %u %g\n", words.at[0], words.at[1], words.at[2], words.at[3], unit(words.at[0]));
        union {
            u32 bits;
            float value;
        } x = {a};
        const bf16 brief = from_float<bf16>(x.value);
        const f16 half = from_float<f16>(x.value);
        std::printf("%u %u %g %g\n", brief.bits, half.bits, to_float(brief), to_float(half));
    }
    print_maps<float>();
    print_maps<bf16>();
    print_maps<f16>();
}
