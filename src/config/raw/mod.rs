//! The sections of the TOML as written: one struct a section, each handed alone to the module that it configures.
//! The `schemars` attributes give the range of every key: they are what `check` refuses and what editors show.

mod data;
mod optim;

pub use data::*;
pub use optim::*;

use crate::device::Choice;
use crate::model::layers::Parsed;
use crate::model::precision::Precision;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The whole file, read by `config::load`.
#[derive(Clone)]
pub struct Config {
    pub run: Run,
    pub data: Data,
    pub batch: BatchSize,
    pub model: Model,
    pub loss: Loss,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub parallel: Parallel,
    pub checkpoint: Checkpoint,
    pub eval: Eval,
    pub log: Log,
}

/// `[run]`: whichever of epochs, steps, target accuracy and minutes comes first ends the run.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Names the run's directory, `runs/<name>`.
    #[schemars(example = &"quickstart")]
    pub name: String,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// Of activations and of the matrix work; parameters, gradients and optimizer state are f32 in any case.
    #[serde(default)]
    pub precision: Precision,
    /// What each rank computes on. auto: the CPU, until a GPU has run this version.
    #[serde(default)]
    pub device: Choice,
    /// On GPUs: f32 values are cut to TF32, 11 significant bits, before they are multiplied. Many times as fast, less exact.
    #[serde(default)]
    pub tf32: bool,
    /// On GPUs: sums have one order, so that two runs give the same bits. Without it algorithms are taken too that add as it
    /// comes, where they are faster.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// On GPUs: a step is recorded as CUDA graphs, which the host then launches instead of every kernel.
    #[serde(default = "yes")]
    pub cuda_graphs: bool,
    /// On GPUs: a rank runs on the cores of the NUMA node that its GPU is next to, where the system tells and its launcher lets it.
    #[serde(default = "yes")]
    pub numa_binding: bool,
    #[schemars(range(min = 1))]
    pub epochs: Option<u64>,
    #[schemars(range(min = 1))]
    pub steps: Option<u64>,
    /// Validation (else test) accuracy, 0 to 1, at which the run ends.
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub target_accuracy: Option<f64>,
    #[schemars(range(max = 1_000_000), extend("exclusiveMinimum" = 0))]
    pub max_minutes: Option<f64>,
}

/// Of keys that are on.
fn yes() -> bool {
    true
}

/// `[batch]`: exactly one of global and local.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchSize {
    /// Samples a step over all ranks.
    #[schemars(range(min = 1, max = 100_000_000), example = 128)]
    pub global: Option<usize>,
    /// Samples a step and rank.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub local: Option<usize>,
    /// Samples a micro-batch. Makes the result the same bits for 1, 2, 4 and 8 ranks.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub micro: Option<usize>,
}

/// `[model]`
#[derive(Clone)]
pub struct Model {
    /// [H, W, C] of one sample.
    pub input: [usize; 3],
    pub layers: Vec<LayerEntry>,
}

/// One `[[model.layers]]`.
#[derive(Clone)]
pub struct LayerEntry {
    /// Default: its type and number, `conv2d_1`.
    pub name: String,
    pub kind: &'static str,
    /// Names of the layers (or `input`) that it reads; the one before where the file names none.
    pub from: Vec<String>,
    pub parsed: Parsed,
}

/// `[loss]`. Labels become one-hot targets; `label_smoothing` mixes in the uniform distribution.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Loss {
    /// Of the last layer's logits.
    SoftmaxCrossEntropy {
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
        label_smoothing: f32,
        class_weights: Option<ClassWeights>,
    },
    /// Mean over samples and outputs of the squared difference to the one-hot target.
    Mse {},
    /// KL(target || softmax(logits)).
    KlDivergence {
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
        label_smoothing: f32,
    },
}

impl Loss {
    /// The type where `[loss]` gives none.
    pub const DEFAULT: &str = "softmax_cross_entropy";
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ClassWeights {
    /// samples / (classes * samples of the class), from the training set.
    Balanced(Balanced),
    Given(
        #[schemars(
            length(min = 1),
            extend("items" = { "type": "number", "format": "float", "minimum": 0 })
        )]
        Vec<f32>,
    ),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balanced {
    Balanced,
}

