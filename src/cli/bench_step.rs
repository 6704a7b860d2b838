//! `trainer bench-step`: where the time of a training step goes, by layer and phase.

mod cost;
#[cfg(test)]
mod tests;

use crate::model::precision::Precision;
use crate::train::bench::Measured;
use comfy_table::{CellAlignment, Row, Table, presets};
use cost::{Cost, LayerCost, PHASES, Phase};
use serde_json::{Value, json};
use std::fmt::Write;

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Forward => "forward",
            Phase::BackwardData => "backward data",
            Phase::BackwardWeights => "backward weights",
            Phase::ReduceUpdate => "reduce update",
        }
    }

    /// Whether it is measured by its operations as well as by its bytes.
    fn computes(self) -> bool {
        self != Phase::ReduceUpdate
    }
}

/// For people: times, then rates. `peak_tflops`: the rate of matrix products to hold the step against.
pub fn text(run: &str, measured: &Measured<'_>, peak_tflops: Option<f64>) -> String {
    let layers = LayerCost::of_all(measured);
    let plan = measured.plan;
    let mut text = format!(
        "{run}: {} over {}, {}, {} samples a rank and step, {}\n\n",
        count(plan.ranks, "rank"),
        measured.transport,
        match &measured.gpu {
            None => format!("{} each", count(plan.threads, "thread")),
            Some(gpu) => format!("on {}", gpu.name),
        },
        plan.local_batch,
        match measured.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Fp16 => "fp16",
        },
    );
    let _ = write!(text, "milliseconds of a step on rank 0, medians of {}\n\n", count(measured.steps as usize, "step"));
    let _ = write!(text, "{}\n\n", times(measured, &layers));
    if measured.overlap {
        text.push_str(
            "reduce update: what is left of it after backward; --set parallel.overlap=false shows it whole\n\n",
        );
    }
    if measured.gpu.is_some() {
        text.push_str(
            "reduce update: the update by itself, after these steps, in which it may go on beside backward\n\n",
        );
    }
    let _ = write!(text, "{}\n\n", rates(&layers, measured.gpu.is_some()));
    let _ = writeln!(
        text,
        "{:.1} samples/s over these steps, {} samples a step",
        measured.samples_per_second, plan.global_batch
    );
    let tflop_s = tflop_s(measured, &layers);
    if let Some(peak) = peak_tflops {
        let _ = writeln!(text, "{tflop_s:.2} TFLOP/s, {:.1} % of {peak}", 100.0 * tflop_s / peak);
    }
    if let Some(gpu) = &measured.gpu {
        let [launch, exposed] = [gpu.launch, gpu.exposed].map(|time| 1e3 * time.as_secs_f64());
        let [memory, grown] = [gpu.memory_bytes, gpu.grown_bytes].map(mib);
        let _ = writeln!(
            text,
            "{launch:.2} ms of the host to launch the layers of a step one by one; \
             {exposed:.3} ms of a step the GPU waits for the host\n\
             {memory:.0} MiB of device memory, {grown:.0} of them taken in these steps"
        );
    }
    text
}

fn times(measured: &Measured<'_>, layers: &[LayerCost<'_>]) -> Table {
    let whole = measured.step.as_secs_f64();
    let row = |name: &str, kind: &str, phases: &[Cost], seconds: f64| {
        let mut cells = vec![name.to_owned(), kind.to_owned()];
        cells.extend(phases.iter().map(|phase| milliseconds(phase.seconds)));
        cells.resize(2 + PHASES.len(), String::new());
        cells.extend([milliseconds(seconds), format!("{:.1} %", 100.0 * seconds / whole)]);
        cells
    };
    let mut table = table([&["layer", "type"][..], &PHASES.map(Phase::name), &["sum", "share"]].concat());
    for layer in layers {
        table.add_row(row(&layer.node.name, layer.node.kind, &layer.phases, layer.seconds()));
    }
    let phases = totals(layers);
    let sum: f64 = phases.iter().map(|phase| phase.seconds).sum();
    let data = measured.data.as_secs_f64();
    table.add_row(row("all layers", "", &phases, sum));
    table.add_row(row("waiting for data", "", &[], data));
    // What goes on beside other work counts twice on a GPU.
    table.add_row(row("loss and the rest", "", &[], (whole - sum - data).max(0.0)));
    table.add_row(row("step", "", &[], whole));
    align(&mut table, 2);
    table
}

