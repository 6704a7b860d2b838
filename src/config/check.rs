//! Holds a file's values against the schema and collects everything that is wrong, in words made for people. Serde
//! reads the file afterwards; its own errors know neither the key inside a tagged table nor what would be allowed.

use serde_json::{Value as Json, json};
use std::fmt;
use toml::{Table, Value};

/// What is wrong, and where.
#[derive(Debug)]
pub(super) struct Problem {
    pub path: Path,
    pub message: String,
    /// What is allowed, what was probably meant: a line each.
    pub help: Vec<String>,
    /// Whether the key itself is wrong, not its value.
    pub at_key: bool,
}

impl Problem {
    pub fn value(path: &Path, message: impl Into<String>) -> Self {
        Problem { path: path.clone(), message: message.into(), help: Vec::new(), at_key: false }
    }
    pub fn key(path: &Path, message: impl Into<String>) -> Self {
        Problem { at_key: true, ..Self::value(path, message) }
    }
    pub fn help(mut self, line: impl Into<String>) -> Self {
        self.help.push(line.into());
        self
    }
    /// Lists what is allowed and says what `found` was probably meant to be.
    pub fn allowed(self, what: &str, found: &str, allowed: &[&str]) -> Self {
        let problem = self.help(format!("{what}: {}", allowed.join(", ")));
        match nearest(found, allowed) {
            Some(near) => problem.help(format!("did you mean `{near}`?")),
            None => problem,
        }
    }
}

/// Keys and array places from the top of the file; written `model.layers.2.filters`, as `--set` takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Path(pub Vec<String>);

