//! Where a value comes from: a line of the file, or a `--set` of the command line. Errors are shown there.

use super::check::{Path, Problem, check};
use super::load::layer_name;
use super::schema::schema;
use crate::error::{Context, Error, Kind, Result};
use std::fmt::Write;
use std::io::Read;
use std::ops::Range;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// The text of a configuration and the changes made to it, kept for error messages.
pub(super) struct Source {
    name: String,
    text: String,
    sets: Vec<Set>,
}

/// One `--set KEY=VALUE`.
struct Set {
    path: Path,
    argument: String,
}

/// Columns of a line of text.
struct Excerpt<'a> {
    /// `quickstart.toml:12`, `--set`.
    origin: String,
    /// `12`, or nothing.
    number: String,
    line: &'a str,
    columns: Range<usize>,
}

impl Source {
    /// Reads the file and applies the changes in their order.
    pub fn read(path: &std::path::Path, sets: &[String]) -> Result<(Source, Table)> {
        let name = path.display().to_string();
        let text = read_text(path).map_err(|error| error.context(format!("cannot read the configuration {name}")))?;
        Self::parse(name, text, sets)
    }

    pub fn parse(name: String, text: String, sets: &[String]) -> Result<(Source, Table)> {
        let mut source = Source { name, text, sets: Vec::new() };
        let mut table: Table = toml::from_str(&source.text).map_err(|error| {
            let excerpt = source.excerpt(error.span().unwrap_or(0..0));
            Error::usage(excerpt.show(&format!("not valid TOML: {}", error.message()), &[]))
        })?;
        let file = table.clone();
        for argument in sets {
            let path = set(&mut table, argument)
                .map_err(|(columns, message)| Error::usage(Excerpt::of_set(argument, columns).show(&message, &[])))?;
            source.sets.push(Set { path, argument: argument.clone() });
        }
        source.leave_aside(&file, &mut table);
        Ok((source, table))
    }

    /// Where a `--set` changes the tag of a section, as `data.format=synthetic` does, what the file says for the section's
    /// other kinds is of no use and no mistake: it goes. What the chosen kind takes as well stays, and what a `--set` gives.
    fn leave_aside(&self, file: &Table, table: &mut Table) {
        for set in &self.sets {
            let [section, tag] = &set.path.0[..] else { continue };
            let before = file.get(section).and_then(|keys| keys.get(tag));
            let Some(Value::Table(keys)) = table.get_mut(section) else { continue };
            let Some(chosen) = keys.get(tag).filter(|tag| Some(*tag) != before).and_then(Value::as_str) else {
                continue;
            };
            let kinds = schema()["properties"][section]["oneOf"].as_array().map_or(&[][..], Vec::as_slice);
            let Some(own) = kinds.iter().find(|kind| kind["properties"][tag]["const"] == chosen) else { continue };
            let takes = |key: &str, value: &Value| {
                let mut problems = Vec::new();
                check(&own["properties"][key], value, &Path::default(), &mut problems);
                problems.is_empty()
            };
            keys.retain(|key, value| {
                let knowing = kinds.iter().filter(|kind| !kind["properties"][key].is_null()).count();
                let of_some_kinds = knowing > 0 && knowing < kinds.len();
                let known = !own["properties"][key].is_null();
                let was_set = self.sets.iter().any(|set| set.path.0.starts_with(&[section.clone(), key.to_owned()]));
                !of_some_kinds || was_set || (known && takes(key, value))
            });
        }
    }

    /// All problems, each with the line from which it comes.
    pub fn explain(&self, problems: &[Problem]) -> Error {
        const SHOWN: usize = 8;
        let mut texts: Vec<String> = problems.iter().take(SHOWN).map(|problem| self.show(problem)).collect();
        if problems.len() > SHOWN {
            texts.push(format!("and {} more", problems.len() - SHOWN));
        }
        Error::usage(texts.join("\n\nerror: "))
    }

    fn show(&self, problem: &Problem) -> String {
        let above = |path: &Path, below: &Path| below.0.starts_with(&path.0);
        let mut sets = self.sets.iter().rev();
        if let Some(set) = sets.clone().find(|set| above(&set.path, &problem.path)) {
            return Excerpt::of_set(&set.argument, set.columns(problem)).show(&problem.message, &problem.help);
        }
        let (span, found) = self.locate(&problem.path, problem.at_key);
        if !found && let Some(set) = sets.find(|set| above(&problem.path, &set.path)) {
            return Excerpt::of_set(&set.argument, set.columns(problem)).show(&problem.message, &problem.help);
        }
        match span {
            Some(span) => self.excerpt(span).show(&problem.message, &problem.help),
            None => self.excerpt(0..0).origin_only(&self.name).show(&problem.message, &problem.help),
        }
    }

    /// Bytes of the key or value at `path`, or of the nearest table or array around it; and whether `path` was there.
    fn locate(&self, path: &Path, at_key: bool) -> (Option<Range<usize>>, bool) {
        let Ok(document) = DeTable::parse(&self.text) else { return (None, false) };
        let root = Spanned::new(document.span(), DeValue::Table(document.into_inner()));
        let (mut here, mut span) = (&root, None);
        for (depth, step) in path.0.iter().enumerate() {
            let last = depth + 1 == path.0.len();
            let next = match here.get_ref() {
                DeValue::Table(table) => table.iter().find(|(key, _)| key.get_ref() == step).map(|(key, value)| {
                    let key_counts = (last && at_key) || (value.get_ref().is_table() && value.span().is_empty());
                    (if key_counts { key.span() } else { value.span() }, value)
                }),
                DeValue::Array(items) => {
                    step.parse().ok().and_then(|index: usize| items.get(index)).map(|item| (item.span(), item))
                }
                _ => None,
            };
            let Some((found, value)) = next else { return (span, false) };
            (here, span) = (value, Some(found));
        }
        (span, true)
    }

