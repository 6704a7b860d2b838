//! `bench-comm`: collectives over a range of sizes, in the manner of nccl-tests.
//!
//! Every iteration has fresh, index-dependent data, filled and checked outside of the timing; the time of an iteration is that
//! of the slowest rank. algbw = bytes / p50. busbw is, for an all-reduce, in one or as a reduce-scatter and an all-gather,
//! algbw * 2 (N - 1) / N, the rate at which each link of a ring would have to run; for a reduction with an update,
//! algbw * (N + 4) / N, what a rank's memory moves: the N gradients of its share, and parameter and momentum in and out.
//! Through shared memory a plain loop over the same mappings runs beside each size, as the ceiling. Over NCCL the time is that
//! from device memory to device memory.

mod gpu;
mod update;

use super::nccl::Nccl;
use super::sum::{values_mut, vectorised};
use super::{Communicator, chunk};
use crate::config::raw::ReduceDtype;
use crate::device::{Arena, SliceMut};
use crate::error::{Context, Error, Kind, Result};
use crate::report::print;
use clap::{Args, ValueEnum};
use gpu::OnGpu;
use serde::Serialize;
use std::ops::Range;
use std::time::Instant;
use update::Update;

/// Options of `bench-comm`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// all_reduce; scatter_gather: its two halves; reduce_update: SGD
    #[arg(long, value_enum, default_value_t = Operation::AllReduce, hide_possible_values = true)]
    pub operation: Operation,
    /// f32; bf16: reduce_update, native
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = ReduceDtype::F32, hide_possible_values = true)]
    pub reduce_dtype: ReduceDtype,
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

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
#[value(rename_all = "snake_case")]
pub enum Operation {
    AllReduce,
    ScatterGather,
    ReduceUpdate,
}

impl Operation {
    /// busbw / algbw.
    fn traffic(self, ranks: usize) -> f64 {
        let size = ranks as f64;
        match self {
            Operation::AllReduce | Operation::ScatterGather => 2.0 * (size - 1.0) / size,
            Operation::ReduceUpdate => (size + 4.0) / size,
        }
    }
}

/// What one size gave.
#[derive(Debug, Serialize)]
struct Row {
    bytes: usize,
    p50_us: f64,
    p99_us: f64,
    algbw_gb_s: f64,
    busbw_gb_s: f64,
    /// Values that were not the exact result, over all iterations and ranks.
    wrong: u64,
    /// algbw of the plain loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    ceiling_gb_s: Option<f64>,
}

