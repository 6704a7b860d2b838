//! The command line: what can be asked of `trainer`, and who answers.

mod bench_step;
mod data;
mod info;
mod plan;
mod slurm;

use crate::comm;
use crate::config;
use crate::config::plan::global_batch;
use crate::config::raw::{Algorithm, Config, Parallel, TransportChoice};
use crate::device::Choice;
use crate::device::cuda::probe;
use crate::error::{Error, Result};
use crate::launch::job::Job;
use crate::launch::restart::{self, Restarts};
use crate::launch::spawn;
use crate::launch::world::{Launcher, World};
use crate::train::{self, Injection, Resume};
use clap::{Args, Parser, Subcommand};
use std::convert::Infallible;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

/// Trains a neural network on N ranks in lock step.
#[derive(Debug, Parser)]
#[command(
    name = "trainer",
    version,
    max_term_width = 80,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    override_usage = "trainer [OPTIONS] --config <FILE>  or  trainer [OPTIONS] <COMMAND>",
    disable_help_flag = true,
    disable_version_flag = true,
    help_template = "{about}\n{usage-heading} {usage}\n{all-args}{after-help}",
    after_help = EXAMPLES
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub experiment: Option<Experiment>,
    /// Go on from: auto (the newest checkpoint), none, PATH
    #[arg(long, value_name = "PATH", value_parser = resume)]
    pub resume: Option<Resume>,
    /// The run's directory [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Ranks here, or gpus [default: by launcher]
    #[arg(short = 'n', long = "ranks", value_name = "N", global = true, value_parser = ranks_here)]
    pub ranks: Option<RanksHere>,
    #[command(flatten)]
    pub restarts: restart::Options,
    /// Rehearse a failure: kill:rank=1@step=40 (repeatable)
    #[arg(long, value_name = "FAULT")]
    pub inject: Vec<Injection>,
    /// Say more; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// While training, say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    // Hidden, for everybody knows these two, and help is to fit a screen.
    #[arg(short, long, action = clap::ArgAction::Help, hide = true, global = true)]
    help: Option<bool>,
    #[arg(short = 'V', long, action = clap::ArgAction::Version, hide = true)]
    version: Option<bool>,
}

const EXAMPLES: &str = "\
Example: trainer -n 2 --config configs/quickstart.toml --set optimizer.lr=0.01";

#[derive(Debug, Subcommand)]
pub enum Command {
    Plan(PlanArgs),
    Eval(EvalArgs),
    BenchStep(BenchStepArgs),
    BenchComm(BenchCommArgs),
    Slurm(slurm::SlurmArgs),
    /// Make and change data sets: pack, generate
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Show this machine and this build: CPU, GPUs, memory, transports
    Info,
    /// Print the JSON schema of the configuration, for editors
    #[command(after_help = "Example:\n  trainer schema > lockstep.schema.json")]
    Schema,
}

/// `-n`
#[derive(Clone, Copy, Debug)]
pub enum RanksHere {
    Number(usize),
    /// One for each GPU that this process sees.
    Gpus,
}

impl RanksHere {
    /// How many, to compute as `config` says, where there is one.
    fn count(self, config: Option<&Config>) -> Result<usize> {
        match self {
            RanksHere::Number(number) => Ok(number),
            RanksHere::Gpus if config.is_some_and(|config| config.run.device == Choice::Cpu) => Err(Error::usage(
                "-n gpus starts a rank for each GPU, but by [run] device they compute on the CPU: take that out, or \
                     give a number of ranks",
            )),
            RanksHere::Gpus => {
                let found = probe::gpus().and_then(|found| found.device(0).map(|_| found.devices.len()));
                found.map_err(|error| error.context("-n gpus"))
            }
        }
    }
}

