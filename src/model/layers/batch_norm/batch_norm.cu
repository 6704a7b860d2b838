#include "lanes.cuh"
#include "activation.cuh"

// Each direction in training reads its tensors twice: for sums over rows (a row is one pixel's channels), then to write the
// result. A block sums a chunk of rows: threadIdx.x goes over packs of channels, threadIdx.y over the chunk's rows, of which each
// thread takes every blockDim.y-th, and a tree joins the threads of a pack. Then a warp joins the chunks of a channel, in
// double. Chunks depend on the shapes alone, and all orders are fixed.
constexpr u32 THREADS = 256;
constexpr u32 LANES = 32;
constexpr u32 ALL = 0xffffffff;

// The rows of this block.
struct Chunk {
    u32 first, end;

    __device__ Chunk(u32 rows, u32 chunk) {
        first = blockIdx.x * chunk;
        end = min(rows, first + chunk);
    }
};

// Mean and sum of squares around it, of `count` values (Welford 1962), and those of two sets from theirs (Chan, Golub, LeVeque
// 1983).
template <typename Real>
struct Moments {
    Real count, mean, squares;

    __device__ void join(const Moments& other) {
        if (other.count > 0) {
            const Real delta = other.mean - mean, share = other.count / (count + other.count);
            mean += delta * share;
            squares += other.squares + delta * delta * count * share;
            count += other.count;
        }
    }
};

template <u32 N>
__device__ inline void moments(const T* x, float* partial, u32 rows, u32 c, u32 chunk, Moments<float>* shared) {
    const Chunk here(rows, chunk);
    Moments<float>* own = shared + (threadIdx.y * blockDim.x + threadIdx.x) * N;
    for (u32 first = blockIdx.y * blockDim.x; first < c / N; first += gridDim.y * blockDim.x) {
        const u32 channel = (first + threadIdx.x) * N;
        Moments<float> found[N] = {};
        for (u32 row = here.first + threadIdx.y; row < here.end && channel < c; row += blockDim.y) {
            const Lanes<N> value = load<N>(x + u64(row) * c + channel);
            const float count = found[0].count + 1.0f, share = 1.0f / count;
            for (u32 j = 0; j < N; j++) {
                const float delta = value.at[j] - found[j].mean;
                found[j].count = count;
                found[j].mean += delta * share;
                found[j].squares += delta * (value.at[j] - found[j].mean);
            }
        }
        for (u32 j = 0; j < N; j++) {
            own[j] = found[j];
        }
        for (u32 left = blockDim.y; left > 1; left = (left + 1) / 2) {
            __syncthreads();
            if (threadIdx.y + (left + 1) / 2 < left) {
                for (u32 j = 0; j < N; j++) {
                    own[j].join(own[(left + 1) / 2 * blockDim.x * N + j]);
                }
            }
        }
        if (threadIdx.y == 0 && channel < c) {
            for (u32 j = 0; j < N; j++) {
                const u64 to = (u64(channel + j) * gridDim.x + blockIdx.x) * 2;
                partial[to] = own[j].mean;
                partial[to + 1] = own[j].squares;
            }
        }
        __syncthreads();
    }
}

// x (rows,C), partial (C,chunks,2): mean and sum of squares around it. Moves x once.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_moments(
    const T* x, float* partial, u32 rows, u32 c, u32 chunk) {
    __shared__ Moments<float> shared[THREADS * WIDE];
    if (c % WIDE == 0) {
        moments<WIDE>(x, partial, rows, c, chunk, shared);
    } else {
        moments<1>(x, partial, rows, c, chunk, shared);
    }
}

// partial (C,chunks,2), saved (3,C): mean, 1 / sqrt(variance + epsilon), variance over the count less one.
extern "C" __global__ void batch_norm_statistics(
    const float* partial, float* saved, u32 rows, u32 c, u32 chunk, float epsilon) {
    const u32 channel = u32(first_item() / LANES), lane = threadIdx.x % LANES, chunks = (rows + chunk - 1) / chunk;
    if (channel >= c) {
        return;
    }
    Moments<double> all = {};
    for (u32 number = lane; number < chunks; number += LANES) {
        const u64 from = (u64(channel) * chunks + number) * 2;
        all.join({double(min(chunk, rows - number * chunk)), partial[from], partial[from + 1]});
    }
    for (u32 apart = LANES / 2; apart > 0; apart /= 2) {
        all.join({__shfl_down_sync(ALL, all.count, apart), __shfl_down_sync(ALL, all.mean, apart),
                  __shfl_down_sync(ALL, all.squares, apart)});
    }
    if (lane == 0) {
        saved[channel] = float(all.mean);
        saved[c + channel] = float(1.0 / sqrt(all.squares / all.count + double(epsilon)));
        // Of a single value there is no spread to see: 0, not 0 / 0.
        saved[2 * c + channel] = float(all.squares / (all.count > 1.0 ? all.count - 1.0 : 1.0));
    }
}