impl Path {
    pub fn dotted(path: &str) -> Path {
        Path(path.split('.').map(str::to_owned).collect())
    }
    pub fn join(&self, key: impl ToString) -> Path {
        Path(self.0.iter().cloned().chain([key.to_string()]).collect())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

pub(super) fn check(schema: &Json, value: &Value, path: &Path, problems: &mut Vec<Problem>) {
    if let (Some(choices), Value::String(found)) = (choices(schema), value) {
        if !choices.contains(&found.as_str()) {
            let message = format!("{path} = \"{found}\" is not known");
            problems.push(Problem::value(path, message).allowed("allowed", found, &choices));
        }
    } else if let Some(options) = options(schema) {
        check_options(schema, options, value, path, problems);
    } else {
        match (schema["type"].as_str(), value) {
            (Some("object"), Value::Table(table)) => check_table(schema, table, path, problems),
            (Some("array"), Value::Array(items)) => check_array(schema, items, path, problems),
            (Some("integer"), Value::Integer(number)) => check_number(schema, *number as f64, value, path, problems),
            (Some("number"), Value::Integer(number)) => check_number(schema, *number as f64, value, path, problems),
            (Some("number"), Value::Float(number)) => check_number(schema, *number, value, path, problems),
            _ if accepts(schema, value) => {}
            _ => problems.push(unexpected(schema, value, path)),
        }
    }
}

fn check_table(schema: &Json, table: &Table, path: &Path, problems: &mut Vec<Problem>) {
    let properties = schema["properties"].as_object().into_iter().flatten();
    let allowed: Vec<&str> = properties.clone().map(|(key, _)| key.as_str()).collect();
    for (key, value) in table {
        let here = path.join(key);
        if allowed.contains(&key.as_str()) {
            check(&schema["properties"][key], value, &here, problems);
        } else if schema["additionalProperties"] == false {
            problems.push(unknown_key(schema, key, &here, &allowed));
        }
    }
    // A required key that is there misspelled has been reported as that.
    let misspelled =
        |key: &str| table.keys().any(|k| !allowed.contains(&k.as_str()) && nearest(k, &allowed) == Some(key));
    for key in schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str) {
        if !table.contains_key(key) && !misspelled(key) {
            let missing = if path.0.is_empty() { format!("section [{key}]") } else { path.join(key).to_string() };
            let example = example(key, &schema["properties"][key], path.0.is_empty());
            problems.push(Problem::key(path, format!("{missing} is missing")).help(format!("for example: {example}")));
        }
    }
}

fn unknown_key(schema: &Json, key: &str, here: &Path, allowed: &[&str]) -> Problem {
    let section = Path(here.0[..here.0.len() - 1].to_vec());
    if section.0.is_empty() {
        return Problem::key(here, format!("unknown section [{key}]")).allowed("sections", key, allowed);
    }
    let tag = ["type", "format"].into_iter().find_map(|tag| Some((tag, schema["properties"][tag]["const"].as_str()?)));
    let of = tag.map_or(String::new(), |(tag, name)| format!(" with {tag} = \"{name}\""));
    let what = format!("allowed in {section}{of}");
    Problem::key(here, format!("unknown key {here}")).allowed(&what, key, allowed)
}

/// One of several tables that differ by their tag, or one of several types.
fn check_options(schema: &Json, options: &[Json], value: &Value, path: &Path, problems: &mut Vec<Problem>) {
    if let (Some(tag), Value::Table(table)) = (tag(options), value) {
        return check_tagged(schema, tag, table, path, problems);
    }
    let fitting = options.iter().filter(|option| accepts(option, value));
    let attempts = fitting.map(|option| {
        let mut found = Vec::new();
        check(option, value, path, &mut found);
        found
    });
    match attempts.min_by_key(Vec::len) {
        Some(found) => problems.extend(found),
        None => problems.push(unexpected(schema, value, path)),
    }
}

fn check_tagged(schema: &Json, tag: &str, table: &Table, path: &Path, problems: &mut Vec<Problem>) {
    let here = path.join(tag);
    let variants =
        || options(schema).into_iter().flatten().map(|variant| (variant["properties"][tag]["const"].as_str(), variant));
    let names: Vec<&str> = variants().filter_map(|(name, _)| name).collect();
    let given = match table.get(tag) {
        Some(Value::String(name)) => Some(name.as_str()),
        Some(_) => None,
        None => schema["default"][tag].as_str(),
    };
    if let Some((_, variant)) = variants().find(|(name, _)| given.is_some() && *name == given) {
        check_table(variant, table, path, problems);
    } else if let Some(value) = table.get(tag) {
        check(&json!({ "type": "string", "enum": names }), value, &here, problems);
    } else {
        let allowed = format!("allowed: {}", names.join(", "));
        problems.push(Problem::key(path, format!("{here} is missing")).help(allowed));
    }
}

fn check_array(schema: &Json, items: &[Value], path: &Path, problems: &mut Vec<Problem>) {
    let length = items.len() as u64;
    if schema["minItems"].as_u64().is_some_and(|min| length < min)
        || schema["maxItems"].as_u64().is_some_and(|max| length > max)
    {
        problems.push(Problem::value(path, format!("{path} has {length} values, expected {}", expected(schema))));
    }
    for (index, item) in items.iter().enumerate() {
        check(&schema["items"], item, &path.join(index), problems);
    }
}

fn check_number(schema: &Json, number: f64, value: &Value, path: &Path, problems: &mut Vec<Problem>) {
    // What counts is the value that the program will hold: 1e-60 is zero in single precision, 1e60 is infinite.
    let number = if schema["format"] == "float" { f64::from(number as f32) } else { number };
    let beyond =
        |limit: &str, outside: fn(f64, f64) -> bool| schema[limit].as_f64().is_some_and(|l| outside(number, l));
    if !number.is_finite()
        || beyond("minimum", |n, limit| n < limit)
        || beyond("maximum", |n, limit| n > limit)
        || beyond("exclusiveMinimum", |n, limit| n <= limit)
        || beyond("exclusiveMaximum", |n, limit| n >= limit)
    {
        problems.push(unexpected(schema, value, path));
    }
}

fn unexpected(schema: &Json, value: &Value, path: &Path) -> Problem {
    Problem::value(path, format!("{path} is {}, expected {}", describe(value), expected(schema)))
}

/// The strings that are allowed, where the schema allows nothing but certain strings.
fn choices(schema: &Json) -> Option<Vec<&str>> {
    if let Some(name) = schema["const"].as_str() {
        return Some(vec![name]);
    }
    if let Some(names) = schema["enum"].as_array() {
        return names.iter().map(Json::as_str).collect();
    }
    let choices: Vec<Vec<&str>> = options(schema)?.iter().map(choices).collect::<Option<_>>()?;
    Some(choices.concat())
}

fn options(schema: &Json) -> Option<&Vec<Json>> {
    schema["oneOf"].as_array().or(schema["anyOf"].as_array())
}

/// The key whose value says which of the tables is meant.
fn tag(options: &[Json]) -> Option<&'static str> {
    ["type", "format"].into_iter().find(|tag| options.iter().all(|o| o["properties"][tag]["const"].is_string()))
}