/// Operations in TFLOP/s where a GPU does them, else in GFLOP/s.
fn rates(layers: &[LayerCost<'_>], on_gpu: bool) -> Table {
    let (unit, gflop) = if on_gpu { ("TFLOP/s", 1e3) } else { ("GFLOP/s", 1.0) };
    let row = |name: &str, phases: &[Cost; PHASES.len()]| {
        let mut cells = vec![name.to_owned()];
        for (phase, cost) in PHASES.iter().zip(phases) {
            cells.extend(phase.computes().then(|| rate(cost.gflop_s().map(|rate| rate / gflop))));
            cells.push(rate(cost.gb_s()));
        }
        cells
    };
    let mut header = vec!["layer".to_owned()];
    for phase in PHASES {
        let name = phase.name();
        match phase.computes() {
            true => header.extend([format!("{name}\n{unit}"), "\nGB/s".to_owned()]),
            false => header.push(format!("{name}\nGB/s")),
        }
    }
    let mut table = table(header);
    for layer in layers {
        table.add_row(row(&layer.node.name, &layer.phases));
    }
    table.add_row(row("all layers", &totals(layers)));
    align(&mut table, 1);
    table
}

/// For programs: one object. `--help` and README say what is in it.
pub fn json(run: &str, measured: &Measured<'_>, peak_tflops: Option<f64>) -> Value {
    let layers = LayerCost::of_all(measured);
    let plan = measured.plan;
    let phases = totals(&layers);
    let sum: f64 = phases.iter().map(|phase| phase.seconds).sum();
    let tflop_s = tflop_s(measured, &layers);
    let mut object = json!({
        "run": run,
        "device": measured.gpu.as_ref().map_or("cpu", |gpu| &gpu.name),
        "ranks": plan.ranks,
        "threads": plan.threads,
        "transport": measured.transport,
        "precision": measured.precision,
        "local_batch": plan.local_batch,
        "global_batch": plan.global_batch,
        "parameters": measured.net.table().trainable(),
        "steps": measured.steps,
        "samples_per_second": measured.samples_per_second,
        "step_ms": 1e3 * measured.step.as_secs_f64(),
        "layers_ms": 1e3 * sum,
        "data_ms": 1e3 * measured.data.as_secs_f64(),
        "tflop_s": tflop_s,
        "phases": by_phase(&phases),
        "layers": layers.iter().map(|layer| json!({
            "name": layer.node.name,
            "type": layer.node.kind,
            "ms": 1e3 * layer.seconds(),
            "phases": by_phase(&layer.phases),
        })).collect::<Vec<_>>(),
    });
    if let Some(peak) = peak_tflops {
        object["mfu"] = json!(tflop_s / peak);
    }
    if let Some(gpu) = &measured.gpu {
        object["launch_ms"] = json!(1e3 * gpu.launch.as_secs_f64());
        object["exposed_ms"] = json!(1e3 * gpu.exposed.as_secs_f64());
        object["device_memory_mib"] = json!(mib(gpu.memory_bytes));
        object["device_memory_growth_mib"] = json!(mib(gpu.grown_bytes));
    }
    object
}

/// Of the layers' forward and backward in the time of the whole step, on one rank.
fn tflop_s(measured: &Measured<'_>, layers: &[LayerCost<'_>]) -> f64 {
    let flops: f64 = totals(layers).iter().map(|phase| phase.flops).sum();
    flops / measured.step.as_secs_f64() / 1e12
}

/// The phases in which something is done.
fn by_phase(costs: &[Cost; PHASES.len()]) -> Value {
    let busy = PHASES.iter().zip(costs).filter(|(_, cost)| cost.is_any());
    let object = busy.map(|(phase, cost)| {
        let mut value = json!({ "ms": 1e3 * cost.seconds });
        if phase.computes() {
            value["gflop"] = json!(cost.flops / 1e9);
            value["gflop_s"] = json!(cost.gflop_s());
        }
        if cost.bytes > 0.0 {
            value["gb"] = json!(cost.bytes / 1e9);
            value["gb_s"] = json!(cost.gb_s());
        }
        (phase.name().replace(' ', "_"), value)
    });
    Value::Object(object.collect())
}

fn totals(layers: &[LayerCost<'_>]) -> [Cost; PHASES.len()] {
    std::array::from_fn(|phase| layers.iter().fold(Cost::default(), |sum, layer| sum + layer.phases[phase]))
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn milliseconds(seconds: f64) -> String {
    if seconds == 0.0 { String::new() } else { format!("{:.2}", 1e3 * seconds) }
}

fn rate(rate: Option<f64>) -> String {
    rate.map(|rate| format!("{rate:.1}")).unwrap_or_default()
}

fn table(header: impl Into<Row>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// The first columns to the left, the numbers to the right.
fn align(table: &mut Table, names: usize) {
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index >= names {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
