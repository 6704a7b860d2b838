//! `bench-comm`: all-reduces over a range of sizes, in the manner of nccl-tests.
//!
//! Every iteration has fresh, index-dependent data, filled and checked outside of the timing; the time of an iteration is
//! that of the slowest rank. algbw = bytes / p50; busbw = algbw * 2 (N - 1) / N, the rate at which each link of a ring
//! would have to run. Through shared memory a plain loop over the same mappings runs beside each size, as the ceiling.

use super::Communicator;
use crate::device::{Arena, SliceMut};
use crate::error::{Context, Error, Kind, Result};
use crate::report::print;
use clap::Args;
use serde::Serialize;
use std::time::Instant;

/// Options of `bench-comm`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Smallest message, bytes
    #[arg(long, default_value_t = 8)]
    pub min_bytes: usize,
    /// Largest message, bytes
    #[arg(long, default_value_t = 256 << 20)]
    pub max_bytes: usize,
    /// Ratio of one size to the one before
    #[arg(long, default_value_t = 2)]
    pub factor: usize,
    /// Bind rank r to core r
    #[arg(long)]
    pub pin: bool,
    /// One JSON object a line: bytes, p50_us, p99_us, algbw_gb_s, busbw_gb_s, wrong, ceiling_gb_s
    #[arg(long)]
    pub json: bool,
}

/// What one size gave.
#[derive(Debug, Serialize)]
struct Row {
    bytes: usize,
    p50_us: f64,
    p99_us: f64,
    algbw_gb_s: f64,
    busbw_gb_s: f64,
    /// Values that were not the exact sum, over all iterations and ranks.
    wrong: u64,
    /// algbw of the plain loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    ceiling_gb_s: Option<f64>,
}

/// Measures and, on rank 0, prints. Collective.
pub fn run(mut comm: Box<dyn Communicator>, options: &Options) -> Result<()> {
    let Options { min_bytes, max_bytes, factor, .. } = *options;
    if min_bytes < 4 || max_bytes < min_bytes || factor < 2 {
        return Err(Error::usage(format!(
            "--min-bytes {min_bytes} --max-bytes {max_bytes} --factor {factor}: expected 4 <= min <= max and factor >= 2"
        )));
    }
    if options.pin {
        pin(comm.rank())?;
    }
    let arena = comm.allocate(max_bytes)?;
    let mut bench = Bench { comm, arena, iteration: 0 };
    let first = bench.comm.rank() == 0;
    if first && !options.json {
        print(format_args!("# all_reduce over {}, {} ranks", bench.comm.transport(), bench.comm.size()));
        print(format_args!(
            "{:>12} {:>11} {:>11} {:>9} {:>9} {:>7} {:>8} {:>6}",
            "bytes", "p50 us", "p99 us", "algbw", "busbw", "#wrong", "ceiling", "ratio"
        ));
    }
    let mut wrong = 0;
    let sizes = std::iter::successors(Some(min_bytes), |bytes| bytes.checked_mul(factor));
    for bytes in sizes.take_while(|bytes| *bytes <= max_bytes) {
        let row = bench.measure(bytes / 4 * 4)?;
        if first && options.json {
            print(serde_json::to_string(&row).or_kind(Kind::Internal, "writing a row")?);
        } else if first {
            print(&row);
        }
        wrong += row.wrong;
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(Error::internal(format!("{wrong} values of all-reduces were not the exact sum"))),
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Row { bytes, p50_us, p99_us, algbw_gb_s, busbw_gb_s, wrong, ceiling_gb_s } = self;
        write!(f, "{bytes:>12} {p50_us:>11.2} {p99_us:>11.2} {algbw_gb_s:>9.3} {busbw_gb_s:>9.3} {wrong:>7}")?;
        match ceiling_gb_s {
            Some(ceiling) => write!(f, " {ceiling:>8.3} {:>5.0}%", 100.0 * algbw_gb_s / ceiling),
            None => Ok(()),
        }
    }
}

struct Bench {
    comm: Box<dyn Communicator>,
    arena: Arena,
    iteration: usize,
}

