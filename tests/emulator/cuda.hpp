// CUDA C++ on the CPU, for tests on machines without a GPU: kernels compile as ordinary C++ behind this header, and `launch`
// runs them, one block after the other, the threads of a block as fibers.
//
// It is made to find mistakes, not to be fast:
// - Between two barriers the threads run one after the other, in an order that changes from turn to turn, so that a missing
//   barrier shows as a wrong result.
// - Shared memory is filled with NaNs before each block.
// - A barrier that not all threads of the block (or not all the lanes named by a mask) reach is an error.
//
// What it does not show: two blocks that write to one place, misaligned vectors, too many registers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulator_shared")))
#define __constant__ static const

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    unsigned count() const { return x * y * z; }
};

template <class T, int N> struct alignas(sizeof(T) * N) Vector;
template <class T> struct alignas(sizeof(T) * 2) Vector<T, 2> { T x, y; };
template <class T> struct alignas(sizeof(T) * 4) Vector<T, 4> { T x, y, z, w; };
using float2 = Vector<float, 2>;
using float4 = Vector<float, 4>;
using int2 = Vector<int, 2>;
using int4 = Vector<int, 4>;
using uint2 = Vector<unsigned, 2>;
using uint4 = Vector<unsigned, 4>;
using ushort2 = Vector<unsigned short, 2>;
using ushort4 = Vector<unsigned short, 4>;
using uchar4 = Vector<unsigned char, 4>;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }

// Of the thread that runs.
inline dim3 gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

namespace emulator {

constexpr size_t STACK = 64 << 10;
constexpr unsigned MOST_THREADS = 1024;

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

struct Fiber {
    ucontext_t context;
    dim3 thread;
    State state;
    // At a barrier of the warp: the lanes that must come there.
    unsigned mask;
    // Barriers of the warp that this thread has passed.
    unsigned passed;
    // What it shows the others at a barrier: what is being read, and what is being written for the next one.
    uint64_t shown[2];
    int predicate;
};

inline std::vector<Fiber> fibers;
inline unsigned current;
inline ucontext_t scheduler;
inline void (*body)(void **);
inline void **arguments;

inline char *stack(unsigned thread) {
    static char *stacks = static_cast<char *>(
        mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return stacks + thread * STACK;
}

inline void run_thread() {
    body(arguments);
    fibers[current].state = State::Done;
}

inline void wait(State barrier) {
    fibers[current].state = barrier;
    swapcontext(&fibers[current].context, &scheduler);
}

// Lets threads go on from a barrier if all have come to it. Says whether any can run.
inline bool release() {
    auto all = [](auto begin, auto end, State state) {
        return std::all_of(begin, end, [=](const Fiber &fiber) { return fiber.state == state; });
    };
    if (all(fibers.begin(), fibers.end(), State::AtBlockBarrier)) {
        for (Fiber &fiber : fibers) fiber.state = State::Ready;
    }
    for (size_t first = 0; first < fibers.size(); first += warpSize) {
        size_t lanes = std::min<size_t>(warpSize, fibers.size() - first);
        for (size_t lane = 0; lane < lanes; lane++) {
            const Fiber &fiber = fibers[first + lane];
            if (fiber.state != State::AtWarpBarrier) continue;
            unsigned mask = fiber.mask & (lanes == warpSize ? ~0u : (1u << lanes) - 1);
            bool complete = true;
            for (size_t other = 0; other < lanes; other++) {
                const Fiber &peer = fibers[first + other];
                complete &= !(mask >> other & 1) || (peer.state == State::AtWarpBarrier && peer.mask == fiber.mask);
            }
            if (!complete) continue;
            for (size_t other = 0; other < lanes; other++) {
                Fiber &peer = fibers[first + other];
                if (mask >> other & 1) peer.state = State::Ready, peer.passed++;
            }
        }
    }
    return std::any_of(fibers.begin(), fibers.end(), [](const Fiber &fiber) { return fiber.state == State::Ready; });
}

// An error in words, or null.
inline const char *run_block(unsigned &order) {
    for (unsigned thread = 0; thread < fibers.size(); thread++) {
        Fiber &fiber = fibers[thread];
        fiber.thread = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
        fiber.state = State::Ready;
        fiber.passed = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack(thread);
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_thread, 0);
    }
    while (release()) {
        // A prime that divides no number of threads: a permutation, another at each turn.
        order = order * 1664525 + 1013904223;
        uint64_t start = order >> 8, stride = order & 1 ? 1031 : fibers.size() * 1031 - 1;
        for (uint64_t turn = 0; turn < fibers.size(); turn++) {
            current = (start + turn * stride) % fibers.size();
            if (fibers[current].state != State::Ready) continue;
            threadIdx = fibers[current].thread;
            swapcontext(&scheduler, &fibers[current].context);
        }
    }
    bool done = std::all_of(fibers.begin(), fibers.end(), [](const Fiber &fiber) { return fiber.state == State::Done; });
    return done ? nullptr : "a barrier was not reached by all of its threads";
}

extern "C" char __start_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulator_shared[] __attribute__((weak, visibility("hidden")));

inline const char *launch(void (*kernel)(void **), dim3 grid, dim3 block, void **parameters) {
    if (block.count() == 0 || block.count() > MOST_THREADS || grid.count() == 0) return "impossible numbers of threads or blocks";
    gridDim = grid, blockDim = block, body = kernel, arguments = parameters;
    fibers.resize(block.count());
    unsigned order = 1;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                if (__start_emulator_shared) {
                    memset(__start_emulator_shared, 0xFF, __stop_emulator_shared - __start_emulator_shared);
                }
                if (const char *error = run_block(order)) return error;
            }
        }
    }
    return nullptr;
}

