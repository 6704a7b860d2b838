//! Configurations that several tests train with.

/// A net of three small layers on pictures of shapes, whose step takes about a millisecond; `sections` are what else there is.
pub fn small_net(sections: &str) -> String {
    format!("{sections}{SMALL_NET}")
}

/// The small net in a run that only a failure or a signal ends, so long before its million steps are done.
pub fn endless() -> String {
    small_net(ENDLESS)
}

const SMALL_NET: &str = r#"
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 4
kernel = 3
stride = 4
activation = "relu"
[[model.layers]]
type = "global_avg_pool"
[[model.layers]]
type = "linear"
units = 10
[optimizer]
type = "sgd"
lr = 0.01
[checkpoint]
every_steps = 10
"#;

const ENDLESS: &str = r#"
[run]
name = "endless"
steps = 1000000
[data]
format = "shapes"
train = 960
test = 64
[batch]
global = 48
[eval]
every_epochs = 50
[log]
every_steps = 5
"#;
