//! The step budget: where a rank's time went, in parts that add up to the whole.
//!
//! A `Clock` starts once and is never stopped; each lap gives all the time since the last one to one category. So no
//! moment is counted twice or lost, and the parts add up by construction.

use super::stragglers::Stragglers;
use crate::comm::bucket::Waited;
use comfy_table::{CellAlignment, Table, presets};
use std::time::{Duration, Instant};

/// What a stretch of time was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Category {
    /// Forward and backward, a GPU's too where nothing is left to do but wait for it, and the optimizer of a rank that is
    /// alone.
    Compute,
    /// Moving and adding gradients, and the update of parameters in the same pass, while nothing else could go on.
    Communication,
    /// Inside communication, waiting for a rank that had not arrived.
    Waiting,
    /// Waiting for the next batch.
    Data,
    Evaluation,
    Checkpoint,
    /// Start, logging, and whatever has no name.
    Other,
}

use Category::*;

const CATEGORIES: [Category; 7] = [Compute, Communication, Waiting, Data, Evaluation, Checkpoint, Other];

/// Time by category.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Budget {
    spent: [Duration; CATEGORIES.len()],
}

/// Attributes a rank's time as it passes.
#[derive(Debug)]
pub struct Clock {
    last: Instant,
    budget: Budget,
}

impl Clock {
    pub fn start() -> Clock {
        Clock { last: Instant::now(), budget: Budget::default() }
    }

    /// Gives the time since the last lap to `category`, and returns it.
    pub fn lap(&mut self, category: Category) -> Duration {
        let now = Instant::now();
        let spent = now - self.last;
        self.last = now;
        self.budget.spent[category as usize] += spent;
        spent
    }

    /// Gives the time since the last lap to communication, but of it what the reducer has waited: for the GPU to
    /// computation, for other ranks to waiting for the slowest. Returns the lap without the computation. Waiting that passed
    /// behind computation is not in the lap and not counted.
    pub fn lap_communication(&mut self, waited: Waited) -> Duration {
        let spent = self.lap(Communication);
        let for_gpu = waited.for_gpu.min(spent);
        let exposed = spent - for_gpu;
        let for_peers = waited.for_peers.min(exposed);
        self.budget.spent[Communication as usize] -= for_gpu + for_peers;
        self.budget.spent[Compute as usize] += for_gpu;
        self.budget.spent[Waiting as usize] += for_peers;
        exposed
    }

    /// Of what was given to computation, so much was standing still, as it turns out later: a GPU that sums over NCCL waits by
    /// itself for the link and for other ranks, which is communication.
    pub fn stood_still(&mut self, time: Duration) {
        let time = time.min(self.budget.spent(Compute));
        self.budget.spent[Compute as usize] -= time;
        self.budget.spent[Communication as usize] += time;
    }

    pub fn budget(&self) -> &Budget {
        &self.budget
    }
}

impl Budget {
    pub fn spent(&self, category: Category) -> Duration {
        self.spent[category as usize]
    }

    pub fn seconds(&self, category: Category) -> f64 {
        self.spent(category).as_secs_f64()
    }

    pub fn total_seconds(&self) -> f64 {
        self.spent.iter().sum::<Duration>().as_secs_f64()
    }

    /// What steps are made of, and so what throughput and shares are measured over.
    pub fn training_seconds(&self) -> f64 {
        [Compute, Communication, Waiting, Data].map(|category| self.seconds(category)).iter().sum()
    }

    /// Share of the training time, 0 to 1.
    pub fn share(&self, category: Category) -> f64 {
        self.seconds(category) / self.training_seconds().max(f64::MIN_POSITIVE)
    }

    /// What was spent after `earlier` was read from the same clock. What stood still before and was known after is left out.
    pub fn since(&self, earlier: &Budget) -> Budget {
        Budget { spent: std::array::from_fn(|i| self.spent[i].saturating_sub(earlier.spent[i])) }
    }
}

/// The budgets of all ranks, or of as many as are known.
#[derive(Clone, Debug)]
pub struct Merged {
    ranks: Vec<Budget>,
}

impl Merged {
    /// One rank's alone.
    pub fn single(budget: &Budget) -> Merged {
        Merged { ranks: vec![*budget] }
    }

