//! Copies of blocks of the left matrix, given by tables of offsets, into rows that lie side by side.

use super::super::gemm::Left;
use half::bf16;

/// to(i, k) = A(i, k), with rows of `to` `stride` long.
pub fn stage(block: Left<'_, bf16>, to: &mut [f32], stride: usize) {
    let mut start = 0;
    while start < block.cols.len() {
        let run = run_len(&block.cols[start..]);
        for (&row, to) in block.rows.iter().zip(to.chunks_exact_mut(stride)) {
            let from = &block.data[row as usize + block.cols[start] as usize..][..run];
            to[start..start + run].iter_mut().zip(from).for_each(|(to, &from)| *to = from.into());
        }
        start += run;
    }
}

/// Offsets at the start of the table that follow one another.
fn run_len(table: &[u32]) -> usize {
    1 + table.windows(2).take_while(|pair| pair[1] == pair[0] + 1).count()
}
