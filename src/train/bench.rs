//! `bench-step`: steps of a real run, timed layer by layer and bucket by bucket. There is no second loop over a step here:
//! `Learner::step` does what it does in training, with a stopwatch in its net.
//!
//! A layer's backward computes its two gradients in one call, for they share what they read. What each costs is found in
//! more steps after the timed ones, in which each such layer is first asked for the gradient by its parameters alone.
//!
//! On a GPU the host only launches a step. Steps are timed from event to event in its stream; its layers, between events of their
//! own, which cost a little time, in further steps; and the update by itself, for it may go on beside backward. A GPU should never
//! wait for the host: what it did wait between two steps is found by the host's clock, which the first event joins to the GPU's.

use super::feed::Feed;
use super::gradient::Sums;
use super::learner::{Learner, Step};
use super::memory::Need;
use super::{Rank, gpus, setup};
use crate::comm::Communicator;
use crate::config::plan::Plan;
use crate::config::raw::Config;
use crate::data::{self, queue::Position};
use crate::device::cuda::{Event, Gpu};
use crate::device::{self, Place};
use crate::error::{Error, Kind, Result};
use crate::model::net::Net;
use crate::model::precision::Precision;
use crate::model::stopwatch::{LayerTime, Stopwatch};
use crate::optim::At;
use crate::report::budget::{Category, Clock};
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long to measure.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Steps {
    /// Steps to time; a third as many more find the gradients' shares, and on a GPU as many again the layers' times
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
    /// Reducing and updating: the elements of each bucket and of the tail; on a GPU all of them, by themselves.
    pub parts: Vec<(Range<usize>, Duration)>,
    /// What of the update had to wait for all gradients.
    pub finish: Duration,
    pub gpu: Option<OnGpu>,
}

/// What is measured where the rank has a GPU.
pub struct OnGpu {
    pub name: String,
    /// The host's time in the layers' calls, which is that of their launches; where graphs are replayed, there are none of these.
    pub launch: Duration,
    /// Of a step, on the average, at most: the GPU had done all it had been given, and the host had not yet given it the step.
    pub exposed: Duration,
    /// Taken of its memory since this rank began to build its net, by whom ever.
    pub memory_bytes: usize,
    /// Of these, during the timed steps.
    pub grown_bytes: usize,
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
    setup::agree(config, &parts, &data::fingerprint(&*parts.train), rank, &mut *comm)?;
    let config = &gpus::settle(config, rank, &mut *comm)?;
    gpus::take(config, &Need::new(config, &plan, parts.samples(), true)?, rank, &mut *comm)?;
    let gpu = match device::choose(config.run.device) {
        Place::Host => None,
        Place::Cuda => Some(Gpu::of_this_rank()?),
    };
    let free_before = free(gpu.as_ref())?;
    let learner = setup::learner(config, &plan, &parts, rank, comm)?;
    let loader = parts.loader(config)?;
    let inlet = setup::inlet(config, &plan)?;
    let feed = setup::feed(config, &plan, &parts, rank, (loader, inlet), Position::default())?;
    let mut bench = Bench { rank, learner, feed, clock: Clock::start(), done: 0, gpu };

    // An error ends what the GPU has under way with other ranks.
    let times = bench.measure(steps).inspect_err(|error| rank.health.fail(error.clone()))?;
    let Times { steps: timed, seconds, grown_bytes, layers, parts, finish } = times;
    let Bench { learner: Learner { net, gradient, .. }, gpu, .. } = &bench;
    let measured = Measured {
        net,
        plan: &plan,
        transport: bench.learner.transport,
        precision: config.run.precision,
        overlap: gpu.is_none() && config.parallel.overlap && plan.ranks > 1,
        steps: steps.steps,
        state_tensors: gradient.reducer().with(|_, updater| updater.state_tensors()),
        samples_per_second: timed.iter().map(|step| step.samples).sum::<f64>() / seconds,
        step: median(timed.iter().map(|step| step.whole)),
        data: median(timed.iter().map(|step| step.data)),
        parts,
        finish,
        gpu: match gpu {
            None => None,
            Some(gpu) => Some(OnGpu {
                name: gpu.device().name.clone(),
                launch: layers.iter().map(|layer| layer.host).sum(),
                exposed: exposed(&timed),
                memory_bytes: free_before.saturating_sub(free(Some(gpu))?),
                grown_bytes,
            }),
        },
        layers,
    };
    if rank.world.rank == 0 { say(&measured) } else { Ok(()) }
}

