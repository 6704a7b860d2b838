//! `trainer slurm`: scripts/train.sbatch with the values of one job. There is one text: what is not said on the command line
//! stays as it is there.

use super::Experiment;
use crate::config::plan;
use crate::error::{Error, Result};
use crate::model::spec::NetSpec;
use clap::Args;
use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::Write;
use std::str::FromStr;

const TEMPLATE: &str = include_str!("../../scripts/train.sbatch");
/// What the template runs.
const COMMAND: &str = "trainer --config configs/quickstart.toml";

/// Print a batch script for Slurm, to look at or to submit
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  trainer slurm --nodes 2 --gpus-per-node 8 --time 2:00:00 --config a.toml
  trainer slurm --ntasks-per-node 4 --time 30 --config a.toml | sbatch")]
pub struct SlurmArgs {
    #[command(flatten)]
    experiment: Experiment,
    /// Nodes of the job
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    nodes: usize,
    /// Ranks a node [default: --gpus-per-node, else 1]
    #[arg(long, value_name = "N", value_parser = count)]
    ntasks_per_node: Option<usize>,
    /// Cores a rank
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    cpus_per_task: usize,
    /// GPUs a node
    #[arg(long, value_name = "N", value_parser = count)]
    gpus_per_node: Option<usize>,
    /// Time limit as sbatch takes it: minutes, or 2:00:00, or 1-12
    #[arg(long, value_name = "TIME")]
    time: Time,
    /// So long before the limit, at the latest, the run saves; 0: it alone decides when
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    signal_lead: u32,
    /// Partition [default: the site's]
    #[arg(long, value_name = "NAME", value_parser = name)]
    partition: Option<String>,
    /// Account to charge [default: the user's]
    #[arg(long, value_name = "NAME", value_parser = name)]
    account: Option<String>,
}

/// The script, after the checks of the configuration that need no data. `ranks`: whether `-n` was given, which has no meaning here.
pub fn script(args: &SlurmArgs, ranks: bool) -> Result<String> {
    if ranks {
        return Err(Error::usage("-n starts ranks on this machine; for a job give --nodes and --ntasks-per-node"));
    }
    if u64::from(args.signal_lead) >= args.time.seconds {
        return Err(Error::usage(format!(
            "the job would be told to save at its start: --time {} is {} s, and --signal-lead {} s; give a longer time or a \
             shorter lead",
            args.time.text, args.time.seconds, args.signal_lead
        )));
    }
    let ntasks_per_node = args.ntasks_per_node.or(args.gpus_per_node).unwrap_or(1);
    let config = args.experiment.load()?;
    NetSpec::new(&config.model)?;
    plan::global_batch(&config.batch, args.nodes * ntasks_per_node)?;

    let given = |value: &Option<String>| value.clone().map_or(Directive::Off, Directive::On);
    let directives = [
        ("job-name", Directive::On(config.run.name.clone())),
        ("nodes", Directive::On(args.nodes.to_string())),
        ("ntasks-per-node", Directive::On(ntasks_per_node.to_string())),
        ("cpus-per-task", Directive::On(args.cpus_per_task.to_string())),
        ("gpus-per-node", given(&args.gpus_per_node.map(|gpus| gpus.to_string()))),
        ("time", Directive::On(args.time.text.clone())),
        (
            "signal",
            match args.signal_lead {
                0 => Directive::Off,
                lead => Directive::On(format!("USR1@{lead}")),
            },
        ),
        ("partition", given(&args.partition)),
        ("account", given(&args.account)),
    ];
    Ok(fill_in(&directives, &command(&args.experiment)?))
}

enum Directive {
    On(String),
    /// Stays in the script as a comment, to be used by hand.
    Off,
}

fn fill_in(directives: &[(&str, Directive)], command: &str) -> String {
    let mut script = String::new();
    for line in TEMPLATE.lines() {
        let option = line.trim_start_matches('#').strip_prefix("SBATCH --").filter(|_| line.starts_with('#'));
        let found =
            option.and_then(|option| directives.iter().find(|(name, _)| option.split('=').next() == Some(name)));
        let _ = match found {
            None => writeln!(script, "{}", line.replace(COMMAND, command)),
            Some((_, Directive::Off)) => writeln!(script, "##{}", line.trim_start_matches('#')),
            Some((name, Directive::On(value))) => {
                let comment = line.split_once("  ").map_or("", |(_, rest)| rest.trim_start());
                writeln!(script, "{}", format!("{:<32} {comment}", format!("#SBATCH --{name}={value}")).trim_end())
            }
        };
    }
    script
}

/// The training, as this program was called; in the shell's quotes where it needs them.
fn command(experiment: &Experiment) -> Result<String> {
    let program = std::env::args_os().next().unwrap_or_else(|| "trainer".into());
    let mut words = vec![quoted(&program)?, "--config".into(), quoted(experiment.config.as_os_str())?];
    for set in &experiment.sets {
        words.extend(["--set".into(), quoted(set.as_ref())?]);
    }
    Ok(words.join(" "))
}

fn quoted(word: &OsStr) -> Result<String> {
    let text = word.to_str().and_then(|text| shlex::try_quote(text).ok());
    text.map(Cow::into_owned)
        .ok_or_else(|| Error::usage(format!("a script cannot hold {}: it is not UTF-8; rename it", word.display())))
}

/// A time limit as sbatch(1) takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Time {
    text: String,
    seconds: u64,
}

impl FromStr for Time {
    type Err = String;

    /// `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes`,
    /// `days-hours:minutes:seconds`.
    fn from_str(text: &str) -> Result<Time, String> {
        const EXPECTED: &str = "expected minutes, as 90, or hours:minutes:seconds, as 1:30:00, or days-hours, as 1-12";
        let numbers = |text: &str| -> Option<Vec<u64>> {
            text.split(':').map(|part| part.parse::<u32>().ok().map(u64::from)).collect()
        };
        let seconds = match text.split_once('-') {
            Some((days, rest)) => {
                numbers(days).zip(numbers(rest)).and_then(|(days, rest)| match (&days[..], &rest[..]) {
                    ([d], [h]) => Some(d * 86_400 + h * 3600),
                    ([d], [h, m]) => Some(d * 86_400 + h * 3600 + m * 60),
                    ([d], [h, m, s]) => Some(d * 86_400 + h * 3600 + m * 60 + s),
                    _ => None,
                })
            }
            None => numbers(text).and_then(|parts| match parts[..] {
                [m] => Some(m * 60),
                [m, s] => Some(m * 60 + s),
                [h, m, s] => Some(h * 3600 + m * 60 + s),
                _ => None,
            }),
        };
        match seconds {
            Some(0) => Err(format!("a job needs time; {EXPECTED}")),
            Some(seconds) => Ok(Time { text: text.to_owned(), seconds }),
            None => Err(EXPECTED.to_owned()),
        }
    }
}

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=65536) => Ok(n),
        _ => Err("give a number from 1 to 65536".into()),
    }
}

/// Of a partition or account, or several after commas.
fn name(text: &str) -> Result<String, String> {
    let unfit = text.chars().find(|c| !(c.is_alphanumeric() || "_-.,:@+".contains(*c)));
    match unfit {
        _ if text.is_empty() => Err("the name is empty; leave the option out for the site's default".into()),
        Some(c) => Err(format!("a name cannot hold {c:?}; `sinfo` lists partitions, `sacctmgr show user -s` accounts")),
        None => Ok(text.to_owned()),
    }
}
