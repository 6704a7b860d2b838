//! `bench-step`: steps of a real run, timed layer by layer and bucket by bucket. There is no second loop over a step here:
//! `Learner::step` does what it does in training, with a stopwatch in its net.
//!
//! A layer's backward computes its two gradients in one call, for they share what they read. What each costs is found in
//! more steps after the timed ones, in which each such layer is first asked for the gradient by its parameters alone.

use super::feed::Feed;
use super::gradient::Sums;
use super::learner::{Learner, Step};
use super::memory::Need;
use super::{Rank, gpus, setup};
use crate::comm::Communicator;
use crate::config::plan::Plan;
use crate::config::raw::Config;
use crate::data::{self, queue::Position};
use crate::error::{Error, Kind, Result};
use crate::model::net::Net;
use crate::model::precision::Precision;
use crate::model::stopwatch::{LayerTime, Stopwatch};
use crate::report::budget::{Category, Clock};
use std::ops::Range;
use std::time::{Duration, Instant};

/// How long to measure.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Steps {
    /// Steps to time; a third as many more find the gradients' shares
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Steps before them, not timed
    #[arg(long, default_value_t = 3)]
    pub warmup: u32,
}

/// What one rank measured; times are medians over the timed steps.
pub struct Measured<'a> {
    pub net: &'a Net,
    pub plan: &'a Plan,
    pub transport: &'static str,
    pub precision: Precision,
    /// Whether buckets are reduced and updated behind backward, so that `parts` has only what is left after it.
    pub overlap: bool,
    /// Steps that were timed.
    pub steps: u32,
    /// Tensors of optimizer state for each parameter.
    pub state_tensors: usize,
    /// All ranks' samples over the time of all timed steps.
    pub samples_per_second: f64,
    pub step: Duration,
    /// The step's wait for its batches.
    pub data: Duration,
    /// By node; `weights_alone` is of the steps after the timed ones.
    pub layers: Vec<LayerTime>,
    /// Reducing and updating: the elements of each bucket and of the tail.
    pub parts: Vec<(Range<usize>, Duration)>,
    /// What of the update had to wait for all gradients.
    pub finish: Duration,
}

/// Measures, and has rank 0 say what came of it. Collective.
pub fn run(
    config: &Config,
    steps: Steps,
    rank: &Rank,
    mut comm: Box<dyn Communicator>,
    say: impl FnOnce(&Measured<'_>) -> Result<()>,
) -> Result<()> {
    let parts = setup::Parts::open(config)?;
    let plan = setup::plan(config, &parts, &rank.world)?;
    gpus::take(config, &Need::new(config, &plan, parts.samples(), true)?, rank, &mut *comm)?;
    setup::agree(config, &parts, &data::fingerprint(&*parts.train), rank, &mut *comm)?;
    let learner = setup::learner(config, &plan, &parts, rank, comm)?;
    let loader = parts.loader(config)?;
    let inlet = setup::inlet(config, &plan)?;
    let feed = setup::feed(config, &plan, &parts, rank, (loader, inlet), Position::default())?;
    let mut bench = Bench { rank, learner, feed, clock: Clock::start(), done: 0 };

    bench.steps(steps.warmup)?;
    *bench.learner.net.stopwatch_mut() = Some(Stopwatch::new(bench.learner.net.spec().nodes.len()));
    let start = bench.meet()?;
    let timed = bench.steps(steps.steps)?;
    let seconds = (bench.meet()? - start).as_secs_f64();
    bench.learner.net.stopwatch_mut().as_mut().expect("it was put there").apart = true;
    let apart = bench.steps(steps.steps.div_ceil(3))?;

    let Learner { net, gradient, .. } = &bench.learner;
    let layer = |layer: usize| LayerTime {
        forward: median(timed.iter().map(|step| step.layers[layer].forward)),
        backward: median(timed.iter().map(|step| step.layers[layer].backward)),
        weights_alone: median(apart.iter().map(|step| step.layers[layer].weights_alone)),
    };
    let part = |part: usize| median(timed.iter().map(|step| step.parts[part]));
    let measured = Measured {
        net,
        plan: &plan,
        transport: bench.learner.transport,
        precision: config.run.precision,
        overlap: config.parallel.overlap && plan.ranks > 1,
        steps: steps.steps,
        state_tensors: gradient.reducer().with(|_, updater| updater.state_tensors()),
        samples_per_second: timed.iter().map(|step| step.samples).sum::<f64>() / seconds,
        step: median(timed.iter().map(|step| step.whole)),
        data: median(timed.iter().map(|step| step.data)),
        layers: (0..net.spec().nodes.len()).map(layer).collect(),
        parts: (0..gradient.parts()).map(|number| (gradient.range(number), part(number))).collect(),
        finish: part(gradient.parts()),
    };
    if rank.world.rank == 0 { say(&measured) } else { Ok(()) }
}

struct Bench<'a> {
    rank: &'a Rank,
    learner: Learner,
    feed: Feed,
    clock: Clock,
    done: u64,
}

/// Times of one step.
struct Timed {
    whole: Duration,
    data: Duration,
    /// Of all ranks.
    samples: f64,
    layers: Vec<LayerTime>,
    parts: Vec<Duration>,
}

impl Bench<'_> {
    fn steps(&mut self, count: u32) -> Result<Vec<Timed>> {
        (0..count).map(|_| self.step()).collect()
    }

    fn step(&mut self) -> Result<Timed> {
        self.clock.lap(Category::Other);
        let (start, before) = (Instant::now(), *self.clock.budget());
        let step = Step {
            number: self.done,
            feed: &mut self.feed,
            clock: &mut self.clock,
            health: &self.rank.health,
            flags: Sums::default(),
        };
        let done = self.learner.step(step)?;
        let whole = start.elapsed();
        self.done += 1;
        if !done.sums.loss.is_finite() {
            return Err(Error::new(
                Kind::NonFinite,
                format!(
                    "the loss is {} in step {}: such a step takes another time; lower optimizer.lr",
                    done.sums.loss, self.done
                ),
            ));
        }
        let data = self.clock.budget().since(&before).seconds(Category::Data);
        Ok(Timed {
            whole,
            data: Duration::from_secs_f64(data),
            samples: f64::from(done.sums.samples),
            layers: self.learner.net.stopwatch_mut().as_mut().map(Stopwatch::take).unwrap_or_default(),
            parts: self.learner.part_times.clone(),
        })
    }

    /// When all ranks have come.
    fn meet(&mut self) -> Result<Instant> {
        self.learner.gradient.reducer().with(|comm, _| comm.barrier())?;
        Ok(Instant::now())
    }
}

/// The upper one of two in the middle.
fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_lies_in_the_middle() {
        let median_of = |times: &[u64]| median(times.iter().map(|&time| Duration::from_millis(time)));
        assert_eq!(median_of(&[7]), Duration::from_millis(7));
        assert_eq!(median_of(&[9, 1, 5]), Duration::from_millis(5));
        assert_eq!(median_of(&[4, 1, 9, 5]), Duration::from_millis(5));
    }
}
