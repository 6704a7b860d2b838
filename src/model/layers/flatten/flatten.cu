#include "common.cuh"

// A block carries squares of SIDE x SIDE values through shared memory, so that it reads and writes along lines; a column more
// keeps the columns in different banks.
constexpr u32 SIDE = 32, ROWS = 8;

// Transposes each sample: from (samples,rows,columns), to (samples,columns,rows). Moves each once.
extern "C" __global__ void __launch_bounds__(256) flatten_transpose(
    const T* from, T* to, u32 samples, u32 rows, u32 columns) {
    __shared__ T square[SIDE][SIDE + 1];
    const u32 across = (columns + SIDE - 1) / SIDE, squares = (rows + SIDE - 1) / SIDE * across;
    for (u64 number = blockIdx.x; number < u64(samples) * squares; number += gridDim.x) {
        const u64 sample = number / squares * rows * columns;
        const u32 row = u32(number % squares) / across * SIDE, column = u32(number % squares) % across * SIDE;
        for (u32 y = threadIdx.y; y < SIDE; y += ROWS) {
            if (row + y < rows && column + threadIdx.x < columns) {
                square[y][threadIdx.x] = from[sample + u64(row + y) * columns + column + threadIdx.x];
            }
        }
        __syncthreads();
        for (u32 y = threadIdx.y; y < SIDE; y += ROWS) {
            if (column + y < columns && row + threadIdx.x < rows) {
                to[sample + u64(column + y) * rows + row + threadIdx.x] = square[threadIdx.x][y];
            }
        }
        __syncthreads();
    }
}
