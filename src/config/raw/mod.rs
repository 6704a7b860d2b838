//! The sections of the TOML as written: one struct a section, each handed alone to the module that it configures.
//! The `schemars` attributes give the range of every key: they are what `check` refuses and what editors show.

use crate::model::layers::Parsed;
use crate::model::precision::Precision;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The whole file, read by `config::load`.
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
    /// Of activations and of the matrix work; parameters, gradients and optimizer state are f32 in either case.
    #[serde(default)]
    pub precision: Precision,
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

/// `[data]`: the format with its own keys, and the keys that all formats share.
#[derive(Clone, Debug)]
pub struct Data {
    pub format: Format,
    pub shared: DataShared,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataShared {
    /// Share of the training set that is held out for validation, drawn by seed.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub validation: f64,
    /// How training samples are drawn in each epoch.
    pub sampler: Sampler,
    /// On training samples; evaluation does nothing random.
    pub augment: Vec<Augment>,
    /// What becomes of a JPEG or PNG that cannot be decoded.
    pub on_bad_image: OnBadImage,
    /// A JPEG or PNG with more pixels is not decoded.
    #[schemars(range(min = 1, max = 4_000_000_000_u64))]
    pub max_pixels: u64,
    /// A JPEG or PNG file with more bytes is not read.
    #[schemars(range(min = 1, max = 4_000_000_000_u64))]
    pub max_image_bytes: u64,
    /// Threads a rank that prepare batches.
    #[schemars(range(min = 1, max = 1024))]
    pub workers: usize,
    /// Batches prepared ahead.
    #[schemars(range(min = 1, max = 1024))]
    pub prefetch: usize,
}

impl Default for DataShared {
    fn default() -> Self {
        DataShared {
            validation: 0.0,
            sampler: Sampler::Shuffle,
            augment: Vec::new(),
            on_bad_image: OnBadImage::Error,
            max_pixels: 100_000_000,
            max_image_bytes: 100_000_000,
            workers: 1,
            prefetch: 4,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Every sample once, in a random order.
    Shuffle,
    /// Every class as often as any other.
    Balanced,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadImage {
    /// The run stops and names the file.
    Error,
    /// Training takes another image of the same class, evaluation leaves it out; the run's summary counts them.
    Skip,
}

/// `[data] format = "..."` with the keys of that format.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "format", rename_all = "snake_case", deny_unknown_fields)]
pub enum Format {
    /// Ten kinds of drawn figures, made from (seed, index).
    Shapes {
        #[serde(default = "Format::shapes_train")]
        #[schemars(range(min = 1, max = 100_000_000))]
        train: usize,
        #[serde(default = "Format::shapes_test")]
        #[schemars(range(min = 1, max = 100_000_000))]
        test: usize,
    },
    /// MNIST's format: `train-images-idx3-ubyte` and so on, plain or `.gz`.
    Idx {
        #[schemars(example = &"data/mnist")]
        path: PathBuf,
    },
    /// CIFAR-10's binary format: `data_batch_*.bin` and `test_batch.bin`, plain, `.gz` or `.xz`.
    Cifar {
        #[schemars(example = &"data/cifar-10")]
        path: PathBuf,
    },
    /// JPEG and PNG files of any size: a folder a class, or a table of files and classes.
    Images(ImageFolder),
    /// TFRecord files of tf.train.Example.
    Tfrecord(Tfrecord),
    /// Noise of the model's input shape, made from (seed, index): for measuring speed without data.
    Synthetic {
        #[serde(default = "Format::synthetic_train")]
        #[schemars(range(min = 1, max = 100_000_000))]
        train: usize,
        #[serde(default = "Format::synthetic_test")]
        #[schemars(range(min = 1, max = 100_000_000))]
        test: usize,
        /// Default: as many as the model has outputs.
        #[schemars(range(min = 1, max = 100_000_000))]
        classes: Option<usize>,
    },
}

/// `[data] format = "images"`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolder {
    #[schemars(example = &"data/imagenet")]
    pub path: PathBuf,
    /// A table with the columns `file` and `class`; `labels.csv` in `path`, where it is there.
    pub labels: Option<PathBuf>,
    /// The folder of the training classes in `path`; `train`, where it is there.
    pub train_folder: Option<String>,
    /// The folder of the test classes in `path`; `val` or else `test`, where it is there.
    pub test_folder: Option<String>,
    /// Share of every class that is the test set, where there is no folder for it; drawn by seed.
    #[serde(default = "ImageFolder::test")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub test: f64,
}

impl ImageFolder {
    fn test() -> f64 {
        0.1
    }
}

/// `[data] format = "tfrecord"`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tfrecord {
    #[schemars(example = &"data/imagenet")]
    pub path: PathBuf,
    /// The training part, a glob pattern seen from `path`. Default: the files with the word `train` in their name.
    pub train_files: Option<String>,
    /// The test part likewise. Default: the files with the word `test`, `validation` or `val` in their name.
    pub test_files: Option<String>,
    /// The feature that holds the image, as JPEG or PNG; with `raw`, as bytes.
    #[serde(default = "Tfrecord::image")]
    pub image: String,
    /// The feature that holds the label, an integer.
    #[serde(default = "Tfrecord::label")]
    pub label: String,
    /// The first label: 0, or 1 where labels are counted from 1.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub label_base: i64,
    /// A text file with the name of a class in each line. Default: `classes.txt` in `path`, if it is there.
    pub class_names: Option<PathBuf>,
    /// [H, W, C] where images are stored as plain bytes, row by row.
    #[schemars(inner(range(min = 1, max = 65536)))]
    pub raw: Option<[usize; 3]>,
    /// How many samples a training sample may be drawn ahead of its place in the files. A set of at most this many is
    /// shuffled whole.
    #[serde(default = "Tfrecord::shuffle_buffer")]
    #[schemars(range(min = 1, max = 4_294_967_295u32))]
    pub shuffle_buffer: usize,
}

impl Tfrecord {
    fn image() -> String {
        "image/encoded".to_owned()
    }
    fn label() -> String {
        "image/class/label".to_owned()
    }
    fn shuffle_buffer() -> usize {
        10_000
    }
}

impl Format {
    fn synthetic_train() -> usize {
        12_800
    }
    fn synthetic_test() -> usize {
        256
    }
    fn shapes_train() -> usize {
        20_000
    }
    fn shapes_test() -> usize {
        2_000
    }
}

/// One step of `[data] augment`: a bare name, or a table with its keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Augment {
    /// Scales the image so that its shorter side has this many pixels; the middle of the model's size is cut out of it,
    /// or a random place by `random_crop`.
    Resize {
        #[schemars(range(min = 1, max = 65536), example = 256)]
        shorter: usize,
        #[serde(default)]
        filter: Filter,
    },
    /// Cuts out a part of random area and aspect ratio and scales it to the model's size (Szegedy et al. 2015).
    RandomResizedCrop {
        /// Least and greatest share of the image's area.
        #[serde(default = "Augment::scale")]
        #[schemars(extend("items" = { "type": "number", "format": "double", "exclusiveMinimum": 0, "maximum": 1 }))]
        scale: [f64; 2],
        /// Least and greatest width over height.
        #[serde(default = "Augment::ratio")]
        #[schemars(extend("items" = { "type": "number", "format": "double", "exclusiveMinimum": 0, "maximum": 1000 }))]
        ratio: [f64; 2],
        #[serde(default)]
        filter: Filter,
    },
    /// Pads by `padding` zeros on each side and cuts out the model's size at a random place.
    RandomCrop {
        #[serde(default = "Augment::padding")]
        #[schemars(range(max = 4096))]
        padding: usize,
    },
    /// Mirrors left and right with probability one half.
    HorizontalFlip {},
    /// Adds a random multiple of ImageNet's principal components of colour (Krizhevsky et al. 2012).
    Lighting {
        /// Standard deviation of the multiples.
        #[serde(default = "Augment::std")]
        #[schemars(range(min = 0))]
        std: f32,
    },
    /// Subtracts a mean and divides by a standard deviation, per channel, of values from 0 to 1.
    Normalize {
        #[serde(default)]
        statistics: Statistics,
        /// A value a channel, instead of `statistics`.
        #[schemars(length(min = 1))]
        mean: Option<Vec<f64>>,
        /// A value a channel, beside `mean`.
        #[schemars(length(min = 1), extend("items" = { "type": "number", "format": "double", "exclusiveMinimum": 0 }))]
        std: Option<Vec<f64>>,
    },
}

impl Augment {
    fn padding() -> usize {
        4
    }
    fn scale() -> [f64; 2] {
        [0.08, 1.0]
    }
    fn ratio() -> [f64; 2] {
        [0.75, 4.0 / 3.0]
    }
    fn std() -> f32 {
        0.1
    }
}

/// How an image is resampled; both average where they shrink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    #[default]
    Bilinear,
    Lanczos3,
}

