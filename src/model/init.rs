//! `init = "..."` of a layer with weights: how far its first weights are spread, from how many values meet in a sum.

use super::params::Init;
use schemars::{JsonSchema, Schema};
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// How a weight is initialised. In the TOML a bare name, `init = "he_normal"`, or a table with the rule's own keys,
/// `init = { type = "normal", std = 0.02 }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(remote = "Self", tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[schemars(transform = also_by_name)]
pub enum Initializer {
    Zeros {},
    /// Normal with standard deviation `std`; Krizhevsky et al. 2012 used 0.01.
    Normal {
        #[serde(default = "default_std")]
        #[schemars(range(min = 0))]
        std: f32,
    },
    /// Uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010): for sigmoid and tanh.
    XavierUniform {},
    /// Normal with variance 2 / (fan_in + fan_out).
    XavierNormal {},
    /// Uniform in +-sqrt(6 / fan_in) (He et al. 2015): for ReLU.
    HeUniform {},
    /// Normal with variance 2 / fan_in.
    HeNormal {},
}

/// Keeps the variance of activations through layers of ReLUs.
impl Default for Initializer {
    fn default() -> Self {
        Initializer::HeNormal {}
    }
}

fn default_std() -> f32 {
    0.01
}

impl Initializer {
    /// The distribution for a weight of which `fan_in` values meet in one output, and one input reaches `fan_out`
    /// outputs. For a convolution: C/groups * KH * KW, and F/groups * KH * KW.
    pub fn resolve(&self, fan_in: usize, fan_out: usize) -> Init {
        let (fan_in, fan_sum) = (fan_in as f32, (fan_in + fan_out) as f32);
        match *self {
            Initializer::Zeros {} => Init::Constant(0.0),
            Initializer::Normal { std } => Init::Normal { std },
            Initializer::XavierUniform {} => Init::Uniform { bound: (6.0 / fan_sum).sqrt() },
            Initializer::XavierNormal {} => Init::Normal { std: (2.0 / fan_sum).sqrt() },
            Initializer::HeUniform {} => Init::Uniform { bound: (6.0 / fan_in).sqrt() },
            Initializer::HeNormal {} => Init::Normal { std: (2.0 / fan_in).sqrt() },
        }
    }
}

// `remote = "Self"` makes the derived code inherent functions, so that the trait can accept a bare name as well.

impl Serialize for Initializer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Initializer::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Initializer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameOrTable;
        impl<'de> Visitor<'de> for NameOrTable {
            type Value = Initializer;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an initialiser's name, or a table with its `type`")
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Initializer, E> {
                Initializer::deserialize(MapDeserializer::new(std::iter::once(("type", name))))
            }
            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Initializer, A::Error> {
                Initializer::deserialize(MapAccessDeserializer::new(table))
            }
        }
        deserializer.deserialize_any(NameOrTable)
    }
}

/// Adds the bare names to the schema of the tables.
fn also_by_name(schema: &mut Schema) {
    let Some(serde_json::Value::Array(variants)) = schema.get_mut("oneOf") else { return };
    let names: Vec<_> = variants.iter().map(|variant| variant["properties"]["type"]["const"].clone()).collect();
    variants.push(serde_json::json!({ "type": "string", "enum": names }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Section {
        init: Initializer,
    }

    fn parse(text: &str) -> Result<Initializer, String> {
        toml::from_str::<Section>(text).map(|section| section.init).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_name_or_a_table_is_read_and_written_back() {
        let cases = [
            (r#"init = "zeros""#, Initializer::Zeros {}),
            (r#"init = "normal""#, Initializer::Normal { std: 0.01 }),
            (r#"init = { type = "normal", std = 0.02 }"#, Initializer::Normal { std: 0.02 }),
            (r#"init = "xavier_uniform""#, Initializer::XavierUniform {}),
            (r#"init = { type = "he_normal" }"#, Initializer::HeNormal {}),
        ];
        for (text, init) in cases {
            assert_eq!(parse(text), Ok(init), "{text}");
            assert_eq!(parse(&toml::to_string(&Section { init }).unwrap()), Ok(init), "{text} written back");
        }
    }

    #[test]
    fn a_wrong_name_or_key_says_what_is_allowed() {
        let error = parse(r#"init = "he""#).unwrap_err();
        assert!(error.contains("unknown variant `he`") && error.contains("`he_uniform`, `he_normal`"), "{error}");
        let error = parse(r#"init = { type = "he_normal", std = 1 }"#).unwrap_err();
        assert!(error.contains("unknown field `std`"), "{error}");
        let error = parse("init = 3").unwrap_err();
        assert!(error.contains("an initialiser's name"), "{error}");
    }

    #[test]
    fn variances_are_those_of_the_papers() {
        let variance = |init: Initializer| match init.resolve(200, 100) {
            Init::Constant(_) => 0.0,
            Init::Normal { std } => std * std,
            Init::Uniform { bound } => bound * bound / 3.0,
        };
        let cases = [
            (Initializer::Zeros {}, 0.0),
            (Initializer::Normal { std: 0.5 }, 0.25),
            (Initializer::XavierUniform {}, 2.0 / 300.0),
            (Initializer::XavierNormal {}, 2.0 / 300.0),
            (Initializer::HeUniform {}, 2.0 / 200.0),
            (Initializer::HeNormal {}, 2.0 / 200.0),
        ];
        for (init, expected) in cases {
            assert!((variance(init) - expected).abs() < 1e-7, "{init:?}");
        }
    }

    #[test]
    fn the_schema_lists_the_bare_names() {
        let schema = serde_json::to_string(&schemars::schema_for!(Initializer)).unwrap();
        let names = r#""enum":["zeros","normal","xavier_uniform","xavier_normal","he_uniform","he_normal"]"#;
        assert!(schema.contains(names), "{schema}");
    }
}
