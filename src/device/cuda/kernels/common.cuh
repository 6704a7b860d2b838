// What kernels share. No header of CUDA is included: NVRTC has none. What has no spelling in C++ is written in PTX, and beside it
// in C++ for compilers of the host, so that kernels can be tried without a GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

// The type of the values that a layer computes with: float, bf16 or f16. Arithmetic is in float.
#ifdef ELEMENT
typedef ELEMENT T;
#endif

__device__ inline float to_float(float x) {
    return x;
}

__device__ inline float to_float(bf16 x) {
    union {
        u32 bits;
        float value;
    } wide = {u32(x.bits) << 16};
    return wide.value;
}

__device__ inline float to_float(f16 x) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    union {
        u16 bits;
        _Float16 value;
    } narrow = {x.bits};
    return float(narrow.value);
#endif
}

// from_float<V>(x): x as a V, rounded to nearest even.
template <typename V>
__device__ V from_float(float x);

template <>
__device__ inline float from_float<float>(float x) {
    return x;
}

template <>
__device__ inline bf16 from_float<bf16>(float x) {
    bf16 narrow;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
#else
    union {
        float value;
        u32 bits;
    } wide = {x};
    narrow.bits = x != x ? u16(wide.bits >> 16 | 0x40) : u16((wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16);
#endif
    return narrow;
}

template <>
__device__ inline f16 from_float<f16>(float x) {
    f16 narrow;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
#else
    union {
        _Float16 value;
        u16 bits;
    } rounded = {_Float16(x)};
    narrow.bits = rounded.bits;
#endif
    return narrow;
}

// Threads stride over their grid: for (u64 i = first_item(); i < n; i += item_stride())
__device__ inline u64 first_item() {
    return u64(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline u64 item_stride() {
    return u64(gridDim.x) * blockDim.x;
}

// N values that are loaded and stored together.
template <typename V, u32 N>
struct alignas(N * sizeof(V)) Pack {
    V values[N];
};

template <u32 N, typename V>
__device__ inline bool is_packed(const V* address) {
    return reinterpret_cast<u64>(address) % (N * sizeof(V)) == 0;
}

__device__ constexpr u64 largest(u64 size) {
    return size;
}

template <typename... Sizes>
__device__ constexpr u64 largest(u64 size, Sizes... others) {
    return size > largest(others...) ? size : largest(others...);
}

// y[i] = f(x[i], ...) for i < n; f takes and gives floats. Up to 16 bytes a load where all addresses allow it. y may be one of
// the inputs.
template <typename F, typename Out, typename... In>
__device__ inline void map(u64 n, F f, Out* y, const In*... x) {
    constexpr u32 N = 16 / largest(sizeof(Out), sizeof(In)...);
    u64 packed = 0;
    if (is_packed<N>(y) && (is_packed<N>(x) && ...)) {
        packed = n / N * N;
        for (u64 i = first_item(); i < n / N; i += item_stride()) {
            Pack<Out, N> out;
            auto each = [&](Pack<In, N>... in) {
                for (u32 j = 0; j < N; j++) {
                    out.values[j] = from_float<Out>(f(to_float(in.values[j])...));
                }
            };
            each(reinterpret_cast<const Pack<In, N>*>(x)[i]...);
            reinterpret_cast<Pack<Out, N>*>(y)[i] = out;
        }
    }
    for (u64 i = packed + first_item(); i < n; i += item_stride()) {
        y[i] = from_float<Out>(f(to_float(x[i])...));
    }
}

// Philox4x32-10 (Salmon et al. 2011), word for word that of src/rng.rs, where counter and key are explained: four random words
// from a counter and a key.
struct Words {
    u32 at[4];
};

__device__ inline Words philox(Words counter, u32 key_0, u32 key_1) {
    for (u32 round = 0; round < 10; round++) {
        const u64 a = u64(0xD2511F53u) * counter.at[0], b = u64(0xCD9E8D57u) * counter.at[2];
        counter = {{u32(b >> 32) ^ counter.at[1] ^ key_0, u32(b), u32(a >> 32) ^ counter.at[3] ^ key_1, u32(a)}};
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
    return counter;
}

// A value in [0, 1) from a word's upper 24 bits.
__device__ inline float unit(u32 word) {
    return float(word >> 8) * (1.0f / (1 << 24));
}
