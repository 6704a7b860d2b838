// The channels that a thread works on together. The widest load and store are of 16 bytes, so it takes WIDE where all rows of
// channels begin at a multiple of them, and one where they do not; `lanes.rs` chooses in the same way.
#pragma once
#include "common.cuh"

constexpr u32 WIDE = 16 / sizeof(T);

template <u32 N>
struct Lanes {
    float at[N];
};

template <u32 N, typename V>
__device__ inline Pack<V, N> fetch(const V* from) {
    return *reinterpret_cast<const Pack<V, N>*>(from);
}

template <u32 N, typename V>
__device__ inline Lanes<N> to_lanes(Pack<V, N> pack) {
    Lanes<N> lanes;
    for (u32 j = 0; j < N; j++) {
        lanes.at[j] = to_float(pack.values[j]);
    }
    return lanes;
}

template <u32 N, typename V>
__device__ inline Lanes<N> load(const V* from) {
    return to_lanes(fetch<N>(from));
}

template <u32 N, typename V>
__device__ inline void store(V* to, const Lanes<N>& lanes) {
    Pack<V, N> pack;
    for (u32 j = 0; j < N; j++) {
        pack.values[j] = from_float<V>(lanes.at[j]);
    }
    *reinterpret_cast<Pack<V, N>*>(to) = pack;
}