/// `[parallel]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    pub transport: TransportChoice,
    /// Of the transport mpi.
    pub algorithm: Algorithm,
    /// Of nccl and of the algorithm native: what gradients are summed in. bf16 sends half the bytes.
    pub reduce_dtype: ReduceDtype,
    /// Of nccl: whether each rank updates all parameters, or its share, of which alone it holds the optimizer's state.
    pub nccl_update: NcclUpdate,
    /// Gradients of about this many MiB are reduced together. Default: 4 over nccl, else 1.
    #[schemars(range(max = 1_048_576), extend("exclusiveMinimum" = 0))]
    pub bucket_mib: Option<f64>,
    /// Reduce while backward goes on.
    pub overlap: bool,
    /// Between hosts, exchange the factors of linear layers' gradients (activations and deltas) instead of the gradients: the
    /// same result, and with small batches far fewer bytes. auto: where `trainer plan` estimates that it is faster.
    pub factor_exchange: FactorExchange,
    /// What that estimate takes a host's link to carry, Gbit/s.
    #[schemars(range(max = 1_000_000), extend("exclusiveMinimum" = 0))]
    pub network_gbit_s: f64,
    /// Seconds that a rank waits for a silent peer, or for its own GPU, before it gives up.
    #[schemars(range(max = 1_000_000_000), extend("exclusiveMinimum" = 0))]
    pub timeout: f64,
    /// The network over which hosts exchange data, by an interface's name or as addresses, `10.0.0.0/8`. They meet there too,
    /// unless MASTER_ADDR or Slurm says where. Default: the network by which rank 0's host is reached.
    pub interface: Option<String>,
    /// Steps between two comparisons of the parameters over ranks that have copies of their own; 0 is never.
    pub audit_every_steps: u64,
    /// Ranks may compute on one GPU together, which is of use for tests alone. Without it that is refused.
    pub allow_shared_gpu: bool,
}

impl Parallel {
    /// The defaults, over this transport.
    pub fn over(transport: TransportChoice) -> Parallel {
        Parallel { transport, ..Parallel::default() }
    }
}

impl Default for Parallel {
    fn default() -> Self {
        Parallel {
            transport: TransportChoice::Auto,
            algorithm: Algorithm::Ring,
            reduce_dtype: ReduceDtype::F32,
            nccl_update: NcclUpdate::Replicated,
            bucket_mib: None,
            overlap: true,
            factor_exchange: FactorExchange::Auto,
            network_gbit_s: 10.0,
            timeout: 300.0,
            interface: None,
            audit_every_steps: 100,
            allow_shared_gpu: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum TransportChoice {
    /// On GPUs nccl, where each rank has one of its own and NCCL; else shm where all ranks share a node, else mpi where the
    /// ranks were started through it, else tcp.
    Auto,
    Shm,
    Tcp,
    /// Needs a build with `--features mpi`.
    Mpi,
    /// Of ranks on GPUs, for their gradients; for all else as auto.
    Nccl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Messages of MPI under our own schedule: the same bits as every other transport.
    Ring,
    /// MPI's collectives, with sums in MPI's order.
    Native,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ReduceDtype {
    F32,
    /// Terms and sums are rounded to the nearest.
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NcclUpdate {
    /// All-reduce of the gradients.
    Replicated,
    /// Reduce-scatter of the gradients, all-gather of the parameters.
    Sharded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FactorExchange {
    Auto,
    On,
    Off,
}

/// `[checkpoint]`. At the end in any case.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
    /// Default: 1 where every_steps is not given.
    #[schemars(range(min = 1))]
    pub every_epochs: Option<u64>,
    /// Newest checkpoints that are kept.
    #[schemars(range(min = 1))]
    pub keep: usize,
    /// Default: `checkpoints` in the run's directory.
    pub directory: Option<PathBuf>,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every_steps: None, every_epochs: None, keep: 2, directory: None }
    }
}

/// `[eval]`: on the validation split, else on the test set. At the end in any case.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
    /// Default: 1 where every_steps is not given.
    #[schemars(range(min = 1))]
    pub every_epochs: Option<u64>,
}

/// `[log]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Steps between two lines of metrics.
    #[schemars(range(min = 1))]
    pub every_steps: u64,
}

impl Default for Log {
    fn default() -> Self {
        Log { every_steps: 50 }
    }
}
