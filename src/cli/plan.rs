//! `trainer plan`: what a run on N ranks would compute, hold and send, without running it.

use super::bytes;
use crate::config::plan::{Cadence, Plan, Ranks, Samples};
use crate::config::raw::{Config, NcclUpdate, Resident, TransportChoice};
use crate::data::augment;
use crate::device::{self, Place};
use crate::error::{Error, Result};
use crate::model::params::{ParamTable, Role};
use crate::model::precision::Precision;
use crate::model::spec::{NetSpec, Node};
use crate::optim;
use crate::train::factors::{self, Estimate};
use crate::train::gpus;
use crate::train::memory::{Bill, Need};
use crate::train::setup::{Parts, checked_plan};
use crate::train::update::needs_norms;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::fmt::Write;

pub fn describe(config: &Config, ranks: usize, hosts: usize) -> Result<String> {
    if hosts > ranks {
        return Err(Error::usage(format!("--hosts {hosts}: {ranks} ranks are on {ranks} hosts at most")));
    }
    let resolved = config.resolved();
    let config = &gpus::settle_here(config);
    let net = NetSpec::new(&config.model)?;
    let parts = Parts::open(config)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let plan =
        checked_plan(config, &net, &parts, Ranks { size: ranks, threads: (cores / ranks.div_ceil(hosts)).max(1) })?;
    let params = ParamTable::new(&net);
    let memory = Memory { precision: config.run.precision, batch: plan.micro_batch };

    let mut text = format!("# Configuration, defaults filled in\n\n{resolved}");
    let _ = write!(text, "\n# Layers\n\n{}\n\n{}", layers(&net, &memory), totals(&net, &params, &plan, &memory));
    let whole = needs_norms(&config.optimizer) || device::choose(config.run.device) == Place::Cuda;
    let estimates = factors::estimate(&config.parallel, &net, &plan, hosts, whole);
    if hosts > 1 && !estimates.is_empty() {
        let _ = write!(
            text,
            "\n# Linear layers: what a host sends in a step, and how long it takes\n\n{}",
            exchange(config, &net, &estimates)
        );
    }
    let chosen = |node| estimates.iter().any(|estimate| estimate.node == node && estimate.chosen);
    let over_nccl = ranks > 1 && may_use_nccl(config);
    let bucket_bytes = if over_nccl { plan.nccl_bucket_bytes } else { plan.bucket_bytes };
    let buckets = buckets(&params, bucket_bytes, chosen);
    let _ = write!(text, "\n# Buckets, in the order in which backward fills them\n\n{buckets}\n");
    let _ = write!(text, "\n# A step and rank\n\n{}", traffic(config, &params, &plan));
    if device::choose(config.run.device) == Place::Cuda {
        let bill = Need::new(config, &plan, parts.samples(), true)?.bill();
        let _ = write!(text, "\n# Device memory of a rank\n\n{}", device_memory(&bill));
    }
    let _ = write!(text, "\n# The run\n\n{}{}", run(&plan, parts.samples()), images(config, &net, &plan, &parts));
    Ok(text)
}

/// What decides how large activations are: the type of their values, and the samples of a pass.
struct Memory {
    precision: Precision,
    batch: usize,
}

impl Memory {
    fn activation_bytes(&self, node: &Node) -> usize {
        let inferred = &node.inferred;
        (inferred.output.len() * self.precision.bytes() + inferred.saved_bytes) * self.batch
            + inferred.saved_bytes_fixed
    }
}

fn layers(net: &NetSpec, memory: &Memory) -> Table {
    let activations = format!("activations of {}", memory.batch);
    let mut table = table(&["layer", "type", "output", "parameters", "MFLOP a sample", &activations]);
    for node in &net.nodes {
        table.add_row([
            node.name.clone(),
            node.kind.to_owned(),
            node.inferred.output.to_string(),
            trainable(node).to_string(),
            format!("{:.3}", flops(net, node) as f64 / 1e6),
            bytes(memory.activation_bytes(node)),
        ]);
    }
    right_align(&mut table, 3..6);
    table
}

