//! Sums of gradients in bf16 against a plain reference. MPI adds in an order of its own, so most terms are such that every
//! order gives the same.

use half::bf16;
use lockstep::comm::{Communicator, chunk};
use lockstep::device::SliceMut;

/// What a reduction has to make of an index's terms.
enum Expected {
    Exactly(f32),
    Nan,
    Within(f64, f64),
}

/// Collective.
pub fn check_all(comm: &mut dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    // The longest has more pieces than are under way at once.
    for len in [0, 1, size - 1, size, size + 1, 17, 16 * size + 1, 1023, 4099, 700_001] {
        let mine = chunk(len, size, rank);
        let mut terms: Vec<f32> = (0..len).map(|index| term(rank, size, index)).collect();
        comm.reduce_scatter(SliceMut::from(&mut terms[..])).unwrap();
        mine.clone().for_each(|index| compare(terms[index], size, index));

        let mut terms: Vec<f32> = (0..len).map(|index| term(rank, size, index)).collect();
        let mut values = vec![0.0; len];
        let update = |_, sums: &mut [f32], values: &mut [f32]| values.copy_from_slice(sums);
        comm.reduce_update(SliceMut::from(&mut terms[..]), SliceMut::from(&mut values[..]), &update).unwrap();
        values.iter().enumerate().for_each(|(index, value)| compare(*value, size, index));
    }
}

fn term(rank: usize, size: usize, index: usize) -> f32 {
    let only = |on: usize, x: f32| if rank == on % size { x } else { 0.0 };
    match index % 8 {
        0 => ((index * 7 + rank * 131) % 64) as f32,
        1 => only(index / 8, real(index)),
        // Halfway between two neighbours, of which one is even.
        2 => only(index / 8, f32::from_bits(0x3f80_8000 + ((index as u32 / 8 % 64) << 16))),
        3 => f32::from_bits(((index + rank) as u32 % 16) << 16),
        4 => [f32::INFINITY, 1.0][usize::from(rank > 0)],
        5 => only(0, f32::INFINITY) + only(size - 1, f32::NEG_INFINITY),
        6 => only(index / 8, -f32::MAX),
        _ => real(index + rank * 104_729),
    }
}

fn compare(found: f32, size: usize, index: usize) {
    let terms = (0..size).map(|rank| term(rank, size, index));
    let expected = match index % 8 {
        0 | 3 => Expected::Exactly(terms.sum()),
        1 | 2 | 6 => Expected::Exactly(bf16::from_f32(terms.sum()).to_f32()),
        4 => Expected::Exactly(f32::INFINITY),
        5 => Expected::Nan,
        _ => {
            let wide: Vec<f64> = terms.map(f64::from).collect();
            let roundings = (2 * size - 1) as f64 / 256.0;
            Expected::Within(wide.iter().sum(), roundings * wide.iter().map(|x| x.abs()).sum::<f64>())
        }
    };
    let (right, words) = match expected {
        Expected::Exactly(sum) => (found.to_bits() == sum.to_bits(), format!("{sum:e}")),
        Expected::Nan => (found.is_nan(), "NaN".to_string()),
        Expected::Within(sum, error) => {
            ((f64::from(found) - sum).abs() <= error, format!("{sum:e}, give or take {error:e}"))
        }
    };
    assert!(right, "value {index} of {size} ranks: {found:e}, expected {words}");
}

fn real(index: usize) -> f32 {
    (index as f32 * 0.618_034).sin() * 10f32.powi((index % 7) as i32 - 3)
}
