#include "lanes.cuh"

template <u32 N>
__device__ inline void copy(const T* from, T* to, u32 rows, u32 c, u32 from_c, u32 to_c) {
    const u32 packs = c / N;
    for (u64 item = first_item(); item < u64(rows) * packs; item += item_stride()) {
        const u32 row = u32(item) / packs, channel = u32(item) % packs * N;
        *reinterpret_cast<Pack<T, N>*>(to + u64(row) * to_c + channel) =
            *reinterpret_cast<const Pack<T, N>*>(from + u64(row) * from_c + channel);
    }
}

// Copies c channels from some place in the rows of one tensor to some place in those of another: from (rows,from_c) from
// from_start on, to (rows,to_c) from to_start on. Moves c values of each row in and out.
extern "C" __global__ void concat_copy(
    const T* from, T* to, u32 rows, u32 c, u32 from_c, u32 from_start, u32 to_c, u32 to_start) {
    if ((c | from_c | from_start | to_c | to_start) % WIDE == 0) {
        copy<WIDE>(from + from_start, to + to_start, rows, c, from_c, to_c);
    } else {
        copy<1>(from + from_start, to + to_start, rows, c, from_c, to_c);
    }
}
