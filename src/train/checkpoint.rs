//! Checkpoints: everything that a run needs to go on, in one safetensors file that PyTorch can read.
//!
//! `step-00000123.safetensors` holds the tensors in canonical names and layouts (`conv1.weight`, and the optimizer's state
//! as `optimizer.momentum_buffer.conv1.weight`) and, as metadata strings, the position in the run. The learning rate, the
//! order of samples and every random number are functions of that position, so there is nothing else to keep.
//!
//! A file is complete or absent (`atomic_file`), and carries the BLAKE3 hash of all that it says, so a flipped bit is
//! found. A damaged file is refused with the reason, and the one before it is used. Reading holds the file and its
//! decoded tensors in memory, twice the file's size, whatever the file claims; saving makes one copy of the tensors.

use crate::atomic_file;
use crate::error::{Context, Error, Kind, Result};
use crate::optim::loss_scale::LossScale;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const FORMAT: &str = "1";
const FORMAT_KEY: &str = "lockstep_checkpoint";
const HASH_KEY: &str = "blake3";

// Values are written and hashed as they lie in memory; safetensors is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// A tensor by its canonical name, shape and order of values.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A run between two steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// `[run] name`.
    pub run: String,
    /// The resolved configuration as TOML.
    pub config: String,
    pub seed: u64,
    /// Ranks that saved it; any number may go on.
    pub world_size: usize,
    /// Updates done.
    pub step: u64,
    /// Epochs completed.
    pub epoch: u64,
    /// Samples of the epoch in progress that all ranks together have used.
    pub samples: u64,
    /// Best evaluation accuracy so far, 0 to 1.
    pub best_accuracy: Option<f64>,
    /// `data::fingerprint` of the training set; none in checkpoints of versions that did not keep it.
    pub data: Option<String>,
    /// Where the loss is scaled.
    pub loss_scale: Option<LossScale>,
    /// All parameters with their running statistics, and all of the optimizer's state; in the order of names once loaded.
    pub tensors: Vec<Tensor>,
}

impl State {
    /// The tensor of this name if it has this shape; else what the checkpoint has instead.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&Tensor> {
        let Some(tensor) = self.tensors.iter().find(|tensor| tensor.name == name) else {
            return Err(Error::data(format!("it has no tensor {name}: it was saved by another net or optimizer")));
        };
        if tensor.shape != shape {
            let found = &tensor.shape;
            return Err(Error::data(format!("{name} is {found:?} in it, but {shape:?} in this net")));
        }
        Ok(tensor)
    }
}

/// The name under which the optimizer's state `state` of `parameter` is kept.
pub fn state_name(state: &str, parameter: &str) -> String {
    format!("optimizer.{state}.{parameter}")
}

/// Where the checkpoint of a step lies.
pub fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:08}.safetensors"))
}

