//! The command line: what can be asked of `trainer`, and who answers.

mod info;
mod plan;

use crate::config::{self, raw::TransportChoice};
use crate::error::{Error, Result};
use clap::{Args, Parser, Subcommand};
use std::convert::Infallible;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::str::FromStr;

/// Trains a neural network on N ranks in lock step.
#[derive(Debug, Parser)]
#[command(
    name = "trainer",
    version,
    max_term_width = 80,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    override_usage = "trainer [OPTIONS] --config <FILE>  or  trainer [OPTIONS] <COMMAND>",
    help_template = "{about}\n{usage-heading} {usage}\n\n{all-args}{after-help}",
    after_help = EXAMPLES
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub train: Option<TrainArgs>,
    /// Ranks to start here [default: the launcher's, else 1]
    #[arg(short = 'n', long = "ranks", value_name = "N", global = true, value_parser = ranks)]
    pub ranks: Option<usize>,
    /// Say more; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  trainer -n 2 --config configs/quickstart.toml
  trainer --config a.toml --set optimizer.lr=0.01 --set model.layers.0.filters=64";

#[derive(Debug, Subcommand)]
pub enum Command {
    Plan(PlanArgs),
    Eval(EvalArgs),
    BenchComm(BenchArgs),
    /// Show this machine and this build: CPU, memory, transports
    Info,
    /// Print the JSON schema of the configuration, for editors
    #[command(after_help = "Example:\n  trainer schema > lockstep.schema.json")]
    Schema,
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

#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub experiment: Experiment,
    /// Go on from the run's newest checkpoint (auto), none, or PATH
    #[arg(long, value_name = "PATH", default_value = "auto", hide_default_value = true)]
    pub resume: Resume,
    /// The run's directory [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    Auto,
    None,
    Path(PathBuf),
}

impl FromStr for Resume {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" => Resume::Auto,
            "none" => Resume::None,
            path => Resume::Path(path.into()),
        })
    }
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
}

/// Evaluate a checkpoint on the test set
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  trainer -n 2 eval --config a.toml --checkpoint runs/a/checkpoints/step-1000")]
pub struct EvalArgs {
    #[command(flatten)]
    pub experiment: Experiment,
    #[arg(long, value_name = "PATH")]
    pub checkpoint: PathBuf,
}

/// Measure all-reduce over sizes, in the manner of nccl-tests
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  trainer -n 2 bench-comm --transport shm
  trainer -n 4 bench-comm --transport tcp --max 1048576 --json")]
pub struct BenchArgs {
    /// auto, shm or tcp
    #[arg(long, value_enum, default_value_t = TransportChoice::Auto, hide_possible_values = true)]
    pub transport: TransportChoice,
    /// One JSON object a size instead of a table
    #[arg(long)]
    pub json: bool,
    /// Bytes of the smallest buffer
    #[arg(long, value_name = "BYTES", default_value_t = 8)]
    pub min: usize,
    /// Bytes of the largest buffer
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    pub max: usize,
    /// Iterations a size [default: more for small sizes]
    #[arg(long, value_name = "N")]
    pub iters: Option<usize>,
    /// Bind every rank to a core of its own
    #[arg(long)]
    pub pin: bool,
}

impl Cli {
    /// What `report::log::init` takes.
    pub fn verbosity(&self) -> i8 {
        if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) }
    }
}

/// Does what was asked.
pub fn run(cli: Cli) -> Result<()> {
    match (&cli.command, &cli.train) {
        (Some(_), Some(_)) => Err(Error::usage(
            "--config, --set, --resume and --out of a training run stand before a subcommand; put them behind it",
        )),
        (Some(Command::Plan(args)), None) => print(&plan::describe(args, args.np.or(cli.ranks).unwrap_or(1))?),
        (Some(Command::Info), None) => print(&info::describe()),
        (Some(Command::Schema), None) => print(&format!("{:#}\n", config::schema())),
        (command, _) => Err(Error::internal(format!("{command:?} is not connected"))),
    }
}

/// Writes to stdout; a reader that has gone, as in `trainer schema | head`, is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::internal(format!("writing to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

fn ranks(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=65536) => Ok(n),
        Ok(_) => Err("give a number from 1 to 65536".into()),
        Err(_) if text == "gpus" => Err("this build has no GPU support; give a number of ranks, such as -n 2".into()),
        Err(_) => Err("give a number of ranks, such as 2".into()),
    }
}
