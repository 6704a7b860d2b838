// Windows that slide over an image: structs and functions are those of window.rs, where they are explained.
#pragma once
#include "common.cuh"

struct Axis {
    u32 input, output, size, stride, before;

    // The taps of window o that lie on the input: first_tap(o) <= k < end_tap(o).
    __device__ u32 first_tap(u32 o) const {
        const u32 start = o * stride;
        return before > start ? before - start : 0;
    }
    __device__ u32 end_tap(u32 o) const {
        const u32 start = o * stride, end = input + before;
        return end > start ? min(size, end - start) : 0;
    }
    // The input position under tap k of window o.
    __device__ u32 position(u32 o, u32 k) const {
        return o * stride + k - before;
    }
    // The windows that see input position i: first_window(i) <= o < end_window(i).
    __device__ u32 first_window(u32 i) const {
        const u32 place = i + before;
        return place + 1 > size ? (place - size) / stride + 1 : 0;
    }
    __device__ u32 end_window(u32 i) const {
        return min(output, (i + before) / stride + 1);
    }
    // The tap of window o that lies on input position i.
    __device__ u32 tap(u32 o, u32 i) const {
        return i + before - o * stride;
    }
};

struct Window {
    Axis rows, columns;
};

// A pixel among those of all samples, taken apart.
struct Pixel {
    u32 sample, row, column;

    __device__ Pixel(u32 number, u32 height, u32 width) {
        column = number % width;
        row = number / width % height;
        sample = number / width / height;
    }
};
