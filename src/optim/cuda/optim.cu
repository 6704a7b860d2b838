#include "common.cuh"

// A part of one tensor: a block's work.
struct Chunk {
    u64 first;
    u32 len;
    u32 tensor;
};

// Elements of a chunk; the last of a tensor may be shorter. A thread has one line of 16 in the sums of squares.
constexpr u32 CHUNK = 4096, LINE = 16;

using Four = Pack<float, 4>;

// What a rule computes with, `Numbers` in mod.rs.
struct Numbers {
    float l1, l2, clip_value, factor, unscale, rate, momentum, eps, decay, gain, first_gain, correction, keep, trust, max_norm;
    u64 step;
    double beta1, beta2, lr_decay;
    float lr, padding;
};

// `Words` in control.rs.
struct Control {
    u32 halt;
    float scale;
    u32 good_steps, skipped, skipped_in_a_row, broken;
};

extern "C" __global__ void begin_step(Numbers* to, Numbers from, Control* control) {
    from.unscale = 1.0f / control->scale;
    // An update that was skipped is not counted, as in PyTorch. Rules that do not count have zeros here, and keep their rate.
    if (control->skipped > 0) {
        const double before = double(from.step - control->skipped);
        const double slower = (1.0 - pow(from.beta1, before + 1.0)) * (1.0 + before * from.lr_decay);
        from.rate = float(double(from.lr) / slower);
        from.correction = float(sqrt(1.0 - pow(from.beta2, before + 1.0)));
    }
    *to = from;
    control->halt = 0;
}

// Rounded one by one, as on the CPU: what is written with operators the compiler may contract into multiply-adds.
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float root(float a) { return __fsqrt_rn(a); }

// The gradient without the loss's scale, after clipping by norm and by value. A NaN stays one.
__device__ inline float clipped(const Numbers& n, float g) {
    g = mul(mul(g, n.unscale), n.factor);
    return g < -n.clip_value ? -n.clip_value : g > n.clip_value ? n.clip_value : g;
}

// g + l1 sign(w) + l2 w
__device__ inline float penalized(const Numbers& n, float w, float g) {
    const float sign = float(w > 0.0f) - float(w < 0.0f);
    return add(add(g, mul(n.l1, sign)), mul(n.l2, w));
}

// Of a value that is not finite the difference from itself is not a number.
__device__ inline bool is_broken(float x) { return x - x != 0.0f; }

// Where a rule works, `Arenas` in mod.rs. Of the arenas all elements are given; it touches those from `first` to `end`, and
// none if the step was halted. rates: by tensor, for rules whose rate is made from norms. A new value that is not finite is noted
// in `control`, for the loss of the next step.
struct Arenas {
    const Chunk* chunks;
    const float* running;
    const Numbers* numbers;
    Control* control;
    float* params;
    const float* grads;
    float* a;
    float* b;
    T* rounded;
    const float* rates;
    u64 first, end;
};

// One pass: w = rule(numbers, tensor, w, g, a, b), which changes the state a and b, for each element of the block's chunk.
// Where `rounded` is not null it gets w, rounded. A running statistic takes its new value instead.
template <u32 STATES, typename F>
__device__ inline void update(const Arenas& arenas, F rule) {
    if (arenas.control->halt) {
        return;
    }
    const Chunk chunk = arenas.chunks[blockIdx.x];
    const u64 start = chunk.first > arenas.first ? chunk.first : arenas.first;
    const u64 stop = chunk.first + chunk.len < arenas.end ? chunk.first + chunk.len : arenas.end;
    const Numbers numbers = *arenas.numbers;
    const float momentum = arenas.running[chunk.tensor];
    auto one = [&](float w, float g, float& a, float& b) {
        return momentum >= 0.0f ? add(w, mul(momentum, sub(g, w))) : rule(numbers, chunk.tensor, w, clipped(numbers, g), a, b);
    };
    // Chunks and ranges begin at multiples of 16 elements.
    const u64 packs = (stop - start) / 4;
    bool broken = false;
    for (u64 pack = threadIdx.x; pack < packs; pack += blockDim.x) {
        const u64 at = start + 4 * pack;
        Four w = *reinterpret_cast<const Four*>(arenas.params + at), a = {}, b = {};
        const Four g = *reinterpret_cast<const Four*>(arenas.grads + at);
        if (STATES > 0) a = *reinterpret_cast<const Four*>(arenas.a + at);
        if (STATES > 1) b = *reinterpret_cast<const Four*>(arenas.b + at);
        Pack<T, 4> rounded;
        for (u32 i = 0; i < 4; i++) {
            w.values[i] = one(w.values[i], g.values[i], a.values[i], b.values[i]);
            rounded.values[i] = from_float<T>(w.values[i]);
            broken |= is_broken(w.values[i]);
        }
        *reinterpret_cast<Four*>(arenas.params + at) = w;
        if (STATES > 0) *reinterpret_cast<Four*>(arenas.a + at) = a;
        if (STATES > 1) *reinterpret_cast<Four*>(arenas.b + at) = b;
        if (arenas.rounded) *reinterpret_cast<Pack<T, 4>*>(arenas.rounded + at) = rounded;
    }
    for (u64 at = start + 4 * packs + threadIdx.x; at < stop; at += blockDim.x) {
        float a = STATES > 0 ? arenas.a[at] : 0.0f, b = STATES > 1 ? arenas.b[at] : 0.0f;
        const float w = one(arenas.params[at], arenas.grads[at], a, b);
        arenas.params[at] = w;
        if (STATES > 0) arenas.a[at] = a;
        if (STATES > 1) arenas.b[at] = b;
        broken |= is_broken(w);
        if (arenas.rounded) arenas.rounded[at] = from_float<T>(w);
    }
    // Whoever finds one writes the same.
    if (broken) {
        arenas.control->broken = 1;
    }
}