/// Whether the value's type fits, whatever is inside.
fn accepts(schema: &Json, value: &Value) -> bool {
    if let Some(options) = options(schema) {
        return options.iter().any(|option| accepts(option, value));
    }
    match schema["type"].as_str() {
        Some("object") => value.is_table(),
        Some("array") => value.is_array(),
        Some("string") => value.is_str(),
        Some("boolean") => value.is_bool(),
        Some("integer") => value.is_integer(),
        Some("number") => value.is_integer() || value.is_float(),
        _ => choices(schema).is_none() || value.is_str(),
    }
}

/// `an integer >= 1`.
fn expected(schema: &Json) -> String {
    if let Some(choices) = choices(schema) {
        return format!("one of \"{}\"", choices.join("\", \""));
    }
    if let Some(options) = options(schema) {
        let mut names: Vec<String> = options.iter().map(expected).collect();
        names.dedup();
        return names.join(" or ");
    }
    let limits = [("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")];
    let limits = limits.iter().filter(|(limit, _)| !schema[limit].is_null());
    let limits: Vec<String> = limits.map(|(limit, sign)| format!(" {sign} {}", schema[limit])).collect();
    let range = limits.join(" and");
    match schema["type"].as_str() {
        Some("object") => "a table".into(),
        Some("array") => {
            let count = match (schema["minItems"].as_u64(), schema["maxItems"].as_u64()) {
                (Some(min), Some(max)) if min == max => format!(" of {min}"),
                (Some(min), _) => format!(" of at least {min}"),
                _ => String::new(),
            };
            format!("an array{count}, each {}", expected(&schema["items"]))
        }
        Some("integer") => format!("an integer{range}"),
        Some("number") => format!("a number{range}"),
        Some("boolean") => "true or false".into(),
        Some(other) => format!("a {other}"),
        None => "something else".into(),
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Table(_) => "a table".into(),
        Value::Array(_) => "an array".into(),
        Value::String(text) if text.chars().count() > 40 => "a string".into(),
        Value::String(_) => format!("the string {value}"),
        other => other.to_string(),
    }
}

/// A line, or a section, that a user may copy.
fn example(key: &str, schema: &Json, section: bool) -> String {
    if section {
        let tagged = options(schema).and_then(|options| options.first()).unwrap_or(schema);
        let required = tagged["required"].as_array().into_iter().flatten();
        let required: Vec<&str> = required.filter_map(Json::as_str).collect();
        let properties = tagged["properties"].as_object().into_iter().flatten();
        let shown = properties.filter(|(key, p)| required.contains(&key.as_str()) || !p["examples"].is_null());
        let lines = shown.map(|(key, property)| format!("\n      {}", example(key, property, false)));
        return format!("\n      [{key}]{}", lines.collect::<String>());
    }
    if !schema["examples"][0].is_null() {
        return format!("{key} = {}", schema["examples"][0]);
    }
    if let Some(choices) = choices(schema) {
        return format!("{key} = \"{}\"", choices[0]);
    }
    let sample = match (schema["type"].as_str(), options(schema)) {
        (_, Some(options)) => return example(key, &options[0], false),
        (Some("array"), _) => "[...]",
        (Some("string"), _) => "\"...\"",
        (Some("boolean"), _) => "true",
        (Some("number"), _) => "0.5",
        _ => "2",
    };
    format!("{key} = {sample}")
}

/// Words of other programs, and ours.
const SYNONYMS: [(&str, &str); 7] = [
    ("gpu", "cuda"),
    ("float32", "f32"),
    ("fp32", "f32"),
    ("bfloat16", "bf16"),
    ("float16", "fp16"),
    ("f16", "fp16"),
    ("half", "fp16"),
];

/// The allowed word that `found` was probably meant to be: it means the same, a few letters differ, or one is part of the other.
fn nearest<'a>(found: &str, allowed: &[&'a str]) -> Option<&'a str> {
    let synonym = SYNONYMS.iter().find(|(word, _)| *word == found).map(|(_, ours)| *ours);
    if let Some(word) = allowed.iter().copied().find(|word| synonym == Some(word)) {
        return Some(word);
    }
    let distance = |word: &str| strsim::damerau_levenshtein(found, word);
    let near = allowed.iter().copied().min_by_key(|word| distance(word))?;
    if distance(near) <= near.len().div_ceil(3) {
        return Some(near);
    }
    let part = |word: &&&str| found.len() > 2 && (word.contains(found) || (word.len() > 2 && found.contains(**word)));
    allowed.iter().find(part).copied()
}
