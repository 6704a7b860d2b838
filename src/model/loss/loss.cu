#include "common.cuh"

// The losses, as in loss.rs.
enum Rule : u32 { CROSS_ENTROPY = 0, SQUARED_ERROR = 1 };

// The operations over a warp give every lane the same bits: a + b is b + a.
__device__ inline float warp_max(float value) {
    for (u32 distance = 16; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

__device__ inline float warp_sum(float value) {
    for (u32 distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

// What the output of class k should be, before the class's weight.
__device__ inline float share(float smoothing, u32 classes, u32 label, u32 k) {
    return (1.0f - smoothing) * (k == label ? 1.0f : 0.0f) + smoothing / float(classes);
}

// entropy - sum over k of target_k * log softmax(x)_k, and where dx is wanted scale times its gradient: x, dx (classes).
// totals (classes): the sum over k of the targets, by label.
__device__ inline float cross_entropy(const T* x, T* dx, const float* weights, const float* totals, u32 label,
                                      u32 classes, float smoothing, float entropy, float scale, float largest) {
    const u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (u32 k = lane; k < classes; k += 32) {
        sum += expf(to_float(x[k]) - largest);
    }
    const float log_sum = logf(warp_sum(sum)), total = totals[label];
    float value = 0.0f;
    for (u32 k = lane; k < classes; k += 32) {
        const float target = weights[k] * share(smoothing, classes, label, k);
        const float log_softmax = (to_float(x[k]) - largest) - log_sum;
        // Without smoothing the other targets are 0, and 0 * log 0 should be 0.
        if (smoothing > 0.0f || k == label) {
            value += target * log_softmax;
        }
        if (dx) {
            dx[k] = from_float<T>(scale * (total * expf(log_softmax) - target));
        }
    }
    return entropy - warp_sum(value);
}

// The mean over k of (x_k - target_k)^2, and where dx is wanted scale times its gradient: x, dx (classes).
__device__ inline float squared_error(const T* x, T* dx, u32 label, u32 classes, float scale) {
    float value = 0.0f;
    for (u32 k = threadIdx.x % 32; k < classes; k += 32) {
        const float error = to_float(x[k]) - (k == label ? 1.0f : 0.0f);
        value += error * error;
        if (dx) {
            dx[k] = from_float<T>(scale * 2.0f * error / float(classes));
        }
    }
    return warp_sum(value) / float(classes);
}

// The loss of each sample, whether its largest output is the label's, and where dx is not null scale times the gradient. A warp
// has a row. x, dx (batch, classes), labels (batch), weights, totals (classes), rows (2, batch), loss_scale (1): read with dx
extern "C" __global__ void __launch_bounds__(256)
    loss_rows(const T* x, const u32* labels, const float* weights, const float* totals, T* dx, float* rows, u32 batch,
              u32 classes, u32 rule, float smoothing, float entropy, float scale, const float* loss_scale) {
    const u32 row = u32(first_item() / 32), lane = threadIdx.x % 32;
    if (row >= batch) {
        return;
    }
    const u32 label = labels[row];
    const T* row_x = x + u64(row) * classes;
    T* row_dx = dx ? dx + u64(row) * classes : dx;
    scale *= dx ? *loss_scale : 1.0f;
    // The first of the largest values is the answer.
    float largest = -__int_as_float(0x7f800000);
    for (u32 k = lane; k < classes; k += 32) {
        largest = fmaxf(largest, to_float(row_x[k]));
    }
    largest = warp_max(largest);
    float rivals = 0.0f;
    for (u32 k = lane; k < classes; k += 32) {
        const float value = to_float(row_x[k]);
        rivals += k < label && value == largest ? 1.0f : 0.0f;
    }
    const bool correct = warp_sum(rivals) == 0.0f && to_float(row_x[label]) == largest;
    const float value = rule == CROSS_ENTROPY ? cross_entropy(row_x, row_dx, weights, totals, label, classes,
                                                              smoothing, entropy, scale, largest)
                                              : squared_error(row_x, row_dx, label, classes, scale);
    if (lane == 0) {
        rows[row] = value;
        rows[batch + row] = correct ? 1.0f : 0.0f;
    }
}

// sums (2) = the sums of rows (2, batch), by one block, in f64 and in one order. Where halt is not null, a step is taught: it has no
// loss if parameters are broken, even if a ReLU has hidden that, and halt is set if the loss is not finite.
extern "C" __global__ void __launch_bounds__(256) loss_sums(const float* rows, float* sums, const u32* broken, u32* halt,
                                                                u32 batch) {
    __shared__ double parts[256];
    for (u32 which = 0; which < 2; which++) {
        double part = 0.0;
        for (u32 row = threadIdx.x; row < batch; row += 256) {
            part += double(rows[which * batch + row]);
        }
        parts[threadIdx.x] = part;
        __syncthreads();
        for (u32 half = 128; half > 0; half /= 2) {
            if (threadIdx.x < half) {
                parts[threadIdx.x] += parts[threadIdx.x + half];
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            const bool lost = which == 0 && halt && *broken;
            const float sum = lost ? __int_as_float(0x7fffffff) : float(parts[0]);
            sums[which] = sum;
            // Of a value that is not finite this difference is not a number.
            if (halt && which == 0 && sum - sum != 0.0f) {
                *halt = 1;
            }
        }
    }
}
