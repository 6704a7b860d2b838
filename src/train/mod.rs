//! Training. `join` makes this process a rank among its peers; `session` is the loop over steps; `learner` is the step:
//! forward, backward, all-reduce, update.

mod agreement;
mod audit;
pub mod bench;
pub mod checkpoint;
mod ending;
mod eval;
pub(crate) mod factors;
mod feed;
pub mod gpus;
mod gradient;
mod inject;
mod judge;
mod learner;
mod logits;
pub(crate) mod memory;
mod norms;
mod replay;
mod resume;
mod session;
pub(crate) mod setup;
mod time_limit;
pub(crate) mod update;

pub use inject::Injection;
pub use resume::Resume;

use crate::comm::nccl::Nccl;
use crate::comm::{self, Communicator};
use crate::config::raw::{Config, Parallel, TransportChoice};
use crate::data::Batch;
use crate::error::{Context, Error, Kind, Result};
#[cfg(feature = "mpi")]
use crate::launch;
use crate::launch::cores::Seats;
use crate::launch::job::Job;
use crate::launch::signals::Signals;
use crate::launch::watch::{Health, Watch};
use crate::launch::world::World;
use crate::report::{self, Evaluation, Set};
use agreement::Fact;
use logits::Logits;
use memory::Need;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What the command line says of a run.
#[derive(Clone, Debug)]
pub struct Options {
    pub resume: Resume,
    /// Default: `runs/<name>`.
    pub out: Option<PathBuf>,
    /// -1 quiet, 0 normal, 1 and 2 more.
    pub verbosity: i8,
    /// Failures to rehearse.
    pub inject: Vec<Injection>,
}

impl Options {
    fn directory(&self, config: &Config) -> PathBuf {
        self.out.clone().unwrap_or_else(|| Path::new("runs").join(&config.run.name))
    }

    fn checkpoints(&self, config: &Config) -> PathBuf {
        config.checkpoint.directory.clone().unwrap_or_else(|| self.directory(config).join("checkpoints"))
    }

    /// Step of the newest checkpoint, whole or not, from which the next start of `job` goes on.
    pub fn newest_checkpoint(&self, config: &Config, job: &Job) -> Option<u64> {
        resume::newest_step(&self.resume, job, &self.checkpoints(config)).ok().flatten()
    }
}

/// This process among its peers.
pub struct Rank {
    pub world: World,
    pub health: Arc<Health>,
}

/// Trains as one rank of the world in which this process was started.
pub fn run(config: &Config, options: &Options) -> Result<()> {
    // Only training has something to save: whatever else runs here, a signal simply ends.
    let signals = Signals::install()?;
    join(&config.parallel, options.verbosity, |rank, comm| session::train(config, options, rank, &signals, comm))
}

/// Evaluates a checkpoint, or weights that another program has saved, on the validation split, if there is one, and on the
/// test set; rank 0 gets to print. The outputs for the test set go to `logits`.
pub fn evaluate(config: &Config, checkpoint: &Path, logits: Option<&Path>, verbosity: i8) -> Result<()> {
    join(&config.parallel, verbosity, |rank, mut comm| {
        let state = checkpoint::load_weights(checkpoint)
            .map_err(|e| e.context(format!("checkpoint {}", checkpoint.display())))?;
        let parts = setup::Parts::open(config)?;
        let plan = setup::plan(config, &parts, &rank.world)?;
        let config = &gpus::settle(config, rank, &mut *comm)?;
        gpus::take(config, &Need::new(config, &plan, parts.samples(), false)?, rank, &mut *comm)?;
        let mut net = setup::net(config, &plan)?;
        let mut judge = setup::judge(config, &plan, net.spec(), &*parts.train, None)?;
        update::import_params(&mut net, &state)
            .map_err(|e| e.context(format!("checkpoint {}", checkpoint.display())))?;
        let loader = parts.loader(config)?;
        let mut evaluator = setup::evaluator(config, &plan, &parts, rank, (loader, setup::inlet(config, &plan)?))?;
        let mut kept = logits.map(|_| Logits::new(parts.test.len(), net.spec().output().len())).transpose()?;
        let sets = if evaluator.validation.is_some() { &[Set::Validation, Set::Test][..] } else { &[Set::Test] };
        for &set in sets {
            let at = (state.step, state.epoch);
            let mut seen = |batch: &Batch, outputs: &[f32]| match &mut kept {
                Some(logits) if set == Set::Test => logits.keep(batch, outputs),
                _ => {}
            };
            let learned = (&mut net, &mut judge);
            let evaluation = evaluator.run(set, learned, at, Some(&mut seen), |sums| comm.all_reduce(sums))?;
            if rank.world.rank == 0 {
                print(&evaluation);
            }
        }
        match kept.zip(logits) {
            Some((kept, path)) => kept.save(path, &*parts.test, &mut *comm),
            None => Ok(()),
        }
    })
}

fn print(evaluation: &Evaluation) {
    report::print(format_args!("{:?}: {}  ({} samples)", evaluation.set, evaluation.scores(), evaluation.samples));
}

/// NCCL among the ranks, of which each takes a GPU, if it is the transport that `parallel` names. Collective.
pub fn join_gpus(parallel: &Parallel, rank: &Rank, comm: &mut dyn Communicator) -> Result<Option<Nccl>> {
    if parallel.transport != TransportChoice::Nccl {
        return Ok(None);
    }
    gpus::take_one(parallel, rank, comm)?;
    update::nccl::connect(parallel, rank, comm)
}

/// Meets the other ranks, watches them while `work` runs on this rank's thread pool, and takes leave of them.
pub fn join(
    parallel: &Parallel,
    verbosity: i8,
    work: impl FnOnce(&Rank, Box<dyn Communicator>) -> Result<()> + Send,
) -> Result<()> {
    let world = World::detect()?;
    report::log::init(verbosity, world.rank);
    let timeout = Duration::from_secs_f64(parallel.timeout);
    let health = Health::new(timeout);
    let (mut control, watched) = world.connect(parallel)?;
    control.set_timeout(timeout);
    let facts = [Fact::program()?, Fact::world(&world, control.size()), Fact::parallel(parallel)];
    agreement::check(&facts, &world, |bytes| control.all_gather(bytes))?;
    let seats = Seats::gather(&mut control, &world)?;
    if world.rank == 0
        && let Some(warning) = seats.warning(world.launcher)
    {
        tracing::warn!("{warning}");
    }
    let threads = seats.threads(world.rank);
    let watch = Watch::start(watched, health.clone())?;
    let rank = Rank { world, health };
    let result = comm::connect(parallel, control, rank.health.clone())
        .and_then(|comm| pool(threads)?.install(|| work(&rank, comm)));
    #[cfg(feature = "mpi")]
    let result = launch::mpi::leave(&rank.health, result);
    watch.finish(&result);
    result
}

/// `threads`, this rank's share of the cores, or as many as RAYON_NUM_THREADS says.
fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let threads = match std::env::var("RAYON_NUM_THREADS") {
        Err(_) => threads,
        Ok(text) => match text.parse() {
            Ok(threads) if threads > 0 => threads,
            _ => {
                return Err(Error::usage(format!("RAYON_NUM_THREADS is `{text}`; give a number of threads from 1 on")));
            }
        },
    };
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute-{i}"));
    builder.build().or_kind(Kind::Internal, "starting the compute threads")
}
