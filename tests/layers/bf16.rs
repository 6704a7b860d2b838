//! Every layer with activations in bf16 against the same layer in f32 on the same values: what comes out may differ by
//! the rounding to bf16, and where a product's operands were rounded, by as much again of the largest value.

use crate::gradients::sections;
use crate::harness::{Gradients, LAYER, SEED, Section, evaluation, training, values, with_threads};
use half::bf16;
use lockstep::device::{Slice, SliceMut};
use lockstep::model::{Backward, Build, Forward, Inferred, Layer, Pass, Shape};

/// Half a unit in the last of 8 bits.
const ROUNDING: f32 = 1.0 / 256.0;

#[test]
fn every_layer_agrees_with_its_f32_form() {
    for section in sections().into_iter().chain(large()) {
        for batch in [3, 1] {
            let alone = batch == 1 && section.kind == "batch_norm" && section.inputs[0].is_vector();
            if !alone {
                check(&section, training(batch));
            }
        }
        if section.kind != "dropout" {
            check(&section, evaluation(2));
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    for section in large() {
        let run = || {
            let (inputs, params) = operands(&section, 3);
            let mut subject = Subject::new(&section, 4);
            let y = subject.forward(&training(3), &inputs, &params);
            (subject.backward(&training(3), &inputs, &y, &rounded(values(y.len(), 9)), &params), y)
        };
        assert!(with_threads(1, run) == with_threads(3, run), "{section:?}");
    }
}

/// Of several blocks and tasks, and of lengths that no vector, tile or panel divides.
fn large() -> Vec<Section> {
    let (image, wide) = (Shape::new(63, 65, 21), Shape::new(9, 10, 70));
    let section = |kind: &str, keys: &str, inputs: &[Shape]| Section {
        kind: kind.to_owned(),
        keys: keys.to_owned(),
        inputs: inputs.to_vec(),
    };
    vec![
        section("conv2d", "filters = 19\nkernel = 5\nstride = 2\npadding = 2\nactivation = \"relu\"", &[image]),
        section("conv2d", "filters = 45\nkernel = 3\npadding = \"same\"", &[wide]),
        section("conv2d", "filters = 70\nkernel = 3\npadding = 1\ngroups = 70", &[wide]),
        section("conv2d", "filters = 6\nkernel = [5, 2]\nstride = [4, 3]\npadding = [2, 1]\ngroups = 2", &[wide]),
        section("linear", "units = 133\nactivation = \"relu\"", &[Shape::vector(301)]),
        section("max_pool", "size = 3\nstride = 2\npadding = 1", &[image]),
        section("avg_pool", "size = 3\nstride = 2", &[image]),
        section("global_max_pool", "", &[image]),
        section("lrn", "", &[image]),
        section("batch_norm", "activation = \"relu\"", &[image]),
        section("dropout", "", &[image]),
        section("flatten", "", &[image]),
        section("relu", "", &[image]),
        section("add", "activation = \"relu\"", &[image, image]),
        section("concat", "", &[image, Shape::new(63, 65, 3)]),
    ]
}

fn check(section: &Section, pass: Pass) {
    let (inputs, params) = operands(section, pass.batch);
    let mut subject = Subject::new(section, pass.batch + 1);
    let mut reference = section.build(pass.batch);
    let y = subject.forward(&pass, &inputs, &params);
    compare(&format!("{section:?}: output"), &y, &reference.forward(&pass, &inputs, &params));
    if !pass.training {
        return;
    }
    let dy = rounded(values(y.len(), 9));
    let found = subject.backward(&pass, &inputs, &y, &dy, &params);
    let expected = reference.backward(&pass, &inputs, &y, &dy, &params);
    for (number, (found, expected)) in found.inputs.iter().zip(&expected.inputs).enumerate() {
        compare(&format!("{section:?}: gradient of input {number}"), found, expected);
    }
    for (number, (found, expected)) in found.params.iter().zip(&expected.params).enumerate() {
        compare(&format!("{section:?}: gradient of parameter {number}"), found, expected);
    }
}

fn compare(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= ROUNDING * (expected.abs() + 0.5 * largest);
        assert!(close, "{what} at {i}: {found}, in f32 {expected}, the largest {largest}");
    }
}

/// Inputs and parameters that bf16 holds exactly, so that the f32 layer sees the same.
fn operands(section: &Section, batch: usize) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let input = |(salt, shape): (usize, &Shape)| rounded(values(batch * shape.len(), salt));
    let params = section.infer().params;
    let param = |(salt, len): (usize, usize)| rounded(values(len, salt + 3).iter().map(|x| 1.0 + 0.5 * x).collect());
    (
        section.inputs.iter().enumerate().map(input).collect(),
        params.iter().map(|spec| spec.len()).enumerate().map(param).collect(),
    )
}

