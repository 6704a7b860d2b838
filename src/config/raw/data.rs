//! `[data]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// Whether a GPU keeps the sets in its memory, as bytes.
    pub resident: Resident,
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
            resident: Resident::Auto,
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

/// Whether a set lies in a GPU's memory. Images that are scaled as they are read cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resident {
    /// Where it takes at most a tenth of what is free there.
    Auto,
    On,
    Off,
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