    /// `rank`'s contribution in seconds; the sum of these vectors over all ranks is what `from_sum` takes.
    pub fn contribution(budget: &Budget, rank: usize, size: usize) -> Vec<f32> {
        let mut seconds = vec![0.0; size * CATEGORIES.len()];
        for category in CATEGORIES {
            seconds[rank * CATEGORIES.len() + category as usize] = budget.seconds(category) as f32;
        }
        seconds
    }

    pub fn from_sum(seconds: &[f32]) -> Merged {
        let (ranks, _) = seconds.as_chunks();
        let duration = |&seconds: &f32| Duration::try_from_secs_f32(seconds).unwrap_or_default();
        Merged { ranks: ranks.iter().map(|rank| Budget { spent: rank.each_ref().map(duration) }).collect() }
    }

    /// Where ranks cannot tell communication from waiting: all end it together, so what each has beyond the rank with the least
    /// of it was waiting.
    pub fn tell_waiting_apart(mut self) -> Merged {
        let least = self.ranks.iter().map(|rank| rank.spent(Communication)).min().unwrap_or_default();
        for Budget { spent } in &mut self.ranks {
            spent[Waiting as usize] += spent[Communication as usize] - least;
            spent[Communication as usize] = least;
        }
        self
    }

    /// The mean over ranks.
    pub fn mean(&self) -> Budget {
        let sum = |category: Category| self.ranks.iter().map(|rank| rank.spent[category as usize]).sum::<Duration>();
        Budget { spent: CATEGORIES.map(|category| sum(category) / self.ranks.len() as u32) }
    }

    /// The ranks that the others wait for, if that takes at least 1 % of the time. None where no rank stands out.
    pub fn slowest(&self) -> Option<Stragglers> {
        let found = Stragglers::find(self.ranks.iter().map(|rank| rank.seconds(Waiting)));
        found.filter(|found| found.seconds > 0.01 * self.mean().total_seconds())
    }

    /// The table at the end of a run: mean seconds a rank, and shares that add up to 100 %.
    pub fn table(&self) -> String {
        let mean = self.mean();
        let seconds = CATEGORIES.map(|category| mean.seconds(category));
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["where the time went", "seconds", "share"]);
        for ((category, seconds), tenths) in CATEGORIES.into_iter().zip(seconds).zip(tenths_of_percent(&seconds)) {
            if seconds > 0.0 {
                table.add_row([self.label(category), format!("{seconds:.2}"), percent(tenths)]);
            }
        }
        table.add_row(["total".to_string(), format!("{:.2}", mean.total_seconds()), percent(1000)]);
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if index > 0 {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.trim_fmt()
    }

    fn label(&self, category: Category) -> String {
        match category {
            Compute => "compute",
            Communication => "exposed communication",
            Waiting => match self.slowest() {
                Some(Stragglers { rank, count: 1, .. }) => {
                    return format!("waiting for the slowest rank (rank {rank})");
                }
                Some(Stragglers { rank, count, .. }) => {
                    return format!("waiting for the slowest ranks (rank {rank} and {} more)", count - 1);
                }
                None => "waiting for the slowest rank (none stands out)",
            },
            Data => "data",
            Evaluation => "evaluation",
            Checkpoint => "checkpoint",
            Other => "other (start, logging)",
        }
        .to_string()
    }
}

