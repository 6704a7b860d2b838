#include "common.cuh"

// x = value: x (n)
extern "C" __global__ void fill(T* x, float value, u64 n) {
    map(n, [=]() { return value; }, x);
}

// x = factor x: x (n)
extern "C" __global__ void scale(T* x, float factor, u64 n) {
    map(n, [=](float x) { return factor * x; }, x, x);
}

// sum = sum + term: sum, term (n)
extern "C" __global__ void add(T* sum, const T* term, u64 n) {
    map(n, [](float sum, float term) { return sum + term; }, sum, sum, term);
}

// y = x rounded to nearest even: x, y (n)
extern "C" __global__ void narrow(const float* x, T* y, u64 n) {
    map(n, [](float x) { return x; }, y, x);
}

// y = x: x, y (n)
extern "C" __global__ void widen(const T* x, float* y, u64 n) {
    map(n, [](float x) { return x; }, y, x);
}