fn totals(net: &NetSpec, params: &ParamTable, plan: &Plan, memory: &Memory) -> String {
    let flops: u64 = net.nodes.iter().map(|node| flops(net, node)).sum();
    let activations = net.nodes.iter().map(|node| memory.activation_bytes(node)).sum();
    format!(
        "parameters   {} ({} trainable, {})\n\
         compute      {:.3} MFLOP a sample forward and backward, {:.3} GFLOP a step and rank\n\
         activations  {} a rank before memory is shared\n",
        params.params.iter().map(|param| param.spec.len()).sum::<usize>(),
        params.trainable(),
        bytes(params.len() * size_of::<f32>()),
        flops as f64 / 1e6,
        flops as f64 * plan.local_batch as f64 / 1e9,
        bytes(activations),
    )
}

/// The cost model of `[parallel] factor_exchange`.
fn exchange(config: &Config, net: &NetSpec, estimates: &[Estimate]) -> String {
    let mut table = table(&["layer", "gradient", "factors", "gradient ms", "factors ms", "exchanged"]);
    for estimate in estimates {
        table.add_row([
            net.nodes[estimate.node].name.clone(),
            bytes(estimate.gradient_bytes),
            bytes(estimate.factor_bytes),
            format!("{:.1}", estimate.gradient_s * 1e3),
            format!("{:.1}", estimate.factors_s * 1e3),
            (if estimate.chosen { "factors" } else { "gradient" }).to_owned(),
        ]);
    }
    right_align(&mut table, 1..5);
    let link = config.parallel.network_gbit_s;
    format!("{table}\n\nat {link} Gbit/s (parallel.network_gbit_s), the products that factors take included\n")
}

fn buckets(params: &ParamTable, bucket_bytes: usize, apart: impl Fn(usize) -> bool) -> Table {
    let mut table = table(&["bucket", "bytes", "parameters"]);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(100);
    for (number, bucket) in params.buckets(bucket_bytes, apart).into_iter().enumerate() {
        let inside = params.params.iter().filter(|param| bucket.contains(&param.range.start));
        let names: Vec<&str> = inside.map(|param| param.name.as_str()).collect();
        table.add_row([number.to_string(), (bucket.len() * size_of::<f32>()).to_string(), names.join(" ")]);
    }
    right_align(&mut table, 0..2);
    table
}

fn device_memory(bill: &Bill) -> String {
    let mut table = table(&["what", "bytes"]);
    for (what, count) in &bill.rows {
        table.add_row([(*what).to_owned(), count.to_string()]);
    }
    right_align(&mut table, 1..2);
    format!(
        "{table}\n\n\
         total        {}\n\
         workspaces   {} more at most: cuDNN's and cuBLASLt's algorithms are chosen on the GPU\n\
         CUDA         some hundred MiB for itself, and so takes NCCL\n",
        bytes(bill.total()),
        bytes(bill.workspaces)
    )
}

/// What reducing and updating P bytes of parameters over N ranks holds and moves, with S values of state a parameter: each
/// rank has the state of 1/N of the parameters, in shared memory reads the gradients of all ranks for these, and reads and
/// writes these parameters and their state, (N + 2 + 2 S) P / N; over tcp it sends (N - 1) / N P of gradients and as much of
/// parameters.
fn traffic(config: &Config, params: &ParamTable, plan: &Plan) -> String {
    let (gradients, ranks) = (params.len() * size_of::<f32>(), plan.ranks);
    let states = optim::new(&config.optimizer).state();
    let names = if states.is_empty() { "none".to_owned() } else { states.join(", ") };
    let state = states.len() * gradients;
    if device::choose(config.run.device) == Place::Cuda {
        let bus = if ranks > 1 && config.parallel.transport != TransportChoice::Nccl { 2 * gradients } else { 0 };
        let held = match config.parallel.nccl_update {
            NcclUpdate::Replicated => format!("{}, the optimizer's ({names}), on every rank", bytes(state)),
            NcclUpdate::Sharded => format!("{} of {}, the optimizer's ({names})", bytes(state / ranks), bytes(state)),
        };
        return format!(
            "gradients    {}\n\
             state        {held}\n\
             bus          {} between the GPU and host memory, where the ranks sum if not by NCCL\n",
            bytes(gradients),
            bytes(bus)
        );
    }
    let shm = gradients + 2 * (gradients + state) / ranks;
    let tcp = 2 * gradients * (ranks - 1) / ranks;
    format!(
        "gradients    {}\n\
         state        {} of {}, the optimizer's ({names})\n\
         shm          {} read and written in memory to reduce and update; one copy of the parameters a host\n\
         tcp          {} sent, and as much received; the parameters on every rank\n",
        bytes(gradients),
        bytes(state / ranks),
        bytes(state),
        bytes(shm),
        bytes(tcp)
    )
}