// The rules, each as in its file beside this folder.

extern "C" __global__ void __launch_bounds__(256) update_sgd(Arenas arenas) {
    update<0>(arenas, [](const Numbers& n, u32, float w, float g, float&, float&) {
        return sub(w, mul(n.rate, penalized(n, w, g)));
    });
}

extern "C" __global__ void __launch_bounds__(256) update_momentum(Arenas arenas) {
    update<1>(arenas, [](const Numbers& n, u32, float w, float g, float& b, float&) {
        b = add(mul(n.momentum, b), penalized(n, w, g));
        return sub(w, mul(n.rate, b));
    });
}

extern "C" __global__ void __launch_bounds__(256) update_nesterov(Arenas arenas) {
    update<1>(arenas, [](const Numbers& n, u32, float w, float g, float& b, float&) {
        g = penalized(n, w, g);
        b = add(mul(n.momentum, b), g);
        return sub(w, mul(n.rate, add(g, mul(n.momentum, b))));
    });
}

// Adam and AdamW: with `keep` 1, w keep is w.
extern "C" __global__ void __launch_bounds__(256) update_adam(Arenas arenas) {
    update<2>(arenas, [](const Numbers& n, u32, float w, float g, float& m, float& v) {
        g = penalized(n, w, g);
        m = add(m, mul(n.first_gain, sub(g, m)));
        v = add(mul(n.decay, v), mul(mul(n.gain, g), g));
        const float scale = add(div(root(v), n.correction), n.eps);
        return sub(mul(w, n.keep), div(mul(n.rate, m), scale));
    });
}

extern "C" __global__ void __launch_bounds__(256) update_adagrad(Arenas arenas) {
    update<1>(arenas, [](const Numbers& n, u32, float w, float g, float& s, float&) {
        g = penalized(n, w, g);
        s = add(s, mul(g, g));
        return sub(w, div(mul(n.rate, g), add(root(s), n.eps)));
    });
}

extern "C" __global__ void __launch_bounds__(256) update_adadelta(Arenas arenas) {
    update<2>(arenas, [](const Numbers& n, u32, float w, float g, float& v, float& u) {
        g = penalized(n, w, g);
        v = add(mul(n.decay, v), mul(mul(n.gain, g), g));
        const float d = mul(div(root(add(u, n.eps)), root(add(v, n.eps))), g);
        u = add(mul(n.decay, u), mul(mul(n.gain, d), d));
        return sub(w, mul(n.rate, d));
    });
}

extern "C" __global__ void __launch_bounds__(256) update_lars(Arenas arenas) {
    const float* rates = arenas.rates;
    update<1>(arenas, [=](const Numbers& n, u32 tensor, float w, float g, float& b, float&) {
        b = add(mul(n.momentum, b), mul(rates[tensor], penalized(n, w, g)));
        return sub(w, b);
    });
}

// The loss's scale, as loss_scale.rs has it.

// Halts the step if a gradient that is trained with is not finite. A block a chunk; reads 4 bytes an element. Whoever finds one
// writes the same.
extern "C" __global__ void __launch_bounds__(256)
    find_overflow(const float* grads, const Chunk* chunks, const float* running, Control* control) {
    const Chunk chunk = chunks[blockIdx.x];
    if (running[chunk.tensor] >= 0.0f) {
        return;
    }
    bool overflow = false;
    for (u32 i = threadIdx.x; i < chunk.len; i += blockDim.x) {
        overflow |= is_broken(grads[chunk.first + i]);
    }
    if (overflow) {
        control->halt = 1;
    }
}