/// Whose mean and standard deviation `normalize` uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Statistics {
    /// The training set's, for which every training image is read once before the first step.
    #[default]
    TrainingSet,
    /// Those published for ImageNet.
    Imagenet,
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
pub struct Model {
    /// [H, W, C] of one sample.
    pub input: [usize; 3],
    pub layers: Vec<LayerEntry>,
}

/// One `[[model.layers]]`.
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

/// `[optimizer]`: keys that all rules share, and the rule with its own.
#[derive(Clone, Debug)]
pub struct Optimizer {
    pub rule: Rule,
    pub shared: OptimizerShared,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimizerShared {
    #[schemars(example = 0.1, extend("exclusiveMinimum" = 0))]
    pub lr: f32,
    /// L2: added to the gradient, as in PyTorch; decoupled in adamw.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub weight_decay: f32,
    /// L1: lambda * sign(w) added to the gradient.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub l1: f32,
    /// Scales the whole gradient down to this L2 norm.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub clip_norm: Option<f32>,
    /// Clamps every gradient value to +-this.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub clip_value: Option<f32>,
}

/// `[optimizer] type = "..."`, with PyTorch's names and defaults.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Rule {
    Sgd {
        #[serde(default)]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
        momentum: f32,
        #[serde(default)]
        nesterov: bool,
    },
    Adam {
        #[serde(default = "Rule::betas")]
        #[schemars(extend("items" = { "type": "number", "format": "double", "minimum": 0, "exclusiveMaximum": 1 }))]
        betas: [f64; 2],
        #[serde(default = "Rule::eps_1e8")]
        #[schemars(range(min = 0))]
        eps: f32,
    },
    Adamw {
        #[serde(default = "Rule::betas")]
        #[schemars(extend("items" = { "type": "number", "format": "double", "minimum": 0, "exclusiveMaximum": 1 }))]
        betas: [f64; 2],
        #[serde(default = "Rule::eps_1e8")]
        #[schemars(range(min = 0))]
        eps: f32,
    },
    Adagrad {
        #[serde(default = "Rule::eps_1e10")]
        #[schemars(range(min = 0))]
        eps: f32,
        #[serde(default)]
        #[schemars(range(min = 0))]
        lr_decay: f32,
    },
    Adadelta {
        #[serde(default = "Rule::rho")]
        #[schemars(range(min = 0, max = 1))]
        rho: f32,
        #[serde(default = "Rule::eps_1e6")]
        #[schemars(range(min = 0))]
        eps: f32,
    },
    /// You, Gitman, Ginsburg 2017.
    Lars {
        #[serde(default = "Rule::lars_momentum")]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
        momentum: f32,
        #[serde(default = "Rule::trust")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        trust_coefficient: f32,
        #[serde(default = "Rule::eps_1e8")]
        #[schemars(range(min = 0))]
        eps: f32,
    },
}