/// Measures and, on rank 0, prints: `comm`, or `nccl` where it is given. Collective.
pub fn run(mut comm: Box<dyn Communicator>, nccl: Option<Nccl>, options: &Options) -> Result<()> {
    let Options { operation, reduce_dtype, min_bytes, max_bytes, factor, .. } = *options;
    if min_bytes < 4 || max_bytes < min_bytes || factor < 2 {
        return Err(Error::usage(format!(
            "--min-bytes {min_bytes} --max-bytes {max_bytes} --factor {factor}: expected 4 <= min <= max and factor >= 2"
        )));
    }
    if reduce_dtype == ReduceDtype::Bf16 && nccl.is_some() {
        return Err(Error::usage("over nccl sums in f32 are measured; leave --reduce-dtype out"));
    }
    if reduce_dtype == ReduceDtype::Bf16 && operation == Operation::AllReduce {
        return Err(Error::usage(
            "--reduce-dtype bf16 is for gradients; an all_reduce sums in f32. Add --operation reduce_update",
        ));
    }
    if operation == Operation::ReduceUpdate && nccl.is_some() {
        return Err(Error::usage("over nccl all_reduce and scatter_gather are measured; leave --operation out"));
    }
    if options.pin {
        pin(comm.rank())?;
    }
    // A part of one value for each rank is the least.
    let most = max_bytes.max(4 * comm.size());
    let arena = comm.allocate(most)?;
    let update = match operation {
        Operation::AllReduce | Operation::ScatterGather => None,
        Operation::ReduceUpdate => Some(Update::new(&mut *comm, max_bytes / size_of::<f32>())?),
    };
    let terms = match reduce_dtype {
        ReduceDtype::F32 => 1024,
        // Integers up to 256 have a bf16.
        ReduceDtype::Bf16 => (256 / comm.size() as u32).max(1),
    };
    let gpu = nccl.map(|nccl| OnGpu::new(nccl, most)).transpose()?;
    let transport = if gpu.is_some() { "nccl" } else { comm.transport() };
    let mut bench = Bench { comm, operation, arena, gpu, update, terms, iteration: 0 };
    let first = bench.comm.rank() == 0;
    if first && !options.json {
        let name = operation.to_possible_value().expect("none is hidden");
        print(format_args!("# {} over {}, {} ranks", name.get_name(), transport, bench.comm.size()));
        print(format_args!(
            "{:>12} {:>11} {:>11} {:>9} {:>9} {:>7} {:>8} {:>6}",
            "bytes", "p50 us", "p99 us", "algbw", "busbw", "#wrong", "ceiling", "ratio"
        ));
    }
    let mut wrong = 0;
    let sizes = std::iter::successors(Some(min_bytes), |bytes| bytes.checked_mul(factor));
    for bytes in sizes.take_while(|bytes| *bytes <= max_bytes) {
        let row = bench.measure(bench.whole(bytes))?;
        if first && options.json {
            print(serde_json::to_string(&row).or_kind(Kind::Internal, "writing a row")?);
        } else if first {
            print(&row);
        }
        wrong += row.wrong;
    }
    match wrong {
        0 => Ok(()),
        wrong => Err(Error::internal(format!("{wrong} values were not the exact result"))),
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
    operation: Operation,
    arena: Arena,
    /// What is summed by NCCL goes there before, and back afterwards.
    gpu: Option<OnGpu>,
    update: Option<Update>,
    /// Values that are summed are integers below this, so that every sum is exact.
    terms: u32,
    iteration: usize,
}

impl Bench {
    /// Bytes that the operation takes, so many or a little fewer: NCCL scatters and gathers equal parts.
    fn whole(&self, bytes: usize) -> usize {
        let unit = match self.operation {
            Operation::ScatterGather if self.gpu.is_some() => 4 * self.comm.size(),
            _ => 4,
        };
        (bytes / unit).max(1) * unit
    }

    fn measure(&mut self, bytes: usize) -> Result<Row> {
        let len = bytes / size_of::<f32>();
        // About a gigabyte in all, and a tenth more to warm up.
        let iterations = ((1 << 30) / bytes).clamp(10, 2000);
        let (mut times, mut ceilings) = (Vec::with_capacity(iterations), Vec::with_capacity(iterations));
        let mut wrong = 0;
        for number in 0..iterations + iterations / 10 {
            let warm = number >= iterations / 10;
            let (seconds, _) = self.time(len, Bench::collective)?;
            wrong += self.count_wrong(len);
            let (plain, has_plain) = self.time(len, Bench::plain)?;
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
        let [p50, p99] = self.quantiles(&times)?;
        let algbw = |seconds: f64| bytes as f64 / seconds / 1e9;
        let ceiling_gb_s = if ceilings.is_empty() { None } else { Some(algbw(self.quantiles(&ceilings)?[0])) };
        Ok(Row {
            bytes,
            p50_us: p50 * 1e6,
            p99_us: p99 * 1e6,
            algbw_gb_s: algbw(p50),
            busbw_gb_s: algbw(p50) * self.operation.traffic(self.comm.size()),
            wrong: self.of_all_ranks(&[wrong as f32])?.iter().map(|count| *count as u64).sum(),
            ceiling_gb_s,
        })
    }

    /// Seconds of one operation on fresh data, begun by all ranks together, and whether there was anything to do.
    fn time(&mut self, len: usize, operation: fn(&mut Bench, usize) -> Result<bool>) -> Result<(f64, bool)> {
        // Until all have checked what the last operation left.
        self.comm.barrier()?;
        self.iteration += 1;
        let rank = self.comm.rank();
        for (index, x) in self.data(len).f32().iter_mut().enumerate() {
            *x = (value(rank, index, self.iteration) % self.terms) as f32;
        }
        if let Some(update) = &mut self.update {
            update.fill(chunk(len, self.comm.size(), rank), self.iteration);
        }
        self.gpu.iter().try_for_each(|gpu| gpu.upload(self.data(len)))?;
        self.comm.barrier()?;
        let start = Instant::now();
        let done = operation(self, len)?;
        let seconds = start.elapsed().as_secs_f64();
        self.gpu.iter().try_for_each(|gpu| gpu.download(self.data(len)))?;
        Ok((seconds, done))
    }

    fn collective(&mut self, len: usize) -> Result<bool> {
        let data = self.data(len);
        match (&self.gpu, &mut self.update, self.operation) {
            (Some(gpu), _, Operation::ScatterGather) => gpu.scatter_and_gather(data.bytes())?,
            (Some(gpu), ..) => gpu.all_reduce(data.bytes())?,
            (None, Some(update), _) => drop(update.run(&mut *self.comm, data)?),
            (None, None, Operation::ScatterGather) => {
                let mut data = data;
                self.comm.reduce_scatter(data.reborrow())?;
                self.comm.all_gather(data)?;
            }
            (None, None, _) => drop(self.comm.all_reduce(data)?),
        }
        Ok(true)
    }

    /// The same work without any of our care, as one would write it first.
    fn plain(&mut self, len: usize) -> Result<bool> {
        if self.gpu.is_some() {
            return Ok(false);
        }
        let data = self.data(len);
        let update = &mut self.update;
        self.comm.expose(data, &mut |addresses, mine| match update {
            // SAFETY: chunk r of every rank is rank r's alone.
            None => unsafe { plain_all_reduce(addresses, mine) },
            // SAFETY: as above.
            Some(update) => unsafe { update.plain(addresses, mine) },
        })
    }

    fn data(&self, len: usize) -> SliceMut<'static> {
        // SAFETY: one operation after the other uses the arena, which outlives them.
        unsafe { self.arena.slice_mut(0..len * size_of::<f32>()) }
    }

    fn count_wrong(&self, len: usize) -> usize {
        let size = self.comm.size();
        let sum = |index| (0..size).map(|rank| value(rank, index, self.iteration) % self.terms).sum::<u32>() as f32;
        match &self.update {
            None => self.data(len).f32().iter().enumerate().filter(|(index, x)| **x != sum(*index)).count(),
            Some(update) => update.count_wrong(len, self.iteration, sum),
        }
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

/// # Safety
/// The values at `range` of the buffers are valid and aligned, the buffers disjoint, and nobody else touches them.
unsafe fn plain_all_reduce(addresses: &[usize], range: Range<usize>) {
    if let [a, b] = *addresses {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (values_mut(a, range.clone()), values_mut(b, range)) };
        for (a, b) in a.iter_mut().zip(b) {
            let sum = *a + *b;
            (*a, *b) = (sum, sum);
        }
        return;
    }
    for index in range {
        // SAFETY: the caller's promise.
        let value = |address: &usize| unsafe { (*address as *mut f32).add(index) };
        let sum = addresses.iter().map(|address| unsafe { *value(address) }).sum();
        addresses.iter().for_each(|address| unsafe { *value(address) = sum });
    }
}

/// An integer below 1024.
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