fn percent(tenths: u32) -> String {
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// Shares in tenths of a per cent that add up to 1000: rounded down, then the largest remainders rounded up.
fn tenths_of_percent(parts: &[f64]) -> Vec<u32> {
    let total = parts.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let exact: Vec<f64> = parts.iter().map(|part| 1000.0 * part / total).collect();
    let mut shares: Vec<u32> = exact.iter().map(|&share| share as u32).collect();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let missing = 1000u32.saturating_sub(shares.iter().sum());
    for &index in order.iter().take(missing as usize) {
        shares[index] += 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(seconds: [f32; 7]) -> Budget {
        Budget { spent: seconds.map(Duration::from_secs_f32) }
    }

    #[test]
    fn laps_cover_all_time_once() {
        let mut clock = Clock::start();
        let first = clock.last;
        clock.lap(Compute);
        std::thread::sleep(Duration::from_millis(2));
        clock.lap_communication(Waited::for_peers(Duration::from_secs(1000)));
        clock.lap_communication(Waited::default());
        std::thread::sleep(Duration::from_millis(2));
        let compute = clock.budget().spent(Compute);
        let waited = Waited { for_gpu: Duration::from_millis(2), for_peers: Duration::from_secs(1000) };
        let exposed = clock.lap_communication(waited);
        clock.lap(Other);
        let budget = *clock.budget();
        assert_eq!(budget.spent.iter().sum::<Duration>(), clock.last - first);
        assert!(budget.seconds(Waiting) >= 0.002, "waiting is cut to the lap, not dropped");
        assert_eq!(budget.spent(Compute) - compute, waited.for_gpu, "a GPU that computes does not communicate");
        assert!(exposed <= budget.spent(Waiting));
    }

    #[test]
    fn shares_add_up_to_a_hundred() {
        assert_eq!(tenths_of_percent(&[1.0, 1.0, 1.0]), [334, 333, 333]);
        assert_eq!(tenths_of_percent(&[2.0, 0.0, 1.0]), [667, 0, 333]);
        for seed in 0..100u64 {
            let mut rng = crate::rng::Rng::new(seed, crate::rng::Purpose::Test, 0, 0);
            let parts: Vec<f64> = (0..7).map(|_| rng.uniform().powi(4).into()).collect();
            assert_eq!(tenths_of_percent(&parts).iter().sum::<u32>(), 1000, "{parts:?}");
        }
    }

    #[test]
    fn ranks_merge_through_a_sum_and_the_slowest_is_named() {
        let ranks = [
            budget([8.0, 0.5, 1.0, 0.25, 0.0, 0.25, 0.0]),
            budget([9.0, 0.5, 0.0, 0.25, 0.0, 0.25, 0.0]),
            budget([8.5, 0.5, 0.5, 0.25, 0.0, 0.25, 0.0]),
        ];
        let mut sum = vec![0.0; 21];
        for (rank, budget) in ranks.iter().enumerate() {
            for (total, part) in sum.iter_mut().zip(Merged::contribution(budget, rank, 3)) {
                *total += part;
            }
        }
        let merged = Merged::from_sum(&sum);
        assert_eq!(merged.ranks, ranks);
        assert_eq!(merged.slowest(), Some(Stragglers { rank: 1, count: 1, seconds: 0.5 }));
        assert_eq!((merged.mean().seconds(Compute), merged.mean().total_seconds()), (8.5, 10.0));
        let table = merged.table();
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["compute", "8.50", "85.0", "%"]);
        assert_eq!(rows[3][..6], ["waiting", "for", "the", "slowest", "rank", "(rank"]);
        assert_eq!(rows.last().unwrap()[..], ["total", "10.00", "100.0", "%"]);
        assert!(!table.contains("evaluation"), "empty rows are left out:\n{table}");
        assert_eq!(Merged { ranks: vec![ranks[0]; 2] }.slowest(), None);
    }

    /// The second rank is late, and knows of the link's time alone.
    #[test]
    fn what_a_gpu_stood_still_is_communication_and_waiting_for_the_late() {
        let rank = |stood_still| {
            let mut clock = Clock { last: Instant::now(), budget: budget([4.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]) };
            clock.stood_still(Duration::from_secs(stood_still));
            clock.budget
        };
        assert_eq!(rank(3), budget([1.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0]));
        assert_eq!(rank(5).seconds(Compute), 0.0, "no more than there was");
        assert_eq!(rank(3).since(&rank(1)), budget([0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
        let merged = Merged { ranks: vec![rank(3), rank(1), rank(3)] }.tell_waiting_apart();
        assert_eq!(merged.ranks[0], budget([1.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0]));
        assert_eq!(merged.slowest(), Some(Stragglers { rank: 1, count: 1, seconds: 2.0 }));
    }

    #[test]
    fn shares_are_of_the_training_time() {
        let all = budget([8.0, 1.0, 0.5, 0.5, 20.0, 10.0, 0.0]);
        assert_eq!((all.total_seconds(), all.training_seconds(), all.share(Communication)), (40.0, 10.0, 0.1));
        assert_eq!(all.since(&all), Budget::default());
        assert_eq!(Budget::default().share(Data), 0.0);
    }
}
