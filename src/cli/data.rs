//! `trainer data`: making and changing data sets.

use super::{Experiment, bytes};
use crate::data::Sets;
use crate::data::generate::{self, Pictures};
use crate::data::pack::{self, Packed, Sharding};
use crate::data::tfrecord::writer::{ENCODED, RAW};
use crate::error::{Error, Result};
use crate::model::spec::NetSpec;
use crate::train::setup;
use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use std::path::PathBuf;

#[derive(Clone, Debug, Subcommand)]
pub enum DataCommand {
    Pack(PackArgs),
    Generate(GenerateArgs),
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

/// Write a folder of photograph-like JPEGs, to measure reading
#[derive(Clone, Debug, Args)]
#[command(after_help = "Example:\n  trainer data generate /tmp/pictures --images 5000 --classes 10 --size 500x375")]
pub struct GenerateArgs {
    /// Where: a folder that is new or empty
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// How many, a tenth of them for val
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub images: u32,
    /// Into how many class folders they go
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub classes: u32,
    /// Width and height in pixels
    #[arg(long, value_name = "WxH", default_value = "500x375", value_parser = size)]
    pub size: (u16, u16),
    /// The same seed gives the same pictures
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
}

/// Does the work; the text is what it has to say.
pub fn run(command: &DataCommand) -> Result<String> {
    match command {
        DataCommand::Pack(args) => pack(args),
        DataCommand::Generate(args) => generate(args),
    }
}

fn bar(length: usize, what: &str) -> ProgressBar {
    let style = format!("{{human_pos}}/{{human_len}} {what} {{wide_bar}} {{percent}} %  {{per_sec}}  ETA {{eta}}");
    let style = ProgressStyle::with_template(&style).expect("a valid template").progress_chars("━╸─");
    ProgressBar::new(length as u64).with_style(style)
}

fn pack(args: &PackArgs) -> Result<String> {
    let config = args.experiment.load()?;
    let sets = setup::sets(&config, &NetSpec::new(&config.model)?)?;
    let sharding = match args.shards {
        Some(files) => Sharding::Files(files as usize),
        None => Sharding::Bytes(u64::from(args.shard_mib) << 20),
    };
    let bar = bar(sets.train.len() + sets.test.len(), "records");
    let packed = pack::pack(&sets, &args.out, sharding, || bar.inc(1));
    bar.finish_and_clear();
    let (parts, encoded) = packed?;
    Ok(format!("{}\n\n{}\n\n{}", classes(&sets, &parts), totals(&parts), section(args, &sets, encoded)))
}

/// How many records of each class there are.
fn classes(sets: &Sets, [train, test]: &[Packed; 2]) -> String {
    let mut table = table(["class", "train", "test"]);
    for (class, (train, test)) in sets.train.class_names().into_iter().zip(train.counts.iter().zip(&test.counts)) {
        table.add_row([class, train.to_string(), test.to_string()]);
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
    let image = match sets.train.shape() {
        Some(shape) if !encoded => format!("image = \"{RAW}\"\nraw = [{}, {}, {}]", shape.h, shape.w, shape.c),
        _ => format!("image = \"{ENCODED}\""),
    };
    format!("[data]\nformat = \"tfrecord\"\npath = {path}\n{image}\n")
}

fn generate(args: &GenerateArgs) -> Result<String> {
    let (images, classes) = (args.images as usize, args.classes as usize);
    if images < 2 * classes {
        return Err(Error::usage(format!("{images} images for {classes} classes; give at least two a class")));
    }
    let (width, height) = args.size;
    let bar = bar(images, "images");
    let pictures = Pictures { images, classes, width, height, seed: args.seed };
    let bytes = generate::generate(&args.folder, &pictures, || bar.inc(1));
    bar.finish_and_clear();
    Ok(format!("{images} images of {classes} classes, {}, in {}\n", HumanBytes(bytes?), args.folder.display()))
}

fn size(text: &str) -> Result<(u16, u16), String> {
    let parsed = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    match parsed {
        Some((width @ 1..=16_384, height @ 1..=16_384)) => Ok((width, height)),
        _ => Err("give width and height from 1 to 16384, such as 500x375".into()),
    }
}
