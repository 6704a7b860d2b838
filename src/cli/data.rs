//! `trainer data`: making and changing data sets.

use crate::data::generate::{self, Pictures};
use crate::error::{Error, Result};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use std::path::PathBuf;

#[derive(Clone, Debug, Subcommand)]
pub enum DataCommand {
    Generate(GenerateArgs),
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
        DataCommand::Generate(args) => generate(args),
    }
}

fn generate(args: &GenerateArgs) -> Result<String> {
    let (images, classes) = (args.images as usize, args.classes as usize);
    if images < 2 * classes {
        return Err(Error::usage(format!("{images} images for {classes} classes; give at least two a class")));
    }
    let (width, height) = args.size;
    let style = ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} images, {per_sec}, {eta} left");
    let bar = ProgressBar::new(images as u64).with_style(style.expect("the template is well formed"));
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
