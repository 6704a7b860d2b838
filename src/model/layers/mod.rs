//! Every layer in a folder of its own, and the registry that finds it by its `type`.
//! Adding a layer: its folder, and one line of `REGISTRY`.

mod activation;
mod add;
mod avg_pool;
mod batch_norm;
#[cfg(test)]
mod bf16_tests;
mod channel_sums;
mod concat;
mod conv2d;
mod dropout;
mod flatten;
mod global_avg_pool;
mod global_max_pool;
mod lanes;
mod linear;
mod lrn;
mod max_pool;
mod softmax;
mod window;

pub use activation::Activation;
use lanes::{check_batch, grid_over_samples, grid_over_tiles, lanes};
pub use linear::factors::{FromFactors, TILE_UNITS};
pub use window::{Axis, NamedPadding, Padding, Window};

use super::{LayerSpec, Shape};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};
use std::sync::Arc;

/// One `type` of `[[model.layers]]`.
pub struct Kind {
    pub name: &'static str,
    /// Parses the layer's own keys (`type`, `name` and `from` already taken out); gives the spec and the keys with their
    /// defaults filled in. The error carries the path of the key.
    pub parse: fn(toml::Table) -> Result<Parsed, serde_path_to_error::Error<toml::de::Error>>,
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

#[derive(Clone)]
pub struct Parsed {
    pub spec: Arc<dyn LayerSpec>,
    pub resolved: toml::Table,
}

const fn kind<T: LayerSpec + Serialize + DeserializeOwned + JsonSchema + 'static>(name: &'static str) -> Kind {
    Kind {
        name,
        parse: |table| {
            let spec: T = serde_path_to_error::deserialize(table)?;
            let resolved = toml::Table::try_from(&spec).expect("a layer's keys can be written as TOML");
            Ok(Parsed { spec: Arc::new(spec), resolved })
        },
        schema: |generator| generator.subschema_for::<T>(),
    }
}

/// All layer types, in the order in which the documentation lists them.
pub static REGISTRY: &[Kind] = &[
    kind::<conv2d::Conv2d>("conv2d"),
    kind::<linear::Linear>("linear"),
    kind::<max_pool::MaxPool>("max_pool"),
    kind::<avg_pool::AvgPool>("avg_pool"),
    kind::<global_avg_pool::GlobalAvgPool>("global_avg_pool"),
    kind::<global_max_pool::GlobalMaxPool>("global_max_pool"),
    kind::<lrn::Lrn>("lrn"),
    kind::<batch_norm::BatchNorm>("batch_norm"),
    kind::<dropout::Dropout>("dropout"),
    kind::<flatten::Flatten>("flatten"),
    kind::<activation::Relu>("relu"),
    kind::<activation::Sigmoid>("sigmoid"),
    kind::<activation::Tanh>("tanh"),
    kind::<softmax::Softmax>("softmax"),
    kind::<add::Add>("add"),
    kind::<concat::Concat>("concat"),
];

pub fn find(name: &str) -> Option<&'static Kind> {
    REGISTRY.iter().find(|kind| kind.name == name)
}

/// The only input of a layer that takes one.
pub(crate) fn single(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [shape] => Ok(*shape),
        _ => Err(format!("takes one input, but `from` names {}", inputs.len())),
    }
}

/// The first of two or more inputs.
pub(crate) fn several(inputs: &[Shape]) -> Result<Shape, String> {
    match inputs {
        [first, _, ..] => Ok(*first),
        _ => Err("takes two or more inputs: name them, from = [\"one\", \"other\"]".to_owned()),
    }
}

/// Whether 32 bits can address every value of one sample's tensor, or of a weight. The kernels' tables need that, and
/// nothing that is computed from sizes so bounded overflows.
pub(crate) fn addressable(what: &str, lengths: &[usize]) -> Result<(), String> {
    let values = lengths.iter().try_fold(1usize, |product, &length| product.checked_mul(length));
    if values.is_some_and(|values| u32::try_from(values).is_ok()) {
        return Ok(());
    }
    let lengths = lengths.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    Err(format!("its {what} would be {lengths}, more than 2^32 values: use smaller sizes"))
}

/// Default of `bias` where a layer has one.
pub(crate) fn yes() -> bool {
    true
}

/// A `bias_init` where there is no bias is a mistake.
pub(crate) fn refuse_unused_bias_init(bias: bool, bias_init: f32) -> Result<(), String> {
    match bias || bias_init == 0.0 {
        true => Ok(()),
        false => Err(format!("bias_init = {bias_init} has no bias to set: take out bias_init, or bias = false")),
    }
}

/// Rows of so many values (or operations) each that make a task worth a thread's while.
pub(crate) fn rows_per_task(row: usize) -> usize {
    (16 * 1024 / row.max(1)).max(1)
}
