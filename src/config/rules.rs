//! Rules between keys, which a schema of single keys cannot say.

use super::check::{Path, Problem};
use super::raw::{Config, FactorExchange, LayerEntry, NcclUpdate, Rule, ScheduleShape, TransportChoice};
use crate::device::Choice;
use crate::model::precision::Precision;

/// All rules that the configuration breaks.
pub(super) fn broken(config: &Config) -> Vec<Problem> {
    let mut problems = Vec::new();
    run_and_batch(config, &mut problems);
    parallel(config, &mut problems);
    optimizer_and_schedule(config, &mut problems);
    layers(&config.model.layers, &mut problems);
    problems
}

fn run_and_batch(Config { run, batch, .. }: &Config, problems: &mut Vec<Problem>) {
    if let Some(bad) = unfit_for_a_name(&run.name) {
        problems.push(Problem::value(&Path::dotted("run.name"), format!("run.name {bad}")).help(NAMES));
    }
    if run.epochs.is_none() && run.steps.is_none() && run.target_accuracy.is_none() && run.max_minutes.is_none() {
        problems.push(
            Problem::key(&Path::dotted("run"), "the run has no end")
                .help("give at least one of epochs, steps, target_accuracy, max_minutes; for example: epochs = 10"),
        );
    }
    if run.precision == Precision::Fp16 && run.device != Choice::Cuda {
        problems.push(
            Problem::value(
                &Path::dotted("run.precision"),
                "run.precision = \"fp16\" is for GPUs: run.device = \"cuda\"",
            )
            .help("the CPU computes in f32 and bf16; bf16 has the range of f32, and its loss needs no scaling"),
        );
    }
    match (batch.global, batch.local) {
        (Some(_), Some(_)) => problems.push(
            Problem::key(&Path::dotted("batch.local"), "batch.global and batch.local are both given; keep one")
                .help("global counts the samples of a step over all ranks, local those of one rank"),
        ),
        (None, None) => problems.push(
            Problem::key(&Path::dotted("batch"), "the batch has no size")
                .help("give one of global (samples of a step over all ranks) and local (samples of one rank)")
                .help("for example: global = 128"),
        ),
        _ => {}
    }
}

fn parallel(Config { run, parallel, .. }: &Config, problems: &mut Vec<Problem>) {
    if run.device == Choice::Cuda && parallel.factor_exchange == FactorExchange::On {
        problems.push(
            Problem::value(
                &Path::dotted("parallel.factor_exchange"),
                "parallel.factor_exchange = \"on\" is for ranks that compute on the CPU",
            )
            .help("ranks on GPUs exchange gradients: take it out, or set run.device = \"cpu\""),
        );
    }
    if run.device != Choice::Cuda && parallel.transport == TransportChoice::Nccl {
        problems.push(
            Problem::value(
                &Path::dotted("parallel.transport"),
                "parallel.transport = \"nccl\" is for ranks that compute on GPUs",
            )
            .help("set run.device = \"cuda\", or leave transport out"),
        );
    }
    if parallel.nccl_update == NcclUpdate::Sharded && parallel.transport != TransportChoice::Nccl {
        problems.push(
            Problem::value(
                &Path::dotted("parallel.nccl_update"),
                "parallel.nccl_update = \"sharded\" goes with parallel.transport = \"nccl\"",
            )
            .help("other transports to GPUs update all parameters on each rank; ranks on CPUs always share the update"),
        );
    }
}

fn optimizer_and_schedule(config: &Config, problems: &mut Vec<Problem>) {
    let shared = &config.optimizer.shared;
    for (key, given) in [
        ("optimizer.loss_scale", shared.loss_scale.is_some()),
        ("optimizer.loss_scale_growth_every", shared.loss_scale_growth_every.is_some()),
    ] {
        if given && config.run.precision != Precision::Fp16 {
            problems.push(
                Problem::key(&Path::dotted(key), format!("{key} is for run.precision = \"fp16\""))
                    .help("gradients in f32 and bf16 have range enough: take it out"),
            );
        }
    }
    if let Rule::Sgd { momentum: 0.0, nesterov: true } = config.optimizer.rule {
        problems.push(
            Problem::key(&Path::dotted("optimizer.nesterov"), "optimizer.nesterov needs a momentum")
                .help("for example: momentum = 0.9"),
        );
    }
    let shared = &config.schedule.shared;
    if shared.warmup_epochs > 0.0 && shared.warmup_steps > 0 {
        problems.push(Problem::key(
            &Path::dotted("schedule.warmup_steps"),
            "schedule.warmup_epochs and schedule.warmup_steps are both given; keep one",
        ));
    }
    match &config.schedule.shape {
        ScheduleShape::Step { every_epochs, at_epochs, .. } if every_epochs.is_some() == at_epochs.is_some() => {
            problems.push(
                Problem::key(&Path::dotted("schedule"), "the step schedule takes one of every_epochs and at_epochs")
                    .help("for example: at_epochs = [30, 60, 80]"),
            );
        }
        ScheduleShape::Polynomial { .. } | ScheduleShape::Cosine { .. }
            if config.run.epochs.is_none() && config.run.steps.is_none() =>
        {
            problems.push(
                Problem::value(&Path::dotted("schedule.type"), "this schedule needs to know the length of the run")
                    .help("give run.epochs or run.steps beside the other ends"),
            );
        }
        _ => {}
    }
}

fn layers(layers: &[LayerEntry], problems: &mut Vec<Problem>) {
    for (index, layer) in layers.iter().enumerate() {
        let path = Path::dotted("model.layers").join(index);
        let name = &layer.name;
        let names: Vec<&str> = ["input"].into_iter().chain(layers[..index].iter().map(|l| l.name.as_str())).collect();
        if let Some(bad) = unfit_for_a_name(name) {
            problems.push(Problem::value(&path.join("name"), format!("{}.name {bad}", path)).help(NAMES));
        } else if names.contains(&name.as_str()) {
            let message = match name.as_str() {
                "input" => "`input` is the name of the data; a layer cannot have it".to_owned(),
                _ => format!("two layers are named `{name}`"),
            };
            problems.push(Problem::value(&path.join("name"), message));
        }
        for source in &layer.from {
            if !names.contains(&source.as_str()) {
                let message = match layers[index..].iter().any(|later| later.name == *source) {
                    true => format!("layer `{name}` reads from `{source}`, which is not before it"),
                    false => format!("layer `{name}` reads from `{source}`, which does not exist"),
                };
                let problem = Problem::value(&path.join("from"), message);
                problems.push(problem.allowed("layers before it", source, &names));
            }
        }
    }
}

const NAMES: &str = "names hold letters, digits, `_`, `-` and inner dots: they become file names and checkpoint keys";

fn unfit_for_a_name(name: &str) -> Option<String> {
    let unfit = |c: &char| !(c.is_ascii_alphanumeric() || "_-.".contains(*c));
    if name.is_empty() {
        Some("is empty".into())
    } else if let Some(c) = name.chars().find(unfit) {
        Some(format!("holds {c:?}"))
    } else if name.starts_with('.') || name.ends_with('.') || name.contains("..") {
        Some("has a dot at its edge or two in a row".into())
    } else if name.len() > 128 {
        Some("is longer than 128 characters".into())
    } else {
        None
    }
}