// The scale of the next step; growth_every of 0 leaves it. One thread.
extern "C" __global__ void settle_scale(Control* control, u32 growth_every) {
    Control c = *control;
    const float smallest = 1.17549435e-38f, largest = 3.40282347e+38f;
    if (c.halt) {
        c.skipped++;
        c.skipped_in_a_row++;
        c.good_steps = 0;
        c.scale = growth_every > 0 ? fmaxf(c.scale / 2.0f, smallest) : c.scale;
    } else {
        c.skipped_in_a_row = 0;
        c.good_steps++;
        if (growth_every > 0 && c.good_steps >= growth_every) {
            c.good_steps = 0;
            c.scale = fminf(c.scale * 2.0f, largest);
        }
    }
    *control = c;
}

// Sums of squares, by the tree of norm.rs: over lines of 16 elements, then of two neighbours again and again. What is left over at
// the end of a row, having no neighbour, is added from the right, the shortest first; so are a short last chunk's lines before
// the whole chunks. Products are exact in f64.

// sums[0] = the sum of sums[0 .. n] and what is to their right, by the whole block. sums may be shared or global memory.
__device__ inline void add_up(double* sums, u32 n, double right) {
    for (u32 stride = 1; n > 0; stride *= 2, n /= 2) {
        __syncthreads();
        if (threadIdx.x == 0 && n % 2 == 1) {
            right = sums[u64(n - 1) * stride] + right;
        }
        for (u32 i = threadIdx.x; i < n / 2; i += blockDim.x) {
            sums[u64(2 * i) * stride] += sums[u64(2 * i + 1) * stride];
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        sums[0] = right;
    }
}

// What is measured, `Stage` in mod.rs.
enum Stage : u32 { AS_IS = 0, UNSCALED = 1, CLIPPED = 2 };

// sums (chunks) = the squares of values by chunk.
extern "C" __global__ void __launch_bounds__(256)
    chunk_squares(const float* values, const Chunk* chunks, const Numbers* numbers, u32 stage, double* sums) {
    __shared__ double lines[CHUNK / LINE];
    const Chunk chunk = chunks[blockIdx.x];
    const Numbers n = *numbers;
    double lanes[4] = {};
    for (u32 i = 0; i < LINE; i += 4) {
        const u32 at = LINE * threadIdx.x + i;
        Four four = {};
        if (at + 4 <= chunk.len) {
            four = *reinterpret_cast<const Four*>(values + chunk.first + at);
        }
        for (u32 j = 0; j < 4; j++) {
            if (at + j < chunk.len) {
                const float value = at + 4 <= chunk.len ? four.values[j] : values[chunk.first + at + j];
                const double exact =
                    double(stage == CLIPPED ? clipped(n, value) : stage == UNSCALED ? mul(value, n.unscale) : value);
                lanes[j] += exact * exact;
            }
        }
    }
    lines[threadIdx.x] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    add_up(lines, (chunk.len + LINE - 1) / LINE, 0.0);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = lines[0];
    }
}

// squares (tensors) = sums (chunks) by tensor, 0 for a running statistic; a block a tensor, whose chunks begin at firsts
// (tensors + 1). Overwrites sums.
extern "C" __global__ void __launch_bounds__(256)
    tensor_squares(double* sums, const Chunk* chunks, const u32* firsts, const float* running, double* squares) {
    const u32 tensor = blockIdx.x, first = firsts[tensor], count = firsts[tensor + 1] - first;
    if (count == 0 || running[tensor] >= 0.0f) {
        if (threadIdx.x == 0) {
            squares[tensor] = 0.0;
        }
        return;
    }
    const bool is_short = chunks[first + count - 1].len < CHUNK;
    const double right = is_short ? sums[first + count - 1] : 0.0;
    add_up(sums + first, is_short ? count - 1 : count, right);
    if (threadIdx.x == 0) {
        squares[tensor] = sums[first];
    }
}

// The factor of all gradients, clip::norm_factor of squares (tensors); one thread.
extern "C" __global__ void clip_by_norm(const double* squares, Numbers* numbers, u32 tensors) {
    double sum = 0.0;
    for (u32 tensor = 0; tensor < tensors; tensor++) {
        sum += squares[tensor];
    }
    const double factor = double(numbers->max_norm) / (sqrt(sum) + 1e-6);
    numbers->factor = factor < 1.0 ? float(factor) : 1.0f;
}

// rates (tensors), from the squares of gradients and weights: `rate` in lars.rs.
extern "C" __global__ void lars_rates(const double* gradients, const double* weights, const Numbers* numbers, float* rates,
                                      u32 tensors) {
    for (u32 tensor = u32(first_item()); tensor < tensors; tensor += u32(item_stride())) {
        const double weight = sqrt(weights[tensor]), gradient = sqrt(gradients[tensor]);
        const double floor = __dadd_rn(__dadd_rn(gradient, __dmul_rn(double(numbers->l2), weight)), double(numbers->eps));
        const float ratio = float(double(numbers->trust) * weight / floor);
        rates[tensor] = weight == 0.0 || gradient == 0.0 ? numbers->rate : mul(numbers->rate, ratio);
    }
}