fn rounded(values: Vec<f32>) -> Vec<f32> {
    widen(&narrow(&values))
}

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|value| bf16::from_f32(*value)).collect()
}

fn widen(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// A layer built for bf16 with what it keeps between forward and backward. What it must write is NaN before.
struct Subject {
    layer: Box<dyn Layer>,
    inferred: Inferred,
    saved: Vec<f32>,
    scratch: Vec<f32>,
}

impl Subject {
    fn new(section: &Section, batch: usize) -> Subject {
        let inferred = section.infer();
        let threads = rayon::current_num_threads();
        let build = Build { inputs: &section.inputs, batch, threads, seed: SEED, layer: LAYER, ..Build::default() };
        let layer = section.spec().build_bf16(&build).unwrap_or_else(|error| panic!("{section:?}: {error}"));
        let saved = inferred.saved_bytes * batch + inferred.saved_bytes_fixed;
        let poisoned = |bytes: usize| vec![f32::NAN; bytes.div_ceil(size_of::<f32>())];
        Subject { scratch: poisoned(layer.scratch_bytes()), saved: poisoned(saved), layer, inferred }
    }

    fn forward(&mut self, pass: &Pass, inputs: &[Vec<f32>], params: &[Vec<f32>]) -> Vec<f32> {
        self.saved.fill(f32::NAN);
        self.scratch.fill(f32::NAN);
        let (inputs, params_rounded) = (narrow_all(inputs), narrow_all(params));
        let mut output = vec![bf16::NAN; pass.batch * self.inferred.output.len()];
        let io = Forward {
            inputs: &slices(&inputs),
            output: SliceMut::from(&mut output[..]),
            params: &slices(params),
            params_rounded: &slices(&params_rounded),
            saved: SliceMut::from(&mut self.saved[..]),
            scratch: SliceMut::from(&mut self.scratch[..]),
        };
        self.layer.forward(pass, io).expect("forward");
        widen(&output)
    }

    fn backward(
        &mut self,
        pass: &Pass,
        inputs: &[Vec<f32>],
        output: &[f32],
        grad_output: &[f32],
        params: &[Vec<f32>],
    ) -> Gradients {
        self.scratch.fill(f32::NAN);
        let Inferred { backward_reads_input, backward_reads_output, .. } = self.inferred;
        let mut grad_inputs: Vec<_> = inputs.iter().map(|input| vec![bf16::NAN; input.len()]).collect();
        let mut grad_params: Vec<_> = params.iter().map(|param| vec![f32::NAN; param.len()]).collect();
        let (inputs, params_rounded) = (narrow_all(inputs), narrow_all(params));
        let (output, mut grad_output) = (narrow(output), narrow(grad_output));
        let io = Backward {
            inputs: &match backward_reads_input {
                true => slices(&inputs),
                false => inputs.iter().map(|_| Slice::empty()).collect(),
            },
            output: if backward_reads_output { Slice::from(&output[..]) } else { Slice::empty() },
            grad_output: SliceMut::from(&mut grad_output[..]),
            grad_inputs: &mut grad_inputs.iter_mut().map(|grad| SliceMut::from(&mut grad[..])).collect::<Vec<_>>(),
            params: &slices(params),
            params_rounded: &slices(&params_rounded),
            grad_params: &mut grad_params.iter_mut().map(|grad| SliceMut::from(&mut grad[..])).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::from(&self.saved[..]),
            scratch: SliceMut::from(&mut self.scratch[..]),
        };
        self.layer.backward(pass, io).expect("backward");
        Gradients { inputs: grad_inputs.iter().map(|grad| widen(grad)).collect(), params: grad_params }
    }
}

fn narrow_all(tensors: &[Vec<f32>]) -> Vec<Vec<bf16>> {
    tensors.iter().map(|tensor| narrow(tensor)).collect()
}

fn slices<T>(tensors: &[Vec<T>]) -> Vec<Slice<'_>>
where
    for<'a> Slice<'a>: From<&'a [T]>,
{
    tensors.iter().map(|tensor| Slice::from(&tensor[..])).collect()
}