/// `auto` may find that it is not there.
fn may_use_nccl(config: &Config) -> bool {
    let chosen = match config.parallel.transport {
        TransportChoice::Nccl => true,
        TransportChoice::Auto => !config.parallel.allow_shared_gpu,
        _ => false,
    };
    chosen && device::choose(config.run.device) == Place::Cuda
}

fn run(plan: &Plan, samples: Samples) -> String {
    let steps = plan.total_steps.map_or("until target accuracy or time".to_owned(), |steps| steps.to_string());
    format!(
        "ranks        {}, each with {} of the threads here\n\
         samples      {} train, {} validation, {} test\n\
         batch        {} global, {} a rank, in {} of {}\n\
         steps        {} an epoch, {steps} in all, {} of warm-up\n\
         evaluate     {}\n\
         checkpoint   {}\n\
         log          every {} steps\n",
        plan.ranks,
        plan.threads,
        samples.train,
        samples.validation,
        samples.test,
        plan.global_batch,
        plan.local_batch,
        plan.micros_per_rank,
        plan.micro_batch,
        plan.steps_per_epoch,
        plan.warmup_steps,
        cadence(plan.eval),
        cadence(plan.checkpoint),
        plan.log_every_steps,
    )
}

/// How images get to a GPU.
fn images(config: &Config, net: &NetSpec, plan: &Plan, parts: &Parts) -> String {
    if device::choose(config.run.device) == Place::Host {
        return String::new();
    }
    let data = &config.data.shared;
    let pixels = |samples: usize| bytes(samples * net.input.len());
    let all = pixels(parts.samples().train);
    match data.resident {
        Resident::On => format!("images       all in the GPU's memory, {all} of pixels for training\n"),
        Resident::Auto if !augment::scales(&data.augment, parts.train.shape(), net.input) => {
            format!(
                "images       in the GPU's memory where they take at most a tenth of what is free, {all} of pixels for \
                 training\n"
            )
        }
        _ => format!("images       sent to the GPU, {} of pixels a batch\n", pixels(plan.micro_batch)),
    }
}

fn trainable(node: &Node) -> usize {
    node.inferred.params.iter().filter(|param| param.role == Role::Trainable).map(|param| param.len()).sum()
}

/// Forward, and the same again for the gradient by the parameters and for the gradient by the inputs, where needed.
fn flops(net: &NetSpec, node: &Node) -> u64 {
    let by_params = u64::from(trainable(node) > 0);
    let by_inputs = u64::from(node.inputs.iter().any(|&input| net.needs_gradient(input)));
    node.inferred.forward_flops * (1 + by_params + by_inputs)
}

fn cadence(cadence: Cadence) -> String {
    let periods: Vec<u64> = [cadence.every_steps, cadence.every_epochs_steps].into_iter().flatten().collect();
    let every: Vec<String> = periods.iter().map(|steps| format!("every {steps} steps")).collect();
    format!("{}, and at the end", every.join(" and "))
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

fn right_align(table: &mut Table, columns: std::ops::Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