/// Saves into `folder` and removes all but the newest `keep` (at least the one just saved). Checkpoints of later steps
/// go too: they belong to a course of the run that it has left by resuming from before them.
pub fn save(folder: &Path, keep: usize, state: &State) -> Result<PathBuf> {
    let path = path(folder, state.step);
    let what = || format!("saving the checkpoint {}", path.display());
    let views = state.tensors.iter().map(|tensor| {
        let (name, shape, bytes) = tensor.parts();
        (name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a tensor's values fill its shape"))
    });
    // Not its `serialize_to_file`, which renames a temporary file of its own that nobody would flush or clear away.
    let file = safetensors::serialize(views, Some(metadata_of(state))).or_kind(Kind::Internal, what())?;
    atomic_file::replace(&path, &file).or_kind(Kind::Internal, what())?;

    let mut older = 0;
    for (step, other) in list(folder)? {
        older += usize::from(step < state.step);
        if step > state.step || older >= keep.max(1) {
            fs::remove_file(&other)
                .or_kind(Kind::Internal, format!("removing the old checkpoint {}", other.display()))?;
        }
    }
    Ok(path)
}

/// The newest checkpoint in `folder` that is whole and that `accept`s; each newer one is reported as a warning with what
/// is wrong with it. None where there is none, or no folder.
pub fn newest(folder: &Path, accept: impl Fn(&State) -> Result<()>) -> Result<Option<(PathBuf, State)>> {
    for (_, path) in list(folder)? {
        match load(&path).and_then(|state| accept(&state).map(|()| state)) {
            Ok(state) => return Ok(Some((path, state))),
            Err(error) => tracing::warn!("checkpoint {} is not used: {error}", path.display()),
        }
    }
    Ok(None)
}

/// Steps of the checkpoints in `folder`, whole or not, the newest first.
pub fn steps(folder: &Path) -> Result<Vec<u64>> {
    Ok(list(folder)?.into_iter().map(|(step, _)| step).collect())
}

/// Reads and verifies one checkpoint. The error says what is wrong with the file; the caller names it.
pub fn load(path: &Path) -> Result<State> {
    decode(&read(path)?)
}

/// As `load`; but the file may also be another program's, with weights in canonical names and shapes and nothing else, as
/// safetensors saves a PyTorch model's `state_dict()`. Such weights are taken to be of step 0.
pub fn load_weights(path: &Path) -> Result<State> {
    let bytes = read(path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).or_kind(Kind::Data, NOT_SAFETENSORS)?;
    if header.metadata().as_ref().is_some_and(|metadata| metadata.contains_key(FORMAT_KEY)) {
        return decode(&bytes);
    }
    let file = SafeTensors::deserialize(&bytes).or_kind(Kind::Data, NOT_SAFETENSORS)?;
    let tensors = file.iter().map(|(name, view)| decode_tensor(name, &view)).collect::<Result<_>>()?;
    Ok(State { tensors, ..State::default() })
}

/// BLAKE3, in hex, of f32 parameters: in the order of their names, for each the name, the shape and the values, as
/// `hash_tensors` frames them. It depends on the canonical form only, not on layouts, ranks or the order given.
pub fn weights_digest(parameters: &[Tensor]) -> String {
    let mut hasher = blake3::Hasher::new();
    hash_tensors(&mut hasher, parameters.iter().map(Tensor::parts).collect());
    hasher.finalize().to_hex().to_string()
}

/// Checkpoints of a folder, whole or not, the newest first: step and path.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let what = || format!("listing the checkpoints in {}", folder.display());
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.or_kind(Kind::Internal, what())?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.or_kind(Kind::Internal, what())?;
        let name = entry.file_name();
        let step =
            name.to_str().and_then(|name| name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok());
        found.extend(step.map(|step: u64| (step, entry.path())));
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

fn metadata_of(state: &State) -> HashMap<String, String> {
    let mut metadata = BTreeMap::from([
        (FORMAT_KEY, FORMAT.to_string()),
        ("run", state.run.clone()),
        ("config", state.config.clone()),
        ("seed", state.seed.to_string()),
        ("world_size", state.world_size.to_string()),
        ("step", state.step.to_string()),
        ("epoch", state.epoch.to_string()),
        ("samples", state.samples.to_string()),
    ]);
    if let Some(accuracy) = state.best_accuracy {
        metadata.insert("best_accuracy", accuracy.to_string());
    }
    if let Some(data) = &state.data {
        metadata.insert("data", data.clone());
    }
    if let Some(scale) = &state.loss_scale {
        metadata.insert("loss_scale", serde_json::to_string(scale).expect("numbers can be written as JSON"));
    }
    let said = metadata.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let hash = hash_file(said, state.tensors.iter().map(Tensor::parts).collect());
    metadata.insert(HASH_KEY, hash);
    metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    // A device or a pipe has no end.
    if !fs::metadata(path).or_kind(Kind::Data, "cannot be opened")?.is_file() {
        return Err(Error::data("is not a file"));
    }
    fs::read(path).or_kind(Kind::Data, "cannot be read")
}

const NOT_SAFETENSORS: &str = "is truncated or not a safetensors file";

fn decode(bytes: &[u8]) -> Result<State> {
    let (_, header) = SafeTensors::read_metadata(bytes).or_kind(Kind::Data, NOT_SAFETENSORS)?;
    let file = SafeTensors::deserialize(bytes).or_kind(Kind::Data, NOT_SAFETENSORS)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    match metadata.get(FORMAT_KEY).map(String::as_str) {
        Some(FORMAT) => {}
        Some(other) => return Err(Error::data(format!("has format {other}, but this version reads format {FORMAT}"))),
        None => return Err(Error::data("is a safetensors file, but not a checkpoint of Lockstep")),
    }
    let views: BTreeMap<String, TensorView> = file.tensors().into_iter().collect();
    let parts = views.iter().map(|(name, view)| (name.as_str(), view.shape(), view.data())).collect();
    let said = metadata.iter().filter(|(key, _)| *key != HASH_KEY).map(|(key, value)| (key.as_str(), value.as_str()));
    if metadata.get(HASH_KEY) != Some(&hash_file(said.collect(), parts)) {
        return Err(Error::data("is damaged: its contents do not have the hash that was saved with them"));
    }
    Ok(State {
        run: field(&metadata, "run")?,
        config: field(&metadata, "config")?,
        seed: field(&metadata, "seed")?,
        world_size: field(&metadata, "world_size")?,
        step: field(&metadata, "step")?,
        epoch: field(&metadata, "epoch")?,
        samples: field(&metadata, "samples")?,
        best_accuracy: metadata.get("best_accuracy").map(|_| field(&metadata, "best_accuracy")).transpose()?,
        data: metadata.get("data").cloned(),
        loss_scale: metadata.get("loss_scale").map(|text| decode_loss_scale(text)).transpose()?,
        tensors: views.iter().map(|(name, view)| decode_tensor(name, view)).collect::<Result<_>>()?,
    })
}

fn field<T: FromStr>(metadata: &HashMap<String, String>, key: &str) -> Result<T> {
    let value = metadata.get(key).and_then(|value| value.parse().ok());
    value.ok_or_else(|| Error::data(format!("has no valid {key} in its metadata")))
}

fn decode_loss_scale(text: &str) -> Result<LossScale> {
    let found = serde_json::from_str(text).ok();
    let found = found.filter(|found: &LossScale| found.scale.is_normal() && found.scale > 0.0);
    found.ok_or_else(|| Error::data("has no valid loss_scale in its metadata"))
}

fn decode_tensor(name: &str, view: &TensorView) -> Result<Tensor> {
    if view.dtype() != Dtype::F32 {
        return Err(Error::data(format!("holds {name} as {:?}, not as F32", view.dtype())));
    }
    let (words, _) = view.data().as_chunks::<4>();
    let values = words.iter().map(|&word| f32::from_le_bytes(word)).collect();
    Ok(Tensor { name: name.to_string(), shape: view.shape().to_vec(), values })
}

/// Name, shape, bytes of the values.
type Parts<'a> = (&'a str, &'a [usize], &'a [u8]);

impl Tensor {
    fn parts(&self) -> Parts<'_> {
        (&self.name, &self.shape, bytemuck::cast_slice(&self.values))
    }
}

fn hash_file(mut metadata: Vec<(&str, &str)>, tensors: Vec<Parts>) -> String {
    let mut hasher = blake3::Hasher::new();
    metadata.sort_unstable();
    for (key, value) in metadata {
        hash_bytes(&mut hasher, key.as_bytes());
        hash_bytes(&mut hasher, value.as_bytes());
    }
    hash_tensors(&mut hasher, tensors);
    hasher.finalize().to_hex().to_string()
}

/// In the order of names, for each: the name; the number of dimensions and each of them; the values as little-endian f32.
/// Numbers are 64-bit little-endian, and names and values are preceded by their length in bytes.
fn hash_tensors(hasher: &mut blake3::Hasher, mut tensors: Vec<Parts>) {
    tensors.sort_unstable_by_key(|(name, ..)| *name);
    for (name, shape, bytes) in tensors {
        hash_bytes(hasher, name.as_bytes());
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for &dimension in shape {
            hasher.update(&(dimension as u64).to_le_bytes());
        }
        hash_bytes(hasher, bytes);
    }
}

fn hash_bytes(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
mod tests;
