//! PyTorch's numbers: tests/oracles/*.safetensors, written by scripts/oracles/layers.py, which describes their keys.

use crate::harness::{Section, evaluation, training};
use lockstep::config::raw;
use lockstep::model::layers::REGISTRY;
use lockstep::model::loss::Loss;
use lockstep::model::params::{ParamSpec, Role};
use lockstep::model::{Pass, Shape};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct LayerCase {
    r#type: String,
    keys: String,
    inputs: Vec<[usize; 3]>,
    batch: usize,
    training: bool,
}

#[derive(Deserialize)]
struct LossCase {
    loss: String,
    weights: Option<Vec<f32>>,
}

#[test]
fn every_layer_computes_what_pytorch_does() {
    let oracle = Oracle::read("layers");
    let cases = oracle.cases::<LayerCase>();
    for kind in REGISTRY {
        assert!(cases.values().any(|case| case.r#type == kind.name), "no oracle for {}", kind.name);
    }
    for (name, case) in cases {
        check_layer(&oracle, &name, case);
    }
}

fn check_layer(oracle: &Oracle, name: &str, case: LayerCase) {
    let inputs = case.inputs.iter().map(|[h, w, c]| Shape::new(*h, *w, *c)).collect();
    let section = Section { kind: case.r#type, keys: case.keys, inputs };
    let specs = section.infer().params;
    let inputs: Vec<_> = (0..section.inputs.len()).map(|i| oracle.tensor(&format!("{name}.input.{i}"))).collect();
    let params: Vec<_> = specs
        .iter()
        .map(|spec| {
            let mut arena = vec![f32::NAN; spec.len()];
            spec.to_arena(&oracle.tensor(&format!("{name}.param.{}", spec.name)), &mut arena);
            arena
        })
        .collect();
    // Built for more samples than come, as for the last batch of an epoch.
    let mut subject = section.build(case.batch + 1);
    let pass = if case.training { Pass { share: 0.5, ..training(case.batch) } } else { evaluation(case.batch) };
    let output = subject.forward(&pass, &inputs, &params);
    oracle.compare(&format!("{name}.output"), &output);
    if case.training {
        let grad_output = oracle.tensor(&format!("{name}.grad_output"));
        let grads = subject.backward(&pass, &inputs, &output, &grad_output, &params);
        for (i, grad) in grads.inputs.iter().enumerate() {
            oracle.compare(&format!("{name}.grad_input.{i}"), grad);
        }
        for ((spec, value), slot) in specs.iter().zip(&params).zip(&grads.params) {
            check_param(oracle, name, spec, value, slot, pass.share);
        }
    }
}

fn check_param(oracle: &Oracle, name: &str, spec: &ParamSpec, value: &[f32], slot: &[f32], share: f32) {
    match spec.role {
        Role::Trainable => {
            let mut grad = vec![f32::NAN; spec.len()];
            spec.to_canonical(slot, &mut grad);
            oracle.compare(&format!("{name}.grad_param.{}", spec.name), &grad);
        }
        Role::Running { momentum } => {
            let step = |(value, slot): (&f32, &f32)| (1.0 - momentum) * value + momentum * slot / share;
            let after: Vec<f32> = value.iter().zip(slot).map(step).collect();
            oracle.compare(&format!("{name}.after.{}", spec.name), &after);
        }
    }
}

#[test]
fn every_loss_computes_what_pytorch_does() {
    let oracle = Oracle::read("losses");
    let outputs = oracle.tensor("outputs");
    let labels: Vec<u32> = oracle.tensor("labels").iter().map(|label| *label as u32).collect();
    let classes = outputs.len() / labels.len();
    let scale = 1.0 / labels.len() as f32;
    for (name, case) in oracle.cases::<LossCase>() {
        let config: raw::Loss = toml::from_str(&case.loss).expect("a [loss] section");
        let loss = Loss::new(&config, classes, case.weights).expect("a valid loss");
        let mut grad = vec![f32::NAN; outputs.len()];
        let out = loss.forward_backward(outputs[..].into(), &labels, scale, grad[..].as_mut().into());
        oracle.compare(&format!("{name}.loss"), &[out.loss_sum * scale]);
        oracle.compare(&format!("{name}.grad"), &grad);
    }
}

/// One file of PyTorch's numbers.
struct Oracle {
    bytes: Vec<u8>,
}

impl Oracle {
    fn read(name: &str) -> Oracle {
        let path = format!("{}/tests/oracles/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        Oracle { bytes: std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}")) }
    }

    fn cases<Case: DeserializeOwned>(&self) -> BTreeMap<String, Case> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).expect("a safetensors file");
        let cases = header.metadata().as_ref().expect("metadata");
        cases.iter().map(|(name, about)| (name.clone(), serde_json::from_str(about).expect("a case"))).collect()
    }

    fn tensor(&self, key: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        let tensor = file.tensor(key).unwrap_or_else(|error| panic!("{key}: {error}"));
        tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect()
    }

    /// Each value within 1e-5 of the tensor's largest.
    fn compare(&self, key: &str, found: &[f32]) {
        let expected = self.tensor(key);
        assert_eq!(found.len(), expected.len(), "{key}");
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let close = (found - expected).abs() <= 1e-5 * largest;
            assert!(close, "{key} at {i}: {found}, PyTorch has {expected}");
        }
    }
}
