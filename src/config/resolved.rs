//! The configuration with every default filled in: what `plan` prints, what the ranks compare, what a checkpoint keeps.

use super::raw::Config;
use serde::Serialize;
use std::collections::BTreeMap;
use toml::{Table, Value};

impl Config {
    /// All sections, in the file's form: loading its text gives the same configuration again.
    pub fn resolved(&self) -> Table {
        let mut whole = Table::new();
        let mut put = |section: &str, parts: &[Table]| {
            let mut keys = Value::Table(parts.iter().flat_map(|part| part.clone()).collect());
            shorten_floats(&mut keys);
            whole.insert(section.to_owned(), keys);
        };
        put("run", &[table(&self.run)]);
        put("data", &[table(&self.data.format), table(&self.data.shared)]);
        put("batch", &[table(&self.batch)]);
        put("model", &[self.resolved_model()]);
        put("loss", &[table(&self.loss)]);
        put("optimizer", &[table(&self.optimizer.rule), table(&self.optimizer.shared)]);
        put("schedule", &[table(&self.schedule.shape), table(&self.schedule.shared)]);
        put("parallel", &[table(&self.parallel)]);
        put("checkpoint", &[table(&self.checkpoint)]);
        put("eval", &[table(&self.eval)]);
        put("log", &[table(&self.log)]);
        whole
    }

    fn resolved_model(&self) -> Table {
        let layers = self.model.layers.iter().map(|layer| {
            let from = layer.from.iter().cloned().map(Value::String).collect::<Vec<_>>();
            let own: [(&str, Value); 3] =
                [("type", layer.kind.into()), ("name", layer.name.clone().into()), ("from", from.into())];
            let own = own.into_iter().map(|(key, value)| (key.to_owned(), value));
            Value::Table(own.chain(layer.parsed.resolved.clone()).collect())
        });
        let input = self.model.input.map(|size| Value::Integer(size as i64));
        Table::from_iter([
            ("input".to_owned(), Value::Array(input.into())),
            ("layers".to_owned(), Value::Array(layers.collect())),
        ])
    }
}

/// The dotted keys in which two resolved configurations differ so that one cannot go on from the other's checkpoint
/// unnoticed. Left out is what may change between two parts of one run: its end, its parallelism, its precision (a
/// checkpoint is f32 in any) with the loss's scale, its device, its housekeeping, and where the data lies.
pub fn difference(a: &Table, b: &Table) -> Vec<String> {
    const FREE: [&str; 24] = [
        "run.name",
        "run.precision",
        "run.device",
        "run.tf32",
        "run.deterministic",
        "run.cuda_graphs",
        "run.numa_binding",
        "run.epochs",
        "run.steps",
        "run.target_accuracy",
        "run.max_minutes",
        "optimizer.loss_scale",
        "optimizer.loss_scale_growth_every",
        "data.path",
        "data.workers",
        "data.prefetch",
        "data.resident",
        "data.on_bad_image",
        "data.max_pixels",
        "data.max_image_bytes",
        "parallel.",
        "checkpoint.",
        "eval.",
        "log.",
    ];
    let (a, b) = (leaves(a), leaves(b));
    let free =
        |key: &str| FREE.iter().any(|free| if free.ends_with('.') { key.starts_with(free) } else { key == *free });
    let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
    let mut differing: Vec<String> = keys.filter(|key| !free(key) && a.get(*key) != b.get(*key)).cloned().collect();
    differing.sort();
    differing
}

fn table(section: &impl Serialize) -> Table {
    Table::try_from(section).expect("a section is a table of TOML's types")
}

/// TOML's floats are doubles: 0.1 in single precision would be written 0.10000000149011612. The shortest text that reads
/// back as the same single is what the user wrote.
fn shorten_floats(value: &mut Value) {
    match value {
        Value::Float(number) if f64::from(*number as f32) == *number => {
            *number = (*number as f32).to_string().parse().unwrap_or(*number);
        }
        Value::Array(items) => items.iter_mut().for_each(shorten_floats),
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| shorten_floats(value)),
        _ => {}
    }
}

/// Every value that is neither a table nor an array, under its dotted key.
pub fn leaves(table: &Table) -> BTreeMap<String, Value> {
    fn walk(value: &Value, key: String, found: &mut BTreeMap<String, Value>) {
        let below = |step: &str| if key.is_empty() { step.to_owned() } else { format!("{key}.{step}") };
        match value {
            Value::Table(table) => table.iter().for_each(|(step, value)| walk(value, below(step), found)),
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(index, value)| walk(value, below(&index.to_string()), found));
            }
            leaf => {
                found.insert(key, leaf.clone());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&Value::Table(table.clone()), String::new(), &mut found);
    found
}
