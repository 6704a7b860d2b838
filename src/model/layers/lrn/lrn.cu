#include "lanes.cuh"

// Forward: a thread makes a pack of channels and reads those of its neighbours too, which are in the nearest cache. Backward: a
// block makes as many packs of channels as it has threads less those at its ends, which only provide what their neighbours
// need; s is computed again, as in cpu.rs.
//
// The radii that networks use are known to the compiler, which then leaves no comparison in the sums.
constexpr u32 THREADS = 256;
constexpr i32 ANY = -1;

// s^-beta
__device__ inline float negative_power(float s, float beta) {
    if (beta == 0.75f) {
        const float root = rsqrtf(s);
        return root * root * rsqrtf(root);
    }
    return powf(s, -beta);
}

// For each channel i of the pack at `channel`: the sum over |j - i| <= radius of f(pack that j lies in)_j, where f is asked for
// packs by their first channel.
template <u32 N, i32 RADIUS, typename F>
__device__ inline Lanes<N> sum_of_neighbours(u32 channel, u32 c, u32 radius, F f) {
    const i32 r = RADIUS == ANY ? i32(radius) : RADIUS, reach = (r + i32(N) - 1) / i32(N);
    Lanes<N> sums = {};
    for (i32 side = -reach; side <= reach; side++) {
        const i32 first = i32(channel) + side * i32(N);
        if (first < 0 || first >= i32(c)) {
            continue;
        }
        const Lanes<N> pack = f(u32(first));
        for (i32 j = 0; j < i32(N); j++) {
            for (i32 i = 0; i < i32(N); i++) {
                const i32 apart = side * i32(N) + j - i;
                if (apart <= r && -apart <= r) {
                    sums.at[i] += pack.at[j];
                }
            }
        }
    }
    return sums;
}

// s_i of the pack at `channel` of a pixel: x (C).
template <u32 N, i32 RADIUS>
__device__ inline Lanes<N> scales(const T* x, u32 channel, u32 c, u32 radius, float bias, float alpha) {
    Lanes<N> s = sum_of_neighbours<N, RADIUS>(channel, c, radius, [=](u32 first) {
        Lanes<N> squares = load<N>(x + first);
        for (u32 j = 0; j < N; j++) {
            squares.at[j] *= squares.at[j];
        }
        return squares;
    });
    for (u32 j = 0; j < N; j++) {
        s.at[j] = bias + alpha * s.at[j];
    }
    return s;
}

template <u32 N, i32 RADIUS>
__device__ inline void forward(const T* x, T* y, u32 pixels, u32 c, u32 radius, float bias, float alpha, float beta) {
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(pixels) * packs; item += item_stride()) {
        const u64 pixel = u64(u32(item) / packs) * c;
        const u32 channel = u32(item) % packs * N;
        const Lanes<N> s = scales<N, RADIUS>(x + pixel, channel, c, radius, bias, alpha);
        Lanes<N> value = load<N>(x + pixel + channel);
        for (u32 j = 0; j < N; j++) {
            value.at[j] *= negative_power(s.at[j], beta);
        }
        store<N>(y + pixel + channel, value);
    }
}

// y_i = x_i s_i^-beta: x, y (pixels,C). Moves x once and y once.
extern "C" __global__ void lrn_forward(
    const T* x, T* y, u32 pixels, u32 c, u32 radius, float bias, float alpha, float beta) {
    if (c % WIDE != 0) {
        forward<1, ANY>(x, y, pixels, c, radius, bias, alpha, beta);
    } else if (radius == 2) {
        forward<WIDE, 2>(x, y, pixels, c, radius, bias, alpha, beta);
    } else if (radius == 5) {
        forward<WIDE, 5>(x, y, pixels, c, radius, bias, alpha, beta);
    } else {
        forward<WIDE, ANY>(x, y, pixels, c, radius, bias, alpha, beta);
    }
}

// What channel j adds to the sums of its neighbours, dy_j x_j s_j^(-beta - 1), goes through shared memory: shares (THREADS,N).
template <u32 N, i32 RADIUS>
__device__ inline void backward(const T* x, const T* dy, T* dx, u32 pixels, u32 c, u32 radius, float bias, float alpha,
                                float beta, u32 masks, float* shares) {
    const u32 packs = c / N, reach = (radius + N - 1) / N, made = THREADS - 2 * reach;
    const u64 items = u64(pixels) * packs;
    const float factor = 2.0f * alpha * beta;
    for (u64 tile = blockIdx.x; tile * made < items; tile += gridDim.x) {
        // In front of the first it wraps round, to more than there are.
        const u64 item = tile * made + threadIdx.x - reach;
        const u64 pixel = u64(u32(item) / packs) * c;
        const u32 channel = u32(item) % packs * N;
        Lanes<N> value = {}, direct = {}, share = {};
        if (item < items) {
            const Lanes<N> s = scales<N, RADIUS>(x + pixel, channel, c, radius, bias, alpha);
            value = load<N>(x + pixel + channel);
            direct = load<N>(dy + pixel + channel);
            for (u32 j = 0; j < N; j++) {
                direct.at[j] *= negative_power(s.at[j], beta);
                share.at[j] = __fdividef(direct.at[j] * value.at[j], s.at[j]);
            }
        }
        store<N>(shares + threadIdx.x * N, share);
        __syncthreads();
        if (item < items && threadIdx.x >= reach && threadIdx.x < THREADS - reach) {
            const float* here = shares + threadIdx.x * N;
            const Lanes<N> sums = sum_of_neighbours<N, RADIUS>(
                channel, c, radius, [=](u32 first) { return load<N>(here + (i32(first) - i32(channel))); });
            for (u32 j = 0; j < N; j++) {
                const float gradient = direct.at[j] - factor * value.at[j] * sums.at[j];
                direct.at[j] = !masks || value.at[j] > 0.0f ? gradient : 0.0f;
            }
            store<N>(dx + pixel + channel, direct);
        }
        __syncthreads();
    }
}

// dx_i = dy_i s_i^-beta - 2 alpha beta x_i * sum over |j - i| <= radius of dy_j x_j s_j^(-beta - 1); 0 where masks is set and x_i
// is not above 0. x, dy, dx (pixels,C). Moves each once.
extern "C" __global__ void __launch_bounds__(THREADS) lrn_backward(
    const T* x, const T* dy, T* dx, u32 pixels, u32 c, u32 radius, float bias, float alpha, float beta,
    u32 masks) {
    __shared__ Pack<float, WIDE> packs[THREADS];
    float* shares = packs[0].values;
    if (c % WIDE != 0) {
        backward<1, ANY>(x, dy, dx, pixels, c, radius, bias, alpha, beta, masks, shares);
    } else if (radius == 2) {
        backward<WIDE, 2>(x, dy, dx, pixels, c, radius, bias, alpha, beta, masks, shares);
    } else if (radius == 5) {
        backward<WIDE, 5>(x, dy, dx, pixels, c, radius, bias, alpha, beta, masks, shares);
    } else {
        backward<WIDE, ANY>(x, dy, dx, pixels, c, radius, bias, alpha, beta, masks, shares);
    }
}
