//! `[optimizer]` and `[schedule]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// With run.precision = "fp16": what the loss is multiplied by at first, and its gradients divided by in the end. Halved when
    /// a gradient overflows. Default: 65536.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub loss_scale: Option<f32>,
    /// It is doubled after so many steps without an overflow; 0: it is neither doubled nor halved. Default: 2000.
    pub loss_scale_growth_every: Option<u32>,
}

impl OptimizerShared {
    /// The defaults, with this rate.
    pub fn with_lr(lr: f32) -> OptimizerShared {
        OptimizerShared {
            lr,
            weight_decay: 0.0,
            l1: 0.0,
            clip_norm: None,
            clip_value: None,
            loss_scale: None,
            loss_scale_growth_every: None,
        }
    }
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