/// Bytes of device memory.
fn free(gpu: Option<&Gpu>) -> Result<usize> {
    gpu.map_or(Ok(0), |gpu| gpu.memory().map(|memory| memory.free))
}

struct Bench<'a> {
    rank: &'a Rank,
    learner: Learner,
    feed: Feed,
    clock: Clock,
    done: u64,
    gpu: Option<Gpu>,
}

/// What was timed.
struct Times {
    steps: Vec<Timed>,
    /// All of them.
    seconds: f64,
    /// Of device memory, taken meanwhile.
    grown_bytes: usize,
    /// As in `Measured`.
    layers: Vec<LayerTime>,
    parts: Vec<(Range<usize>, Duration)>,
    finish: Duration,
}

/// Times of one step.
struct Timed {
    whole: Duration,
    data: Duration,
    /// When it was in the stream of a GPU, and how long this had been empty.
    launched: Instant,
    exposed: Duration,
    /// Of all ranks.
    samples: f64,
    layers: Vec<LayerTime>,
    parts: Vec<Duration>,
}

impl Bench<'_> {
    fn measure(&mut self, Steps { steps, warmup }: Steps) -> Result<Times> {
        let few = steps.div_ceil(3);
        self.steps(warmup)?;
        if self.gpu.is_none() {
            self.time_layers()?;
        }
        let free_before = free(self.gpu.as_ref())?;
        let start = self.meet()?;
        let timed = self.steps(steps)?;
        let seconds = (self.meet()? - start).as_secs_f64();
        let grown_bytes = free_before.saturating_sub(free(self.gpu.as_ref())?);
        let in_layers = match self.gpu {
            None => None,
            Some(_) => {
                self.time_layers()?;
                Some(self.steps(few)?)
            }
        };
        self.learner.net.stopwatch_mut().as_mut().expect("it was put there").apart = true;
        let apart = self.steps(few)?;
        let layers = layer_times(in_layers.as_ref().unwrap_or(&timed), &apart);
        let (parts, finish) = match self.gpu.clone() {
            None => self.parts(&timed),
            Some(gpu) => (vec![self.update_alone(&gpu, few)?], Duration::ZERO),
        };
        Ok(Times { steps: timed, seconds, grown_bytes, layers, parts, finish })
    }

    fn time_layers(&mut self) -> Result<()> {
        let net = &mut self.learner.net;
        *net.stopwatch_mut() = Some(Stopwatch::new(net.spec().nodes.len(), net.place())?);
        Ok(())
    }

    fn steps(&mut self, count: u32) -> Result<Vec<Timed>> {
        let (mut timed, mut start) = (Vec::new(), self.now()?);
        let (first, began) = (start.clone(), Instant::now());
        for _ in 0..count {
            let step = self.step()?;
            let end = self.now()?;
            timed.push((step, start, end.clone()));
            start = end;
        }
        let times = |(step, start, end): (Timed, Moment, Moment)| {
            let empty_since = began + start.since(&first)?;
            let exposed = step.launched.saturating_duration_since(empty_since);
            Ok(Timed { whole: end.since(&start)?, exposed, ..step })
        };
        timed.into_iter().map(times).collect()
    }

    fn step(&mut self) -> Result<Timed> {
        self.clock.lap(Category::Other);
        let before = *self.clock.budget();
        let step = Step {
            number: self.done,
            feed: &mut self.feed,
            clock: &mut self.clock,
            health: &self.rank.health,
            flags: Sums::default(),
        };
        let done = self.learner.step(step)?;
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
            whole: Duration::ZERO,
            data: Duration::from_secs_f64(data),
            launched: self.learner.gradient.launched(),
            exposed: Duration::ZERO,
            samples: f64::from(done.sums.samples),
            layers: self.learner.net.stopwatch_mut().as_mut().map_or(Ok(Vec::new()), Stopwatch::take)?,
            parts: self.learner.part_times.clone(),
        })
    }

    /// The medians of what followed backward, by part, and of what had to wait for all of them.
    fn parts(&self, timed: &[Timed]) -> (Vec<(Range<usize>, Duration)>, Duration) {
        let gradient = &self.learner.gradient;
        let part = |part: usize| median(timed.iter().map(|step| step.parts[part]));
        let parts = (0..gradient.parts()).map(|number| (gradient.range(number), part(number))).collect();
        (parts, part(gradient.parts()))
    }

    /// The update of all parameters from the gradients that the last step has left, with their way to the other ranks.
    fn update_alone(&mut self, gpu: &Gpu, times: u32) -> Result<(Range<usize>, Duration)> {
        let Learner { net, gradient, schedule, .. } = &self.learner;
        let at = At { lr: schedule.lr(self.done), step: self.done };
        let update = |_| {
            gpu.wait()?;
            let start = Instant::now();
            gradient.reducer().with(|comm, updater| {
                updater.begin(at)?;
                if let Some(reduction) = updater.reduction() {
                    (0..gradient.parts() - 1).try_for_each(|bucket| reduction.written(bucket))?;
                }
                (0..gradient.parts()).try_for_each(|part| updater.run(part, comm).map(drop))?;
                updater.finish(comm)
            })?;
            gpu.wait()?;
            Ok(start.elapsed())
        };
        let updates = (0..times).map(update).collect::<Result<Vec<Duration>>>()?;
        Ok((0..net.table().len_with_tail(), median(updates.into_iter())))
    }

    /// When all ranks have come, and their GPUs are done.
    fn meet(&mut self) -> Result<Instant> {
        self.gpu.as_ref().map_or(Ok(()), Gpu::wait)?;
        self.learner.gradient.reducer().with(|comm, _| comm.barrier())?;
        Ok(Instant::now())
    }

    fn now(&self) -> Result<Moment> {
        let Some(gpu) = &self.gpu else { return Ok(Moment::OfHost(Instant::now())) };
        let event = gpu.timer()?;
        gpu.compute().record(&event)?;
        Ok(Moment::InStream(Rc::new(event)))
    }
}