impl Rule {
    fn betas() -> [f64; 2] {
        [0.9, 0.999]
    }
    fn eps_1e8() -> f32 {
        1e-8
    }
    fn eps_1e10() -> f32 {
        1e-10
    }
    fn eps_1e6() -> f32 {
        1e-6
    }
    fn rho() -> f32 {
        0.9
    }
    fn lars_momentum() -> f32 {
        0.9
    }
    fn trust() -> f32 {
        0.001
    }
}

/// `[schedule]`: the learning rate's shape, keys that all shapes share, and the shape with its own.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub shape: ScheduleShape,
    pub shared: ScheduleShared,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleShared {
    /// Epochs over which the rate rises linearly from 0 (may be a fraction).
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub warmup_epochs: f64,
    /// The same in steps; give one of the two.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Multiplies `lr` by the world size (Goyal et al. 2017); meant for `[batch] local`.
    #[serde(default)]
    pub scale_lr_with_world: bool,
}

/// `[schedule] type = "..."`. Times are in epochs, fractions allowed; the rate is set at every step.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleShape {
    Constant {},
    /// Times `gamma` every `every_epochs`, or at each of `at_epochs`.
    Step {
        #[serde(default = "ScheduleShape::gamma")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        gamma: f32,
        #[schemars(extend("exclusiveMinimum" = 0))]
        every_epochs: Option<f64>,
        #[schemars(length(min = 1), extend("items" = { "type": "number", "format": "double", "exclusiveMinimum": 0 }))]
        at_epochs: Option<Vec<f64>>,
    },
    /// Times `gamma` an epoch, continuously.
    Exponential {
        #[schemars(example = 0.95, extend("exclusiveMinimum" = 0))]
        gamma: f32,
    },
    /// lr * (1 - t)^power + end_lr * (1 - (1 - t)^power), t from 0 to 1 over the run.
    Polynomial {
        #[serde(default = "ScheduleShape::power")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        power: f32,
        #[serde(default)]
        #[schemars(range(min = 0))]
        end_lr: f32,
    },
    /// Half a cosine from lr to end_lr over the run (Loshchilov and Hutter 2017).
    Cosine {
        #[serde(default)]
        #[schemars(range(min = 0))]
        end_lr: f32,
    },
}

impl ScheduleShape {
    /// The type where `[schedule]` gives none.
    pub const DEFAULT: &str = "constant";

    fn gamma() -> f32 {
        0.1
    }
    fn power() -> f32 {
        1.0
    }
}

/// `[parallel]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    pub transport: TransportChoice,
    /// Gradients of about this many MiB are reduced together.
    #[schemars(range(max = 1_048_576), extend("exclusiveMinimum" = 0))]
    pub bucket_mib: f64,
    /// Reduce while backward goes on.
    pub overlap: bool,
    /// Seconds that a rank waits for a silent peer before it gives up.
    #[schemars(range(max = 1_000_000_000), extend("exclusiveMinimum" = 0))]
    pub timeout: f64,
}

impl Default for Parallel {
    fn default() -> Self {
        Parallel { transport: TransportChoice::Auto, bucket_mib: 1.0, overlap: true, timeout: 300.0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum TransportChoice {
    /// shm where all ranks share a node, else tcp.
    Auto,
    Shm,
    Tcp,
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