/// The experiment: a file, and changes to it.
#[derive(Clone, Debug, Args)]
pub struct Experiment {
    /// The experiment, a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Change a key, such as optimizer.lr=0.1 (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

/// Show what a run would do: layers, memory, buckets, bytes
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  trainer plan --config configs/quickstart.toml --np 8")]
pub struct PlanArgs {
    #[command(flatten)]
    pub experiment: Experiment,
    /// Ranks to plan for [default: -n, else 1]
    #[arg(long, value_name = "N", value_parser = ranks)]
    pub np: Option<usize>,
    /// Hosts that share the ranks
    #[arg(long, value_name = "H", default_value = "1", value_parser = ranks)]
    pub hosts: usize,
}

/// Evaluate a checkpoint on the test set
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  trainer -n 2 eval --config a.toml \
  --checkpoint runs/a/checkpoints/step-00001000.safetensors")]
pub struct EvalArgs {
    #[command(flatten)]
    pub experiment: Experiment,
    /// A checkpoint, or a safetensors file of PyTorch weights
    #[arg(long, value_name = "PATH")]
    pub checkpoint: PathBuf,
    /// Write the outputs for the test set, a safetensors file
    #[arg(long, value_name = "FILE")]
    pub logits: Option<PathBuf>,
}

/// Time the training step by layer and phase
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  trainer -n 2 bench-step --config configs/quickstart.toml
  trainer bench-step --config configs/alexnet.toml --set data.format=synthetic --steps 5 --json")]
pub struct BenchStepArgs {
    #[command(flatten)]
    pub experiment: Experiment,
    #[command(flatten)]
    pub steps: train::bench::Steps,
    /// Rate of matrix products to hold the step against: what a rank could do at best
    #[arg(long, value_name = "TFLOP/s", value_parser = positive)]
    pub peak_tflops: Option<f64>,
    /// One JSON object: samples_per_second, step_ms, layers, phases
    #[arg(long)]
    pub json: bool,
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "give a number above 0".to_owned())
}

/// Measure all-reduce over sizes, in the manner of nccl-tests
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  trainer -n 2 bench-comm --transport shm
  trainer -n 4 bench-comm --transport tcp --max-bytes 1048576 --json")]
pub struct BenchCommArgs {
    /// auto, shm, tcp, mpi or nccl
    #[arg(long, value_enum, default_value_t = TransportChoice::Auto, hide_possible_values = true)]
    pub transport: TransportChoice,
    /// Over mpi: ring or native
    #[arg(long, value_enum, default_value_t = Algorithm::Ring, hide_possible_values = true)]
    pub algorithm: Algorithm,
    /// Over nccl: ranks may be on one GPU
    #[arg(long)]
    pub allow_shared_gpu: bool,
    #[command(flatten)]
    pub options: comm::bench::Options,
}

impl Experiment {
    fn load(&self) -> Result<Config> {
        config::load(&self.config, &self.sets)
    }
}

/// Does what was asked; the value is the exit code.
pub fn run(cli: Cli) -> Result<u8> {
    let Some(command) = &cli.command else {
        return cli.train();
    };
    if cli.experiment.is_some() || cli.resume.is_some() || cli.out.is_some() {
        return Err(Error::usage(
            "--config, --set, --resume and --out before a subcommand are for training; put them behind the subcommand",
        ));
    }
    if cli.restarts.max_restarts.is_some() || !cli.inject.is_empty() {
        return Err(Error::usage("--max-restarts and --inject are for training; leave them out before a subcommand"));
    }
    match command {
        Command::Plan(args) => {
            let config = args.experiment.load()?;
            let here = cli.ranks.map(|ranks| ranks.count(Some(&config)));
            let ranks = args.np.map_or_else(|| here.unwrap_or(Ok(1)), Ok)?;
            print(&plan::describe(&config, ranks, args.hosts)?)
        }
        Command::Eval(args) => {
            let config = args.experiment.load()?;
            cli.on_every_rank(Some(&config), || {
                train::evaluate(&config, &args.checkpoint, args.logits.as_deref(), cli.verbosity())
            })
        }
        Command::BenchStep(args) => {
            let config = args.experiment.load()?;
            cli.on_every_rank(Some(&config), || bench_step(&config, args, cli.verbosity()))
        }
        Command::BenchComm(args) => cli.on_every_rank(None, || bench_comm(args, cli.verbosity())),
        Command::Slurm(args) => print(&slurm::script(args, cli.ranks.is_some())?),
        Command::Data(command) => print(&data::run(command)?),
        Command::Info => print(&info::describe()),
        Command::Schema => print(&format!("{:#}\n", config::schema())),
    }
}

