//! The JSON schema of the whole file, made from the structs of `raw` and from the layers' registry. It is printed by
//! `trainer schema` for editors, and it is what `check` holds a file against: one truth for both.

use super::raw;
use crate::model::layers;
use schemars::JsonSchema;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value as Json, json};
use std::sync::LazyLock;

/// The schema of a configuration file (JSON Schema draft 7, without references).
pub fn schema() -> &'static Json {
    static SCHEMA: LazyLock<Json> = LazyLock::new(build);
    &SCHEMA
}

/// The keys that belong to `T`.
pub(super) fn keys<T: JsonSchema>() -> Vec<String> {
    let of_type = object::<T>(&mut generator());
    of_type["properties"].as_object().into_iter().flat_map(|properties| properties.keys().cloned()).collect()
}

fn build() -> Json {
    let g = &mut generator();
    let mut sections = json!({
        "run": object::<raw::Run>(g),
        "data": section::<raw::Format, raw::DataShared>(g),
        "batch": object::<raw::BatchSize>(g),
        "model": model(g),
        "loss": with_default(raw::Loss::DEFAULT, object::<raw::Loss>(g)),
        "optimizer": section::<raw::Rule, raw::OptimizerShared>(g),
        "schedule": with_default(raw::ScheduleShape::DEFAULT, section::<raw::ScheduleShape, raw::ScheduleShared>(g)),
        "parallel": object::<raw::Parallel>(g),
        "checkpoint": object::<raw::Checkpoint>(g),
        "eval": object::<raw::Eval>(g),
        "log": object::<raw::Log>(g),
    });
    for format in sections["data"]["oneOf"].as_array_mut().into_iter().flatten() {
        allow_bare_names(&mut format["properties"]["augment"]["items"]);
    }
    let mut whole = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A Lockstep experiment",
        "type": "object",
        "properties": sections,
        "required": ["run", "data", "batch", "model", "optimizer"],
        "additionalProperties": false,
    });
    remove_null(&mut whole);
    whole
}

/// TOML's tables are small and nowhere recursive, so everything stands in its place instead of behind references.
fn generator() -> SchemaGenerator {
    SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true).into_generator()
}

fn object<T: JsonSchema>(g: &mut SchemaGenerator) -> Json {
    g.subschema_for::<T>().to_value()
}

/// A section whose tag (`type`, `format`) brings keys of its own, beside those that all its variants share.
fn section<Tagged: JsonSchema, Shared: JsonSchema>(g: &mut SchemaGenerator) -> Json {
    let shared = object::<Shared>(g);
    let mut tagged = object::<Tagged>(g);
    for variant in tagged["oneOf"].as_array_mut().into_iter().flatten() {
        add_keys(variant, &shared);
    }
    tagged
}

/// Says which variant is meant where a section gives no `type`.
fn with_default(name: &str, mut section: Json) -> Json {
    for variant in section["oneOf"].as_array_mut().into_iter().flatten() {
        if variant["properties"]["type"]["const"] == name
            && let Some(required) = variant["required"].as_array_mut()
        {
            required.retain(|key| key != "type");
        }
    }
    section["default"] = json!({ "type": name });
    section
}

fn model(g: &mut SchemaGenerator) -> Json {
    let of_every_layer = json!({
        "properties": {
            "name": { "type": "string", "description": "Default: its type and number, `conv2d_1`." },
            "from": {
                "description": "Names of the layers (or `input`) that it reads. Default: the one before.",
                "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" }, "minItems": 1 }],
            },
        }
    });
    let kinds = layers::REGISTRY.iter().map(|kind| {
        let mut layer = json!({
            "type": "object",
            "properties": { "type": { "type": "string", "const": kind.name } },
            "required": ["type"],
            "additionalProperties": false,
        });
        let own = (kind.schema)(g).to_value();
        if let Some(description) = own.get("description") {
            layer["description"] = description.clone();
        }
        add_keys(&mut layer, &own);
        add_keys(&mut layer, &of_every_layer);
        layer
    });
    let kinds: Vec<Json> = kinds.collect();
    json!({
        "type": "object",
        "properties": {
            "input": {
                "description": "[H, W, C] of one sample.",
                "type": "array", "minItems": 3, "maxItems": 3, "examples": [[32, 32, 3]],
                "items": { "type": "integer", "minimum": 1, "maximum": 65536 },
            },
            "layers": { "type": "array", "minItems": 1, "items": { "oneOf": kinds } },
        },
        "required": ["input", "layers"],
        "additionalProperties": false,
    })
}

fn add_keys(schema: &mut Json, more: &Json) {
    let empty = Map::new();
    for (key, property) in more["properties"].as_object().unwrap_or(&empty) {
        schema["properties"][key] = property.clone();
    }
    let mut required = schema["required"].as_array().cloned().unwrap_or_default();
    required.extend(more["required"].as_array().into_iter().flatten().cloned());
    schema["required"] = Json::Array(required);
}

/// Lets `{ type = "x" }` be written as `"x"` where `x` requires no other key.
fn allow_bare_names(tagged: &mut Json) {
    let variants = tagged["oneOf"].as_array().cloned().unwrap_or_default();
    let names = variants.iter().filter(|variant| variant["required"] == json!(["type"]));
    let names: Vec<&Json> = names.map(|variant| &variant["properties"]["type"]["const"]).collect();
    *tagged = json!({ "anyOf": [{ "type": "string", "enum": names }, { "oneOf": variants }] });
}

/// TOML has no null: a key that may be absent is simply not required.
fn remove_null(schema: &mut Json) {
    match schema {
        Json::Object(map) => {
            map.retain(|key, value| !(key == "default" && value.is_null()));
            if let Some(Json::Array(types)) = map.get_mut("type") {
                types.retain(|name| name != "null");
                if let [only] = &types[..] {
                    map["type"] = only.clone();
                }
            }
            if let Some(Json::Array(options)) = map.get_mut("anyOf") {
                options.retain(|option| option["type"] != "null");
                if options.len() == 1
                    && let Some(Json::Object(only)) = options.pop()
                {
                    map.remove("anyOf");
                    map.extend(only);
                }
            }
            map.values_mut().for_each(remove_null);
        }
        Json::Array(items) => items.iter_mut().for_each(remove_null),
        _ => {}
    }
}
