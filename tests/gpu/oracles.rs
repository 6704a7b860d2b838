//! Every layer on a GPU against PyTorch, which computed in f64: the numbers by which the CPU's layers are tested too
//! (scripts/oracles/layers.py). Only in f32 and TF32, as bf16 does not hold these values: what is near a ReLU's or a pool's
//! edge would fall on its other side. In bf16 `layers` compares with the CPU's f32 on the values that bf16 holds.

use crate::emulator;
use crate::layers::{Case, findings, print_errors, relative_error};
use crate::operands::{Call, Given, Operands};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::model::params::Role;
use lockstep::model::{Shape, layers};
use safetensors::SafeTensors;
use serde::Deserialize;

static ORACLE: &[u8] = include_bytes!("../oracles/layers.safetensors");

#[derive(Deserialize)]
struct About {
    r#type: String,
    keys: String,
    inputs: Vec<[usize; 3]>,
    batch: usize,
    training: bool,
}

#[test]
fn layers_agree_with_pytorch_in_f64() {
    let Some(gpu) = emulator::gpu() else { return };
    let (_, header) = SafeTensors::read_metadata(ORACLE).unwrap();
    let mut wrong = Vec::new();
    for (name, about) in header.metadata().as_ref().unwrap() {
        let about: About = serde_json::from_str(about).unwrap();
        wrong.extend(findings(name, || check(&gpu, name, &about, false)));
        if ["conv2d", "linear"].contains(&&*about.r#type) {
            wrong.extend(findings(name, || check(&gpu, name, &about, true)));
        }
    }
    assert!(wrong.is_empty(), "{} results are off:\n{}", wrong.len(), wrong.join("\n"));
}

/// Prints a line a direction; returns those that are off.
fn check(gpu: &Gpu, name: &str, about: &About, tf32: bool) -> Vec<String> {
    let (precision, limit) = if tf32 { ("tf32", 1e-3) } else { ("f32", 1e-5) };
    let kind = layers::find(&about.r#type).expect("a layer's type");
    let spec =
        (kind.parse)(toml::from_str(&about.keys).unwrap()).unwrap_or_else(|error| panic!("{name}: {error}")).spec;
    let inputs: Vec<Shape> = about.inputs.iter().map(|[h, w, c]| Shape::new(*h, *w, *c)).collect();
    let case = Case { kind: kind.name, keys: "", inputs, masks_input: false, grad_masked: false, sums_input: false };
    let inferred = spec.infer(&case.inputs).unwrap();
    let roles: Vec<(String, Role)> = inferred.params.iter().map(|param| (param.name.to_string(), param.role)).collect();
    let tensor = |key: String| tensor(&format!("{name}.{key}"));
    let given = Given {
        inputs: (0..case.inputs.len()).map(|i| tensor(format!("input.{i}"))).collect(),
        params: roles.iter().map(|(param, _)| tensor(format!("param.{param}"))).collect(),
        grad_output: match about.training {
            true => tensor("grad_output".into()),
            false => vec![0.0; about.batch * inferred.output.len()],
        },
    };
    let call = if about.training { Call::training(about.batch) } else { Call::evaluation(about.batch) };
    let operands = Operands::of(&case, inferred, given, about.batch, Element::F32, tf32);
    let found = operands.on_gpu(gpu, &*spec, call).values;

    let mut errors = [relative_error(&found[0][0], &tensor("output".into())), 0.0];
    if about.training {
        let of_inputs = (0..case.inputs.len()).map(|i| format!("grad_input.{i}"));
        // What a step adds to a running statistic is no gradient.
        let of_params = roles.iter().map(|(param, role)| match role {
            Role::Trainable => format!("grad_param.{param}"),
            Role::Running { .. } => String::new(),
        });
        for (key, found) in of_inputs.chain(of_params).zip(&found[1]).filter(|(key, _)| !key.is_empty()) {
            let error = relative_error(found, &tensor(key));
            errors[1] = if errors[1].is_nan() || error <= errors[1] { errors[1] } else { error };
        }
    }
    print_errors(&format!("{} {name}", kind.name), precision, limit, errors)
}

fn tensor(key: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(ORACLE).unwrap();
    let tensor = file.tensor(key).unwrap_or_else(|error| panic!("{key}: {error}"));
    let (words, _) = tensor.data().as_chunks::<4>();
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}