template <u32 N>
__device__ inline void normalize(const T* x, const float* mean, const float* spread, const float* weight, const float* bias,
                                 T* y, u32 rows, u32 c, u32 chunk, float epsilon, u32 is_variance, u32 activation) {
    const Chunk here(rows, chunk);
    for (u32 first = blockIdx.y * blockDim.x; first < c / N; first += gridDim.y * blockDim.x) {
        const u32 channel = (first + threadIdx.x) * N;
        if (channel >= c) {
            continue;
        }
        const Lanes<N> level = load<N>(mean + channel), shift = load<N>(bias + channel), factor = load<N>(weight + channel);
        Lanes<N> scale = load<N>(spread + channel);
        for (u32 j = 0; j < N; j++) {
            scale.at[j] = is_variance ? factor.at[j] / sqrtf(scale.at[j] + epsilon) : scale.at[j] * factor.at[j];
        }
        for (u32 row = here.first + threadIdx.y; row < here.end; row += blockDim.y) {
            Lanes<N> value = load<N>(x + u64(row) * c + channel);
            for (u32 j = 0; j < N; j++) {
                value.at[j] = activate(activation, (value.at[j] - level.at[j]) * scale.at[j] + shift.at[j]);
            }
            store<N>(y + u64(row) * c + channel, value);
        }
    }
}

// y = activation(weight (x - mean) spread + bias): x, y (rows,C), the others (C). spread is 1 / sqrt(variance + epsilon), or the
// variance. Moves x once and y once.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_forward(
    const T* __restrict__ x, const float* mean, const float* spread, const float* weight, const float* bias,
    T* __restrict__ y, u32 rows, u32 c, u32 chunk, float epsilon, u32 is_variance, u32 activation) {
    if (c % WIDE == 0) {
        normalize<WIDE>(x, mean, spread, weight, bias, y, rows, c, chunk, epsilon, is_variance, activation);
    } else {
        normalize<1>(x, mean, spread, weight, bias, y, rows, c, chunk, epsilon, is_variance, activation);
    }
}

// dy before the activation. y is read only where there is one.
template <u32 N>
__device__ inline Lanes<N> undone(const T* y, const T* dy, u64 at, u32 activation) {
    Lanes<N> gradient = load<N>(dy + at);
    if (activation != NONE) {
        const Lanes<N> output = load<N>(y + at);
        for (u32 j = 0; j < N; j++) {
            gradient.at[j] = activation_gradient(activation, output.at[j], gradient.at[j]);
        }
    }
    return gradient;
}

struct Sums {
    float products, gradients;
};

template <u32 N>
__device__ inline void sums(const T* x, const T* y, const T* dy, const float* mean, float* partial, u32 rows, u32 c, u32 chunk,
                            u32 activation, Sums* shared) {
    const Chunk here(rows, chunk);
    Sums* own = shared + (threadIdx.y * blockDim.x + threadIdx.x) * N;
    for (u32 first = blockIdx.y * blockDim.x; first < c / N; first += gridDim.y * blockDim.x) {
        const u32 channel = (first + threadIdx.x) * N;
        Sums found[N] = {};
        if (channel < c) {
            const Lanes<N> level = load<N>(mean + channel);
            for (u32 row = here.first + threadIdx.y; row < here.end; row += blockDim.y) {
                const u64 at = u64(row) * c + channel;
                const Lanes<N> value = load<N>(x + at), gradient = undone<N>(y, dy, at, activation);
                for (u32 j = 0; j < N; j++) {
                    found[j].products += gradient.at[j] * (value.at[j] - level.at[j]);
                    found[j].gradients += gradient.at[j];
                }
            }
        }
        for (u32 j = 0; j < N; j++) {
            own[j] = found[j];
        }
        for (u32 left = blockDim.y; left > 1; left = (left + 1) / 2) {
            __syncthreads();
            if (threadIdx.y + (left + 1) / 2 < left) {
                for (u32 j = 0; j < N; j++) {
                    const Sums other = own[(left + 1) / 2 * blockDim.x * N + j];
                    own[j].products += other.products;
                    own[j].gradients += other.gradients;
                }
            }
        }
        if (threadIdx.y == 0 && channel < c) {
            for (u32 j = 0; j < N; j++) {
                const u64 to = (u64(channel + j) * gridDim.x + blockIdx.x) * 2;
                partial[to] = own[j].products;
                partial[to + 1] = own[j].gradients;
            }
        }
        __syncthreads();
    }
}

