#include "common.cuh"

// sums (columns) = the sums over the rows of x (rows, columns), for 32 columns a block. A warp reads lines of 32 neighbours; the
// block's warps take turns at the rows, and their sums are added up in a fixed order.
extern "C" __global__ void __launch_bounds__(256) sum_rows(const T* x, float* sums, u32 rows, u32 columns) {
    __shared__ float parts[8][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 column = blockIdx.x * 32 + lane;
    float part = 0.0f;
    if (column < columns) {
        for (u32 row = warp; row < rows; row += 8) {
            part += to_float(x[u64(row) * columns + column]);
        }
    }
    parts[warp][lane] = part;
    __syncthreads();
    if (warp == 0 && column < columns) {
        float sum = 0.0f;
        for (u32 i = 0; i < 8; i++) {
            sum += parts[i][lane];
        }
        sums[column] = sum;
    }
}