impl Cli {
    fn train(&self) -> Result<u8> {
        let Some(experiment) = &self.experiment else {
            return Err(Error::usage("nothing to do; give --config FILE, or see --help"));
        };
        let config = experiment.load()?;
        let resume = self.resume.clone().unwrap_or(Resume::Auto);
        let options =
            train::Options { resume, out: self.out.clone(), verbosity: self.verbosity(), inject: self.inject.clone() };
        match self.ranks_to_start(Some(&config))? {
            None => train::run(&config, &options).map(|()| 0),
            Some(size) => {
                let job = Job::launching()?;
                let run = restart::Run {
                    launch: job.launch.as_ref().map_or("", |launch| &launch.id),
                    saved: &|restarts| options.newest_checkpoint(&config, &job.relaunched(restarts)),
                    fits: &|ranks| global_batch(&config.batch, ranks).map(drop),
                    again: options.resume.again(None),
                };
                spawn::run(size, Some(Restarts::new(&self.restarts, size, run)?))
            }
        }
    }

    /// With `-n`, starts this program again as so many ranks, and the work is theirs; else does it as the rank that this
    /// process is.
    fn on_every_rank(&self, config: Option<&Config>, work: impl FnOnce() -> Result<()>) -> Result<u8> {
        match self.ranks_to_start(config)? {
            Some(size) => spawn::run(size, None),
            None => work().map(|()| 0),
        }
    }

    /// Those of `-n`; none in a process that is one of them.
    fn ranks_to_start(&self, config: Option<&Config>) -> Result<Option<usize>> {
        let is_rank = World::from_env(|name| std::env::var(name).ok())?.launcher == Launcher::Lockstep;
        self.ranks.filter(|_| !is_rank).map(|ranks| ranks.count(config)).transpose()
    }

    /// -1 quiet, 0 normal, 1 and 2 more.
    fn verbosity(&self) -> i8 {
        if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) }
    }
}

fn bench_step(config: &Config, args: &BenchStepArgs, verbosity: i8) -> Result<()> {
    train::join(&config.parallel, verbosity, |rank, comm| {
        train::bench::run(config, args.steps, rank, comm, |measured| {
            let name = &config.run.name;
            let text = match args.json {
                true => format!("{}\n", bench_step::json(name, measured, args.peak_tflops)),
                false => bench_step::text(name, measured, args.peak_tflops),
            };
            print(&text).map(drop)
        })
    })
}

fn bench_comm(args: &BenchCommArgs, verbosity: i8) -> Result<()> {
    let (algorithm, reduce_dtype) = (args.algorithm, args.options.reduce_dtype);
    let allow_shared_gpu = args.allow_shared_gpu;
    let parallel = Parallel { algorithm, reduce_dtype, allow_shared_gpu, ..Parallel::over(args.transport) };
    train::join(&parallel, verbosity, |rank, mut comm| {
        let nccl = train::join_gpus(&parallel, rank, &mut *comm)?;
        comm::bench::run(comm, nccl, &args.options)
    })
}

/// Writes to stdout; a reader that has gone, as in `trainer schema | head`, is no error.
fn print(text: &str) -> Result<u8> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::internal(format!("writing to stdout: {error}")))
        }
        _ => Ok(0),
    }
}

fn bytes(count: usize) -> String {
    match count {
        ..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count as f64 / 1024.0),
        _ => format!("{:.1} MiB", count as f64 / f64::from(1 << 20)),
    }
}

fn ranks_here(text: &str) -> Result<RanksHere, String> {
    match text {
        "gpus" => Ok(RanksHere::Gpus),
        number => ranks(number).map(RanksHere::Number).map_err(|error| format!("{error}, or `gpus`")),
    }
}

fn ranks(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=65536) => Ok(n),
        Ok(_) => Err("give a number from 1 to 65536".into()),
        Err(_) => Err("give a number of ranks, such as 2".into()),
    }
}

fn resume(text: &str) -> Result<Resume, Infallible> {
    Ok(match text {
        "auto" => Resume::Auto,
        "none" => Resume::Never,
        path => Resume::From(path.into()),
    })
}
