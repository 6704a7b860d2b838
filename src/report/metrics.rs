//! `metrics.jsonl`: one JSON object a log step and one an evaluation, each on disk as soon as it is known.

use crate::error::{Context, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

/// Over the samples since the last such record, from all ranks.
#[derive(Debug, Serialize)]
pub(super) struct Train {
    pub kind: &'static str,
    /// Updates done.
    pub step: u64,
    /// Epoch in progress, from 0.
    pub epoch: u64,
    pub loss: f64,
    pub accuracy: f64,
    pub lr: f32,
    pub samples_per_second: f64,
    /// Shares of the training time of rank 0.
    pub exposed_communication: f64,
    pub waiting: f64,
    pub data: f64,
    /// Since this process started to train.
    pub wall_seconds: f64,
    /// Of rank 0's GPU, as last read; left out without one, and where its driver does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory_mib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_utilization_percent: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_power_watts: Option<f64>,
    /// Of fp16; the updates that were skipped are those of the whole run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped_updates: Option<u32>,
}

/// One pass over a set.
#[derive(Debug, Serialize)]
pub(super) struct Eval {
    pub kind: &'static str,
    pub set: &'static str,
    pub step: u64,
    pub epoch: u64,
    pub loss: f64,
    pub accuracy: f64,
    pub samples: u64,
}

pub(super) struct Metrics {
    file: File,
    line: Vec<u8>,
}

impl Metrics {
    /// Opens the file to go on after `first_step` updates: lines beyond that step, and a line that a dying process left
    /// unfinished, are cut off, so that no step is there twice. With 0 it starts empty.
    pub fn open(path: &Path, first_step: u64) -> Result<Metrics> {
        let what = || format!("opening {}", path.display());
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).or_kind(Kind::Internal, what())?;
        }
        let mut options = OpenOptions::new();
        let file = options.create(true).read(true).append(true).open(path).or_kind(Kind::Internal, what())?;
        let keep = if first_step == 0 { 0 } else { length_up_to(&file, first_step).or_kind(Kind::Internal, what())? };
        file.set_len(keep).or_kind(Kind::Internal, what())?;
        Ok(Metrics { file, line: Vec::new() })
    }

    pub fn write(&mut self, record: &impl Serialize) -> Result<()> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, record).expect("a record can be written as JSON");
        self.line.push(b'\n');
        self.file.write_all(&self.line).or_kind(Kind::Internal, "writing metrics.jsonl")
    }
}

/// Bytes of the leading lines that are whole records of at most `step` updates.
fn length_up_to(file: &File, step: u64) -> std::io::Result<u64> {
    #[derive(Deserialize)]
    struct Position {
        step: u64,
    }
    let mut reader = BufReader::new(file);
    let (mut length, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        let keeps = |position: Position| position.step <= step;
        if !line.ends_with(b"\n") || !serde_json::from_slice(&line).is_ok_and(keeps) {
            return Ok(length);
        }
        length += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_continues_the_file_without_duplicates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/metrics.jsonl");
        let record = |step| serde_json::json!({ "kind": "train", "step": step });
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for step in [10, 20, 20, 30] {
            metrics.write(&record(step)).unwrap();
        }
        metrics.file.write_all(b"{\"kind\":\"train\",\"st").unwrap();

        let mut resumed = Metrics::open(&path, 20).unwrap();
        resumed.write(&record(25)).unwrap();
        let steps: Vec<u64> = fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [10, 20, 20, 25]);

        Metrics::open(&path, 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }
}
