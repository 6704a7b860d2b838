//! README's reference of the configuration against the schema, which is made from the code: every key and every variant is
//! there with its default, and nothing is there that is not in the schema.

use serde_json::Value as Json;
use std::collections::BTreeSet;

#[test]
fn readme_has_every_key_with_its_default() {
    let schema = lockstep::config::schema();
    let mut missing = Vec::new();
    for (section, keys) in schema["properties"].as_object().unwrap() {
        let text = reference(section);
        for (key, default) in keys_of(keys) {
            if !mentions(&text, &key, default.as_ref()) {
                let with = default.map_or(String::new(), |default| format!(", default `{default}`"));
                missing.push(format!("[{section}] `{key}`{with}"));
            }
        }
    }
    assert!(missing.is_empty(), "README.md's reference lacks: {missing:#?}");
}

#[test]
fn readme_has_every_layer_with_its_keys() {
    let schema = lockstep::config::schema();
    let layers = &schema["properties"]["model"]["properties"]["layers"]["items"]["oneOf"];
    let text = reference("layers");
    let mut missing = Vec::new();
    for layer in layers.as_array().unwrap() {
        let kind = layer["properties"]["type"]["const"].as_str().unwrap();
        let row = text.lines().find(|line| line.starts_with(&format!("| `{kind}` |"))).unwrap_or_default();
        for (key, default) in keys_of(layer) {
            let common = ["type", "name", "from"].contains(&key.as_str());
            if !mentions(if common { &text } else { row }, &key, default.as_ref()) {
                missing.push(format!("{kind}: `{key}`{}", default.map_or(String::new(), |d| format!(" = `{d}`"))));
            }
        }
    }
    assert!(missing.is_empty(), "README.md's table of layers lacks: {missing:#?}");
}

#[test]
fn readme_names_no_key_that_is_gone() {
    let schema = lockstep::config::schema();
    for (section, keys) in schema["properties"].as_object().unwrap() {
        let known = names_of(keys);
        for line in reference(section).lines() {
            let Some(name) = line.strip_prefix("| `").and_then(|rest| rest.split('`').next()) else { continue };
            assert!(
                name == "type" || known.contains(name),
                "README.md's [{section}] names `{name}`, which is not in the schema"
            );
        }
    }
}

/// README's text on one section, up to the next heading.
fn reference(section: &str) -> String {
    let readme = include_str!("../README.md");
    let heading = if section == "layers" { "### Layers\n".into() } else { format!("### `[{section}]`\n") };
    let start = readme.find(&heading).unwrap_or_else(|| panic!("README.md has no heading {heading}")) + heading.len();
    let text = &readme[start..];
    text[..text.find("\n##").unwrap_or(text.len())].to_owned()
}

/// Whether the text has the key in backquotes and, if the key has a default, that default.
fn mentions(text: &str, key: &str, default: Option<&Json>) -> bool {
    match default {
        None => text.contains(&format!("`{key}`")),
        Some(default) => documented_defaults(text, key).any(|found| same(&found, default)),
    }
}

/// Defaults stand after the key, "`key` = `default`", or in the third cell of its row, "| `key` | type | `default` |".
fn documented_defaults<'a>(text: &'a str, key: &str) -> impl Iterator<Item = Json> + 'a {
    let (inline, row) = (format!("`{key}` = `"), format!("| `{key}` |"));
    text.lines().filter_map(move |line| {
        let (_, after) = line.split_once(&inline).or_else(|| line.strip_prefix(&row)?.split_once("| `"))?;
        serde_json::from_str(after.split('`').next()?).ok()
    })
}

/// Equal, numbers as f32: the schema has 0.1 as the f32 that is nearest to it. A bare name is short for a table of that
/// type.
fn same(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::String(name), Json::Object(table)) => {
            table.len() == 1 && table.get("type") == Some(&Json::from(&**name))
        }
        (Json::Array(a), Json::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b || a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| a as f32 == b as f32),
    }
}

/// The keys of a section or layer, over all its variants, with their defaults.
fn keys_of(schema: &Json) -> Vec<(String, Option<Json>)> {
    let variants = schema["oneOf"].as_array().into_iter().flatten();
    std::iter::once(schema)
        .chain(variants)
        .filter_map(|variant| variant["properties"].as_object())
        .flatten()
        .map(|(key, property)| (key.clone(), property.get("default").cloned()))
        .collect()
}

/// Every name that a schema knows: keys, tags and the words of enumerations, at any depth.
fn names_of(schema: &Json) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    match schema {
        Json::Object(map) => {
            if let Some(properties) = map.get("properties").and_then(Json::as_object) {
                names.extend(properties.keys().cloned());
            }
            names.extend(map.get("const").and_then(Json::as_str).map(str::to_owned));
            names.extend(map.values().flat_map(names_of));
        }
        Json::Array(items) => names.extend(items.iter().flat_map(names_of)),
        Json::String(word) => _ = names.insert(word.clone()),
        _ => {}
    }
    names
}
