//! `trainer data`: what is done with data sets beside training on them.

use super::{Experiment, bytes, print};
use crate::data::pack::{self, Packed, Sharding};
use crate::data::tfrecord::writer::{ENCODED, RAW};
use crate::data::{self, Sets};
use crate::error::Result;
use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

#[derive(Clone, Debug, Subcommand)]
pub enum DataCommand {
    Pack(PackArgs),
}

/// Write the set that a configuration names as TFRecord files
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  trainer data pack --config configs/fashion-mnist.toml --out data/packed
  trainer data pack --config a.toml --out data/packed --shards 16")]
pub struct PackArgs {
    #[command(flatten)]
    pub experiment: Experiment,
    /// The folder of the files, new or empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Files a part
    #[arg(long, value_name = "N", conflicts_with = "shard_mib", value_parser = clap::value_parser!(u32).range(1..=99_999))]
    pub shards: Option<u32>,
    /// Begin a new file after this many MiB
    #[arg(long, value_name = "M", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub shard_mib: u32,
}

pub fn run(command: &DataCommand) -> Result<u8> {
    match command {
        DataCommand::Pack(args) => pack(args),
    }
}

fn pack(args: &PackArgs) -> Result<u8> {
    let config = args.experiment.load()?;
    let sets = data::open(&config.data.format, config.run.seed)?;
    let sharding = match args.shards {
        Some(files) => Sharding::Files(files as usize),
        None => Sharding::Bytes(u64::from(args.shard_mib) << 20),
    };
    let bar = ProgressBar::new((sets.train.len() + sets.test.len()) as u64);
    let style = "packing  {human_pos}/{human_len} {wide_bar} {percent} %  {per_sec}  ETA {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template").progress_chars("━╸─"));
    let packed = pack::pack(&sets, &args.out, sharding, || bar.inc(1));
    bar.finish_and_clear();
    let (parts, encoded) = packed?;
    print(&format!("{}\n\n{}\n\n{}", classes(&sets, &parts), totals(&parts), section(args, &sets, encoded)))
}

/// How many records of each class there are.
fn classes(sets: &Sets, [train, test]: &[Packed; 2]) -> String {
    let mut table = table(["class", "train", "test"]);
    for (class, (train, test)) in train.counts.iter().zip(&test.counts).enumerate() {
        table.add_row([sets.train.class_name(class), train.to_string(), test.to_string()]);
    }
    table.trim_fmt()
}

fn totals(parts: &[Packed; 2]) -> String {
    let mut table = table(["part", "records", "files", "size"]);
    for Packed { part, files, bytes: size, counts } in parts {
        let records: usize = counts.iter().sum();
        table.add_row([part.to_string(), records.to_string(), files.to_string(), bytes(*size as usize)]);
    }
    table.trim_fmt()
}

fn table<const COLUMNS: usize>(header: [&str; COLUMNS]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

/// What a configuration says to train on it.
fn section(args: &PackArgs, sets: &Sets, encoded: bool) -> String {
    let path = toml::Value::String(args.out.display().to_string());
    let shape = sets.train.shape();
    let image = match encoded {
        true => format!("image = \"{ENCODED}\""),
        false => format!("image = \"{RAW}\"\nraw = [{}, {}, {}]", shape.h, shape.w, shape.c),
    };
    format!("[data]\nformat = \"tfrecord\"\npath = {path}\n{image}\n")
}