/// The medians of the layers' times; in the steps `apart` each was first asked for the gradients by its parameters alone.
fn layer_times(steps: &[Timed], apart: &[Timed]) -> Vec<LayerTime> {
    let layer = |layer: usize| {
        let of = |steps: &[Timed], time: fn(&LayerTime) -> Duration| {
            median(steps.iter().map(|step| time(&step.layers[layer])))
        };
        LayerTime {
            forward: of(steps, |time| time.forward),
            backward: of(steps, |time| time.backward),
            weights_alone: of(apart, |time| time.weights_alone),
            host: of(steps, |time| time.host),
        }
    };
    (0..steps[0].layers.len()).map(layer).collect()
}

/// The mean over all steps but the first, before which the GPU was waited for.
fn exposed(steps: &[Timed]) -> Duration {
    let waited: Duration = steps[1..].iter().map(|step| step.exposed).sum();
    waited / (steps.len() - 1).max(1) as u32
}

/// A moment where the work of a step begins or ends.
#[derive(Clone)]
enum Moment {
    OfHost(Instant),
    InStream(Rc<Event>),
}

impl Moment {
    fn since(&self, earlier: &Moment) -> Result<Duration> {
        match (self, earlier) {
            (Moment::InStream(end), Moment::InStream(start)) => end.since(start),
            (Moment::OfHost(end), Moment::OfHost(start)) => Ok(*end - *start),
            _ => unreachable!("moments of one rank are all of one kind"),
        }
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
