//! From TOML to numbers, in two stages: `raw` is the file as written, `plan` is what it means for a given world.

pub mod raw;
