//! Every layer in a folder of its own, and the registry that finds it by its `type`.
//! Adding a layer: its folder, and one line of `REGISTRY`.

mod activation;

pub use activation::Activation;

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
pub static REGISTRY: &[Kind] =
    &[kind::<activation::Relu>("relu"), kind::<activation::Sigmoid>("sigmoid"), kind::<activation::Tanh>("tanh")];

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
