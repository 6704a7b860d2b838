//! Reads a file into `raw::Config`: text to table, `--set`, schema, sections, and the rules that hold between keys.

use super::check::{Path, Problem, check};
use super::raw::{self, Config};
use super::rules;
use super::schema::{keys, schema};
use super::source::Source;
use crate::error::Result;
use crate::model::layers;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Reads the experiment at `path` and changes it by `sets`, each `KEY=VALUE`. An error (of kind `Usage`) shows every
/// mistake with its line.
pub fn load(path: &std::path::Path, sets: &[String]) -> Result<Config> {
    let (source, table) = Source::read(path, sets)?;
    read(table).map_err(|problems| source.explain(&problems))
}

pub(super) fn read(table: Table) -> Result<Config, Vec<Problem>> {
    let value = Value::Table(table);
    let mut problems = Vec::new();
    check(schema(), &value, &Path::default(), &mut problems);
    if !problems.is_empty() {
        return Err(problems);
    }
    let config = sections(value).map_err(|problem| vec![problem])?;
    match rules::broken(&config) {
        problems if problems.is_empty() => Ok(config),
        problems => Err(problems),
    }
}

fn sections(file: Value) -> Result<Config, Problem> {
    let Value::Table(mut file) = file else { return Err(Problem::value(&Path::default(), "a file is a table")) };
    let mut take = |section: &str| match file.remove(section) {
        Some(Value::Table(table)) => (table, Path::dotted(section)),
        _ => (Table::new(), Path::dotted(section)),
    };
    let (data, data_path) = take("data");
    let (format, shared) = tagged(with_tagged_augment(data), &data_path)?;
    let data = raw::Data { format, shared };

    let (optimizer, path) = take("optimizer");
    let (rule, shared) = tagged(optimizer, &path)?;
    let optimizer = raw::Optimizer { rule, shared };

    let (schedule, path) = take("schedule");
    let (shape, shared) = tagged(with_default_type(schedule, raw::ScheduleShape::DEFAULT), &path)?;
    let schedule = raw::Schedule { shape, shared };

    let (loss, path) = take("loss");
    let loss = section((with_default_type(loss, raw::Loss::DEFAULT), path))?;

    let mut config = Config {
        run: section(take("run"))?,
        data,
        batch: section(take("batch"))?,
        model: model(take("model"))?,
        loss,
        optimizer,
        schedule,
        parallel: section(take("parallel"))?,
        checkpoint: section(take("checkpoint"))?,
        eval: section(take("eval"))?,
        log: section(take("log"))?,
    };
    for (every_steps, every_epochs) in [
        (config.checkpoint.every_steps, &mut config.checkpoint.every_epochs),
        (config.eval.every_steps, &mut config.eval.every_epochs),
    ] {
        if every_steps.is_none() {
            every_epochs.get_or_insert(1);
        }
    }
    Ok(config)
}

fn section<T: DeserializeOwned>((table, path): (Table, Path)) -> Result<T, Problem> {
    serde_path_to_error::deserialize(Value::Table(table)).map_err(|error| misread(&path, &error))
}

/// A section whose tag brings keys of its own (`Tagged`) beside those that all its variants share (`Shared`).
fn tagged<Tagged, Shared>(table: Table, path: &Path) -> Result<(Tagged, Shared), Problem>
where
    Tagged: DeserializeOwned,
    Shared: DeserializeOwned + JsonSchema,
{
    let shared = keys::<Shared>();
    let (shared, own): (Table, Table) = table.into_iter().partition(|(key, _)| shared.contains(key));
    Ok((section((own, path.clone()))?, section((shared, path.clone()))?))
}

fn with_default_type(mut table: Table, default: &str) -> Table {
    table.entry("type").or_insert_with(|| Value::String(default.to_owned()));
    table
}

/// Writes `"horizontal_flip"` as `{ type = "horizontal_flip" }`.
fn with_tagged_augment(mut data: Table) -> Table {
    for step in data.get_mut("augment").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::String(name) = step {
            *step = Value::Table(with_default_type(Table::new(), name));
        }
    }
    data
}

fn model((mut table, path): (Table, Path)) -> Result<raw::Model, Problem> {
    let Some(Value::Array(items)) = table.remove("layers") else {
        return Err(Problem::key(&path, "model.layers is missing"));
    };
    let input = table.remove("input").unwrap_or(Value::Array(Vec::new()));
    let input = serde_path_to_error::deserialize(input).map_err(|error| misread(&path.join("input"), &error))?;
    let path = path.join("layers");
    let mut layers: Vec<raw::LayerEntry> = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let before = layers.last().map_or("input", |layer| &layer.name);
        layers.push(layer(item, index, before, &path.join(index))?);
    }
    Ok(raw::Model { input, layers })
}

fn layer(item: Value, index: usize, before: &str, path: &Path) -> Result<raw::LayerEntry, Problem> {
    let name = layer_name(&item, index);
    let Value::Table(mut keys) = item else { return Err(Problem::value(path, "a layer is a table")) };
    let kind = keys.remove("type").and_then(|name| layers::find(name.as_str()?));
    let kind = kind.ok_or_else(|| Problem::key(path, "this layer has no known type"))?;
    keys.remove("name");
    let from = match keys.remove("from") {
        None => vec![before.to_owned()],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Some(name) => name.as_str().map(str::to_owned).into_iter().collect(),
    };
    let parsed = (kind.parse)(keys).map_err(|error| misread(path, &error))?;
    Ok(raw::LayerEntry { name, kind: kind.name, from, parsed })
}

/// The layer's own name, or its type and its number counted over all layers from 1.
pub(super) fn layer_name(layer: &Value, index: usize) -> String {
    let text = |key| layer.get(key).and_then(Value::as_str);
    match (text("name"), text("type")) {
        (Some(name), _) => name.to_owned(),
        (None, Some(kind)) => format!("{kind}_{}", index + 1),
        (None, None) => String::new(),
    }
}

/// What the schema let pass and serde did not.
fn misread(section: &Path, error: &serde_path_to_error::Error<toml::de::Error>) -> Problem {
    use serde_path_to_error::Segment;
    let mut path = section.clone();
    for segment in error.path() {
        match segment {
            Segment::Map { key } => path = path.join(key),
            Segment::Seq { index } => path = path.join(index),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    Problem::value(&path, format!("{path}: {}", error.inner().message()))
}