    fn excerpt(&self, span: Range<usize>) -> Excerpt<'_> {
        let before = &self.text[..span.start];
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = self.text[start..].lines().next().unwrap_or("");
        let number = before.matches('\n').count() + 1;
        Excerpt {
            origin: format!("{}:{number}", self.name),
            number: number.to_string(),
            line,
            columns: span.start - start..(span.end - start).min(line.len()),
        }
    }
}

impl Set {
    fn columns(&self, problem: &Problem) -> Range<usize> {
        let equals = self.argument.find('=').unwrap_or(0);
        if problem.at_key { 0..equals } else { equals + 1..self.argument.len() }
    }
}

impl<'a> Excerpt<'a> {
    fn of_set(argument: &'a str, columns: Range<usize>) -> Self {
        Excerpt { origin: "--set".into(), number: String::new(), line: argument, columns }
    }

    /// For what is missing in the file as a whole.
    fn origin_only(self, name: &str) -> Self {
        Excerpt { origin: name.into(), line: "", ..self }
    }

    /// The message, the line with a caret under what is wrong, and the help below.
    fn show(&self, message: &str, help: &[String]) -> String {
        const WIDTH: usize = 100;
        let mut text = format!("{}: {message}", self.origin);
        let margin = " ".repeat(self.number.len());
        if !self.line.trim().is_empty() {
            // A long line is cut around the place; columns count characters, and a tab is shown as one space.
            let start = self.line.get(..self.columns.start).map_or(0, |before| before.chars().count());
            let length = self.line.get(self.columns.clone()).map_or(1, |marked| marked.chars().count());
            let skipped = start.saturating_sub(WIDTH / 2);
            let shown: String = self.line.chars().skip(skipped).take(WIDTH).collect();
            let caret = "^".repeat(length.clamp(1, WIDTH - (start - skipped)));
            let shown = shown.replace('\t', " ");
            let indent = " ".repeat(start - skipped);
            let number = &self.number;
            let _ = write!(text, "\n {margin} |\n {number} | {}\n {margin} | {indent}{caret}", shown.trim_end());
        }
        for line in help {
            let _ = write!(text, "\n {margin} = {line}");
        }
        text
    }
}

/// A device or a pipe may have no end, and every rank reads the file anew: it must be a plain file of honest size.
fn read_text(path: &std::path::Path) -> Result<String> {
    const LIMIT: u64 = 16 << 20;
    let usage = |error: std::io::Error| Error::usage(error.to_string());
    if !std::fs::metadata(path).map_err(usage)?.is_file() {
        return Err(Error::usage("it is not a plain file"));
    }
    let mut text = Vec::new();
    std::fs::File::open(path).map_err(usage)?.take(LIMIT + 1).read_to_end(&mut text).map_err(usage)?;
    if text.len() as u64 > LIMIT {
        return Err(Error::usage(format!("it is longer than {} MiB", LIMIT >> 20)));
    }
    String::from_utf8(text).or_kind(Kind::Usage, "it is not text")
}

/// Changes one value. The error comes with its columns in the argument.
fn set(table: &mut Table, argument: &str) -> Result<Path, (Range<usize>, String)> {
    let usage = || "expected KEY=VALUE, such as optimizer.lr=0.1 or model.layers.0.filters=64".to_owned();
    let (key, value) = argument.split_once('=').ok_or_else(|| (0..argument.len(), usage()))?;
    let keys = dotted_keys(key).ok_or_else(|| (0..key.len(), usage()))?;
    // What is not TOML is text: `--set data.path=data/mnist` needs no quotes.
    let value = value.trim().parse().unwrap_or_else(|_| Value::String(value.trim().to_owned()));

    let whole_key = key.len();
    let mut root = Value::Table(std::mem::take(table));
    let (mut here, mut path) = (&mut root, Path::default());
    for key in &keys {
        here = descend(here, key, &mut path).map_err(|message| (0..whole_key, message))?;
    }
    *here = value;
    if let Value::Table(root) = root {
        *table = root;
    }
    Ok(path)
}

/// The keys of `a.b."c.d"`, read as TOML reads them.
fn dotted_keys(key: &str) -> Option<Vec<String>> {
    let mut here: Value = Value::Table(format!("{key} = 0").parse().ok()?);
    let mut keys = Vec::new();
    while let Value::Table(table) = here {
        let (key, next) = table.into_iter().next()?;
        keys.push(key);
        here = next;
    }
    Some(keys)
}

/// One step down, to a key (made where there is none) or to an element of an array by its number from 0 or its name.
fn descend<'v>(here: &'v mut Value, key: &str, path: &mut Path) -> Result<&'v mut Value, String> {
    match here {
        Value::Table(table) => {
            *path = path.join(key);
            Ok(table.entry(key).or_insert_with(|| Value::Table(Table::new())))
        }
        Value::Array(items) => {
            let names: Vec<String> = items.iter().enumerate().map(|(index, item)| layer_name(item, index)).collect();
            let by_name = names.iter().position(|name| name == key);
            let index = by_name.or(key.parse().ok()).filter(|&index| index < items.len()).ok_or_else(|| {
                let named: Vec<&str> = names.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
                let count = items.len();
                format!("{path} has no element `{key}`, it has {count}, numbered from 0: {}", named.join(", "))
            })?;
            *path = path.join(index);
            Ok(&mut items[index])
        }
        other => Err(format!("{path} is of type {}, it has no key `{key}`", other.type_str())),
    }
}
