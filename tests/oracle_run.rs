//! A whole run against PyTorch: from the same weights and the same batches, twenty steps of two small nets must give
//! PyTorch's losses and end at PyTorch's weights and running statistics. What no test of one layer sees would show here:
//! gradients that meet wrongly at a branch, decay on the wrong tensors, a stale buffer, a statistic a step late.
//!
//! The data are made by scripts/oracles/run.py, which also says how the file is laid out.

use lockstep::config::raw;
use lockstep::device::{Arena, Place};
use lockstep::error::Result;
use lockstep::model::Pass;
use lockstep::model::layers;
use lockstep::model::loss::Loss;
use lockstep::model::net::{Net, Options};
use lockstep::model::params::{Param, Role};
use lockstep::model::precision::Precision;
use lockstep::model::spec::NetSpec;
use lockstep::optim::{self, At, Optimizer};
use safetensors::SafeTensors;
use serde_json::Value as Json;

/// Of losses, absolute; of weights, relative to the tensor's largest value.
const TOLERANCE: f32 = 1e-4;

const CROSS_ENTROPY: raw::Loss = raw::Loss::SoftmaxCrossEntropy { label_smoothing: 0.0, class_weights: None };

#[test]
fn a_chain_of_layers_follows_pytorch() {
    Oracle::open().follow("chain");
}

#[test]
fn a_net_with_a_residual_and_a_branch_follows_pytorch() {
    Oracle::open().follow("branches");
}

impl Oracle {
    fn follow(&self, case: &str) {
        let about = &self.cases[case];
        let images = self.images();
        let labels = self.tensors.tensor("labels").unwrap();
        let (steps, batch) = (labels.shape()[0], labels.shape()[1]);
        let labels: Vec<u32> = words(labels.data()).map(u32::from_le_bytes).collect();
        let losses = self.values(&format!("{case}.losses"));

        let mut run = Run::new(about, batch);
        run.start_from(|name| self.values(&format!("{case}.initial.{name}")));
        for step in 0..steps {
            let images = &images[step * images.len() / steps..][..images.len() / steps];
            let loss = run.step(step, images, &labels[step * batch..][..batch]).unwrap();
            let expected = losses[step];
            assert!((loss - expected).abs() < TOLERANCE, "{case}, step {step}: loss {loss}, PyTorch's {expected}");
        }
        for param in &run.net.table().params {
            let expected = self.values(&format!("{case}.final.{}", param.name));
            let mut found = vec![0.0; param.spec.len()];
            param.spec.to_canonical(&run.net.params().unwrap()[param.range.clone()], &mut found);
            let scale = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let error = found.iter().zip(&expected).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(
                error < TOLERANCE * scale,
                "{case}: {} ends {error} from PyTorch's, which go to {scale}",
                param.name
            );
        }
    }
}

/// The training loop of one rank, without what surrounds it.
struct Run {
    net: Net,
    pass: Pass,
    grads: Arena,
    loss: Loss,
    optimizer: Box<dyn Optimizer>,
    lr: f32,
    momentum: Vec<f32>,
}

impl Run {
    fn new(about: &Json, batch: usize) -> Run {
        let config = optimizer(&about["optimizer"]);
        let options = Options {
            batch,
            place: Place::Host,
            threads: 2,
            seed: 0,
            precision: Precision::F32,
            training: true,
            ..Options::default()
        };
        let net = Net::new(net_spec(about), &options).unwrap();
        Run {
            pass: Pass { batch, training: true, first_sample: 0, share: 1.0 },
            grads: Arena::host(net.table().len_with_tail() * size_of::<f32>()).unwrap(),
            loss: Loss::new(&CROSS_ENTROPY, net.spec().output().c, None).unwrap(),
            optimizer: optim::new(&config),
            lr: config.shared.lr,
            momentum: vec![0.0; net.table().len()],
            net,
        }
    }

    fn start_from(&mut self, canonical: impl Fn(&str) -> Vec<f32>) {
        self.net
            .edit_params(|table, params| {
                for Param { name, spec, range, .. } in &table.params {
                    spec.to_arena(&canonical(name), &mut params[range.clone()]);
                }
            })
            .unwrap();
    }

    fn step(&mut self, step: usize, images: &[f32], labels: &[u32]) -> Result<f32> {
        self.net.forward(&self.pass, images.into())?;
        let (outputs, gradient) = self.net.output_and_gradient(&self.pass);
        let count = labels.len() as f32;
        let loss = self.loss.forward_backward(outputs, labels, 1.0 / count, gradient).loss_sum / count;
        self.net.backward(&self.pass, images.into(), &self.grads, |_| Ok(()))?;
        // SAFETY: backward is over.
        let grads = unsafe { self.grads.slice(0..self.grads.bytes()) }.f32();
        self.net.edit_params(|table, params| {
            for Param { spec, range, .. } in &table.params {
                let (values, slot) = (&mut params[range.clone()], &grads[range.clone()]);
                match spec.role {
                    Role::Trainable => {
                        let at = At { lr: self.lr, step: step as u64 };
                        self.optimizer.update(at, values, slot, &mut [&mut self.momentum[range.clone()]]);
                    }
                    Role::Running { momentum } => {
                        values.iter_mut().zip(slot).for_each(|(v, new)| *v = (1.0 - momentum) * *v + momentum * new);
                    }
                }
            }
        })?;
        Ok(loss)
    }
}

fn net_spec(about: &Json) -> NetSpec {
    let layers = about["layers"].as_array().unwrap().iter().map(|layer| {
        let mut keys = layer.as_object().unwrap().clone();
        let name = keys.remove("name").unwrap();
        let kind = layers::find(keys.remove("type").unwrap().as_str().unwrap()).unwrap();
        let from = keys.remove("from").map(|from| serde_json::from_value(from).unwrap());
        let table = toml::Table::try_from(keys).unwrap();
        raw::LayerEntry {
            name: name.as_str().unwrap().into(),
            kind: kind.name,
            from: from.unwrap_or_default(),
            parsed: (kind.parse)(table).unwrap_or_else(|error| panic!("{name}: {error}")),
        }
    });
    let input = serde_json::from_value(about["input"].clone()).unwrap();
    NetSpec::new(&raw::Model { input, layers: layers.collect() }).unwrap()
}

fn optimizer(about: &Json) -> raw::Optimizer {
    let value = |key| about[key].as_f64().unwrap() as f32;
    assert_eq!(about["type"], "sgd");
    raw::Optimizer {
        rule: raw::Rule::Sgd { momentum: value("momentum"), nesterov: false },
        shared: raw::OptimizerShared {
            weight_decay: value("weight_decay"),
            ..raw::OptimizerShared::with_lr(value("lr"))
        },
    }
}

/// The file, and what its metadata says of each case.
struct Oracle {
    cases: Json,
    tensors: SafeTensors<'static>,
}

impl Oracle {
    fn open() -> Oracle {
        let file = include_bytes!("oracles/run.safetensors");
        let (_, header) = SafeTensors::read_metadata(file).unwrap();
        let cases = &header.metadata().as_ref().unwrap()["cases"];
        Oracle { cases: serde_json::from_str(cases).unwrap(), tensors: SafeTensors::deserialize(file).unwrap() }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        let tensor = self.tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        words(tensor.data()).map(f32::from_le_bytes).collect()
    }

    /// (STEPS, BATCH, H, W, C) in -1..1.
    fn images(&self) -> Vec<f32> {
        let images = self.tensors.tensor("images").unwrap();
        images.data().iter().map(|&byte| f32::from(byte) / 128.0 - 1.0).collect()
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    bytes.as_chunks().0.iter().copied()
}