template <class... T, size_t... I>
void call(void (*kernel)(T...), void **parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<T> *>(parameters[I])...);
}
template <class... T> void call(void (*kernel)(T...), void **parameters) {
    call(kernel, parameters, std::index_sequence_for<T...>());
}

// The number of a kernel's parameters; writes the bytes of each.
template <class... T> int parameters(void (*)(T...), size_t *bytes) {
    ((*bytes++ = sizeof(T)), ...);
    return sizeof...(T);
}

// Shows `value` to the lanes of `mask`, and returns what `lane` shows.
template <class T> T exchange(unsigned mask, T value, unsigned lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    unsigned turn = fibers[current].passed % 2, first = current / warpSize * warpSize;
    memcpy(&fibers[current].shown[turn], &value, sizeof(T));
    fibers[current].mask = mask;
    wait(State::AtWarpBarrier);
    if (lane < warpSize && mask >> lane & 1 && first + lane < fibers.size()) {
        memcpy(&value, &fibers[first + lane].shown[turn], sizeof(T));
    }
    return value;
}

inline unsigned lane() { return current % warpSize; }

} // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::AtBlockBarrier); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange(mask, 0, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
    return emulator::exchange(mask, value, emulator::lane() / width * width + lane % width);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return emulator::exchange(mask, value, emulator::lane() ^ bits);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    unsigned lane = emulator::lane();
    return emulator::exchange(mask, value, lane % width + by < unsigned(width) ? lane + by : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    unsigned lane = emulator::lane();
    return emulator::exchange(mask, value, lane % width >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < warpSize; lane++) {
        int vote = emulator::exchange(mask, predicate, lane);
        votes |= (mask >> lane & 1 && vote) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __syncthreads_or(int predicate) {
    emulator::fibers[emulator::current].predicate = predicate;
    __syncthreads();
    int any = 0;
    for (const emulator::Fiber &fiber : emulator::fibers) any |= fiber.predicate;
    __syncthreads();
    return any;
}

template <class T> T atomicAdd(T *to, T value) { return std::exchange(*to, *to + value); }
template <class T> T atomicMax(T *to, T value) { return std::exchange(*to, std::max(*to, value)); }
template <class T> T atomicOr(T *to, T value) { return std::exchange(*to, *to | value); }
template <class T> T atomicExch(T *to, T value) { return std::exchange(*to, value); }
template <class T> T atomicCAS(T *to, T expected, T value) {
    return std::exchange(*to, *to == expected ? value : *to);
}

template <class T> T __ldg(const T *from) { return *from; }
template <class T> T __ldcs(const T *from) { return *from; }
template <class T> void __stcs(T *to, T value) { *to = value; }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
