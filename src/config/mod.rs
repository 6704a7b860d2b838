//! From TOML to numbers, in two stages: `raw` is the file as written, `plan` is what it means for a given world.
//!
//! `load` turns text into a table (`source`, which also applies `--set` and shows errors where they arose), holds it
//! against the schema (`schema`, `check`), reads the sections (`raw`), and checks what holds between keys (`rules`).

mod check;
mod load;
mod resolved;
mod rules;
mod schema;
mod source;

pub mod plan;
pub mod raw;

pub use load::load;
pub use resolved::{difference, leaves};
pub use schema::schema;

#[cfg(test)]
mod tests;