impl Bench {
    fn measure(&mut self, bytes: usize) -> Result<Row> {
        let len = bytes / size_of::<f32>();
        // About a gigabyte in all, and a tenth more to warm up.
        let iterations = ((1 << 30) / bytes).clamp(10, 2000);
        let (mut times, mut ceilings) = (Vec::with_capacity(iterations), Vec::with_capacity(iterations));
        let mut wrong = 0;
        for number in 0..iterations + iterations / 10 {
            let warm = number >= iterations / 10;
            let (seconds, _) = self.time(len, |comm, data| comm.all_reduce(data).map(|_| true))?;
            wrong += self.count_wrong(len);
            let (plain, has_plain) = self.time(len, |comm, data| comm.plain_all_reduce(data))?;
            if has_plain {
                // Also to have the same work before either measurement, which matters where ranks share cores.
                wrong += self.count_wrong(len);
            }
            if warm {
                times.push(seconds);
            }
            if warm && has_plain {
                ceilings.push(plain);
            }
        }
        let size = self.comm.size() as f64;
        let [p50, p99] = self.quantiles(&times)?;
        let algbw = |seconds: f64| bytes as f64 / seconds / 1e9;
        let ceiling_gb_s = if ceilings.is_empty() { None } else { Some(algbw(self.quantiles(&ceilings)?[0])) };
        Ok(Row {
            bytes,
            p50_us: p50 * 1e6,
            p99_us: p99 * 1e6,
            algbw_gb_s: algbw(p50),
            busbw_gb_s: algbw(p50) * 2.0 * (size - 1.0) / size,
            wrong: self.of_all_ranks(&[wrong as f32])?.iter().map(|count| *count as u64).sum(),
            ceiling_gb_s,
        })
    }

    /// Seconds of one operation on fresh data, begun by all ranks together.
    fn time(
        &mut self,
        len: usize,
        operation: impl FnOnce(&mut dyn Communicator, SliceMut<'_>) -> Result<bool>,
    ) -> Result<(f64, bool)> {
        self.iteration += 1;
        let rank = self.comm.rank();
        // SAFETY: nobody touches the arena between operations.
        let mut data = unsafe { self.arena.slice_mut(0..len * size_of::<f32>()) };
        for (index, x) in data.f32().iter_mut().enumerate() {
            *x = value(rank, index, self.iteration) as f32;
        }
        self.comm.barrier()?;
        let start = Instant::now();
        let done = operation(&mut *self.comm, data)?;
        Ok((start.elapsed().as_secs_f64(), done))
    }

    fn count_wrong(&self, len: usize) -> usize {
        let size = self.comm.size();
        // SAFETY: nobody touches the arena between operations.
        let data = unsafe { self.arena.slice(0..len * size_of::<f32>()) };
        let expected = |index| (0..size).map(|rank| value(rank, index, self.iteration)).sum::<u32>() as f32;
        data.f32().iter().enumerate().filter(|(index, x)| **x != expected(*index)).count()
    }

    /// Median and 99th percentile over iterations of the slowest rank's time.
    fn quantiles(&mut self, times: &[f64]) -> Result<[f64; 2]> {
        let mine: Vec<f32> = times.iter().map(|seconds| *seconds as f32).collect();
        let all = self.of_all_ranks(&mine)?;
        let slowest = |iteration| all.iter().skip(iteration).step_by(times.len()).copied().fold(0.0, f32::max);
        let mut slowest: Vec<f32> = (0..times.len()).map(slowest).collect();
        slowest.sort_by(f32::total_cmp);
        Ok([0.5, 0.99].map(|quantile| f64::from(slowest[((slowest.len() - 1) as f64 * quantile).round() as usize])))
    }

    /// The values of all ranks, one rank after the other.
    fn of_all_ranks(&mut self, mine: &[f32]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; mine.len() * self.comm.size()];
        all[self.comm.rank() * mine.len()..][..mine.len()].copy_from_slice(mine);
        self.comm.all_reduce(SliceMut::from(&mut all[..]))?;
        Ok(all)
    }
}

/// A small integer, so that every sum is exact.
fn value(rank: usize, index: usize, iteration: usize) -> u32 {
    (index as u32).wrapping_mul(7).wrapping_add((rank * 131 + iteration * 29) as u32) % 1024
}

fn pin(rank: usize) -> Result<()> {
    let mut core = rustix::thread::CpuSet::new();
    if rank < rustix::thread::CpuSet::MAX_CPU {
        core.set(rank);
    }
    rustix::thread::sched_setaffinity(None, &core)
        .or_kind(Kind::Usage, format!("--pin: binding rank {rank} to core {rank} (is there one for every rank?)"))
}