// x, y, dy (rows,C), mean (C), partial (C,chunks,2): the sums of dy (x - mean) and of dy, before the activation. Moves x, dy and,
// where there is an activation, y once.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_sums(
    const T* x, const T* y, const T* dy, const float* mean, float* partial, u32 rows, u32 c, u32 chunk,
    u32 activation) {
    __shared__ Sums shared[THREADS * WIDE];
    if (c % WIDE == 0) {
        sums<WIDE>(x, y, dy, mean, partial, rows, c, chunk, activation, shared);
    } else {
        sums<1>(x, y, dy, mean, partial, rows, c, chunk, activation, shared);
    }
}

// partial (C,chunks,2), saved (3,C), the others (C): the gradients by weight and bias, and the batch's statistics times share.
extern "C" __global__ void batch_norm_gradients(
    const float* partial, const float* saved, float* dweight, float* dbias, float* dmean, float* dvar,
    float share, u32 c, u32 chunks) {
    const u32 channel = u32(first_item() / LANES), lane = threadIdx.x % LANES;
    if (channel >= c) {
        return;
    }
    double products = 0.0, gradients = 0.0;
    for (u32 number = lane; number < chunks; number += LANES) {
        const u64 from = (u64(channel) * chunks + number) * 2;
        products += partial[from];
        gradients += partial[from + 1];
    }
    for (u32 apart = LANES / 2; apart > 0; apart /= 2) {
        products += __shfl_down_sync(ALL, products, apart);
        gradients += __shfl_down_sync(ALL, gradients, apart);
    }
    if (lane == 0) {
        dweight[channel] = float(products * saved[c + channel]);
        dbias[channel] = float(gradients);
        dmean[channel] = share * saved[channel];
        dvar[channel] = share * saved[2 * c + channel];
    }
}

template <u32 N>
__device__ inline void input_gradient(const T* x, const T* y, const T* dy, const float* saved, const float* weight,
                                      const float* dweight, const float* dbias, T* dx, u32 rows, u32 c, u32 chunk,
                                      u32 activation) {
    const Chunk here(rows, chunk);
    for (u32 first = blockIdx.y * blockDim.x; first < c / N; first += gridDim.y * blockDim.x) {
        const u32 channel = (first + threadIdx.x) * N;
        if (channel >= c) {
            continue;
        }
        const Lanes<N> mean = load<N>(saved + channel), products = load<N>(dweight + channel);
        Lanes<N> scale = load<N>(weight + channel), level = load<N>(dbias + channel), slope;
        for (u32 j = 0; j < N; j++) {
            const float inverse_std = saved[c + channel + j];
            scale.at[j] *= inverse_std;
            level.at[j] /= float(rows);
            slope.at[j] = products.at[j] * inverse_std / float(rows);
        }
        for (u32 row = here.first + threadIdx.y; row < here.end; row += blockDim.y) {
            const u64 at = u64(row) * c + channel;
            const Lanes<N> value = load<N>(x + at);
            Lanes<N> gradient = undone<N>(y, dy, at, activation);
            for (u32 j = 0; j < N; j++) {
                gradient.at[j] -= level.at[j] + slope.at[j] * (value.at[j] - mean.at[j]);
                gradient.at[j] *= scale.at[j];
            }
            store<N>(dx + at, gradient);
        }
    }
}

// dx = weight inverse_std (dy - dbias / rows - (x - mean) inverse_std dweight / rows), dy before the activation: x, y, dy, dx
// (rows,C), saved (3,C), the others (C). Moves x, dy, dx and, where there is an activation, y once.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward(
    const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ dy, const float* saved,
    const float* weight, const float* dweight, const float* dbias, T* __restrict__ dx, u32 rows, u32 c, u32 chunk,
    u32 activation) {
    if (c % WIDE == 0) {
        input_gradient<WIDE>(x, y, dy, saved, weight, dweight, dbias, dx, rows, c, chunk, activation);
    } else {
        input_gradient<1>(x, y, dy, saved, weight, dweight, dbias, dx, rows, c, chunk, activation);
    }
}
