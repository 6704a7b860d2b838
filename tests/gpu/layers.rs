//! Every layer, forward and backward, in every precision, against the CPU's f32 layer on the same values.

use crate::emulator;
use crate::operands::{Call, Operands, Results};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::model::{Shape, layers};
use std::panic::{self, AssertUnwindSafe};

/// Samples that layers are built for; calls have as many, and fewer.
const BATCH: usize = 3;

#[test]
fn layers_agree_with_those_of_the_cpu() {
    let Some(gpu) = emulator::gpu() else { return };
    println!("{:<90} {:>9} {:>9} {:>14}", "layer", "precision", "direction", "relative error");
    let (cases, mut wrong) = (cases(), Vec::new());
    for kind in layers::REGISTRY {
        assert!(cases.iter().any(|case| case.kind == kind.name), "no case of {}", kind.name);
    }
    for case in cases {
        for element in Element::ALL {
            wrong.extend(findings(case.kind, || check(&gpu, &case, element, false)));
        }
        if ["conv2d", "linear"].contains(&case.kind) {
            wrong.extend(findings(case.kind, || check(&gpu, &case, Element::F32, true)));
        }
    }
    assert!(wrong.is_empty(), "{} results are off:\n{}", wrong.len(), wrong.join("\n"));
}

/// What a check finds. A panic is one more finding, so that a GPU, which is not always at hand, shows all that is wrong at once.
pub fn findings(what: &str, check: impl FnOnce() -> Vec<String>) -> Vec<String> {
    panic::catch_unwind(AssertUnwindSafe(check)).unwrap_or_else(|_| vec![format!("{what}: a panic, see above")])
}

/// A layer as `[[model.layers]]` describes it.
#[derive(Clone, Debug)]
pub struct Case {
    pub kind: &'static str,
    /// Its keys, as TOML.
    pub keys: &'static str,
    pub inputs: Vec<Shape>,
    /// Whether it does the backward of a ReLU in front.
    pub masks_input: bool,
    /// Whether the reader of its output has done the backward of its own ReLU.
    pub grad_masked: bool,
    /// Whether it makes the gradient of a bias in front.
    pub sums_input: bool,
}

fn cases() -> Vec<Case> {
    [small(), large(), products(), convolutions()].concat()
}

const fn image(h: usize, w: usize, c: usize) -> Shape {
    Shape::new(h, w, c)
}

fn case(kind: &'static str, keys: &'static str, inputs: &[Shape]) -> Case {
    Case { kind, keys, inputs: inputs.to_vec(), masks_input: false, grad_masked: false, sums_input: false }
}

/// Packs of channels that are full and not, odd sizes, one channel, windows that overlap, leave gaps and hang over the edge.
fn small() -> Vec<Case> {
    let masking = |kind, keys, input| Case { masks_input: true, ..case(kind, keys, &[input]) };
    let summing = |keys, input| Case { sums_input: true, ..masking("max_pool", keys, input) };
    let mut cases = Vec::new();
    for input in [image(9, 7, 1), image(5, 8, 3), image(7, 7, 8), image(6, 9, 96)] {
        cases.extend([
            case("max_pool", "size = 3\nstride = 2", &[input]),
            case("max_pool", "size = 2\nstride = 3\npadding = 1", &[input]),
            case("max_pool", "size = 3\npadding = \"same\"\nstride = 1", &[input]),
            masking("max_pool", "size = 3\nstride = 2\npadding = 1", input),
            summing("size = 3\nstride = 2", input),
            summing("size = 2", input),
            summing("size = 2\nstride = 2\npadding = \"same\"", input),
            summing("size = 5\nstride = 2\npadding = 2", input),
            summing("size = 3\nstride = 1\npadding = 2", input),
            case("avg_pool", "size = 3\nstride = 2\npadding = 1", &[input]),
            case("avg_pool", "size = 2\nstride = 3", &[input]),
            case("global_avg_pool", "", &[input]),
            case("global_max_pool", "", &[input]),
            case("lrn", "alpha = 0.3", &[input]),
            case("lrn", "depth_radius = 2\nalpha = 0.3\nbias = 1.0", &[input]),
            masking("lrn", "depth_radius = 16\nalpha = 0.1\nbeta = 0.6", input),
            case("batch_norm", "", &[input]),
            case("batch_norm", "activation = \"relu\"", &[input]),
            Case { grad_masked: true, ..case("batch_norm", "activation = \"relu\"", &[input]) },
            case("dropout", "rate = 0.4", &[input]),
            case("softmax", "", &[input]),
            case("concat", "", &[input, Shape { c: 16, ..input }, Shape { c: 5, ..input }]),
            case("concat", "", &[Shape { c: 8, ..input }, Shape { c: 24, ..input }]),
            case("flatten", "", &[input]),
            case("relu", "", &[input]),
            Case { grad_masked: true, ..case("relu", "", &[input]) },
            case("sigmoid", "", &[input]),
            case("tanh", "", &[input]),
            case("add", "activation = \"relu\"", &[input, input]),
            case("add", "", &[input, input, input]),
        ]);
    }
    cases
}

/// More than the emulator's blocks do at once, tiles with an end, and channels beyond a block's.
fn large() -> Vec<Case> {
    vec![
        Case { sums_input: true, ..case("max_pool", "size = 3\nstride = 2", &[image(33, 35, 24)]) },
        // More packs of channels than threads, and more rows than parts.
        Case { sums_input: true, ..case("max_pool", "size = 2", &[image(4, 3, 2056)]) },
        Case { sums_input: true, ..case("max_pool", "size = 2\nstride = 1", &[image(600, 3, 8)]) },
        case("global_avg_pool", "", &[image(20, 20, 300)]),
        case("global_max_pool", "", &[image(3, 3, 520)]),
        case("lrn", "", &[image(9, 11, 256)]),
        case("lrn", "", &[image(2, 2, 2056)]),
        case("lrn", "depth_radius = 16", &[image(5, 5, 61)]),
        case("batch_norm", "activation = \"tanh\"", &[image(31, 33, 8)]),
        case("batch_norm", "", &[Shape::vector(530)]),
        case("dropout", "", &[Shape::vector(4099)]),
        case("softmax", "", &[Shape::vector(1000)]),
        case("flatten", "", &[image(6, 6, 70)]),
        case("flatten", "", &[Shape::vector(33)]),
    ]
}

fn products() -> Vec<Case> {
    let mut cases =
        vec![Case { grad_masked: true, ..case("linear", "units = 24\nactivation = \"relu\"", &[Shape::vector(32)]) }];
    for (inputs, keys) in [
        (1, "units = 1"),
        (37, "units = 70\nactivation = \"relu\""),
        (64, "units = 48\nactivation = \"relu\""),
        (64, "units = 40\nactivation = \"tanh\""),
        (50, "units = 33\nbias = false\nactivation = \"sigmoid\""),
        (24, "units = 16\nbias = false\nactivation = \"relu\""),
    ] {
        cases.push(case("linear", keys, &[Shape::vector(inputs)]));
    }
    cases
}

fn convolutions() -> Vec<Case> {
    let cases = [
        (image(5, 4, 7), "filters = 9\nkernel = 1"),
        (image(7, 6, 8), "filters = 16\nkernel = 3\npadding = 1\nactivation = \"relu\""),
        // So many pixels that the bias's gradient is summed in more parts than a block has lanes.
        (image(16, 16, 2), "filters = 33\nkernel = 1\nactivation = \"relu\""),
        (image(9, 7, 3), "filters = 40\nkernel = 3\npadding = \"same\"\nactivation = \"sigmoid\""),
        (image(6, 9, 5), "filters = 6\nkernel = 3\npadding = 2\nbias = false\nactivation = \"relu\""),
        (image(5, 5, 4), "filters = 3\nkernel = [3, 2]\npadding = [1, 0]\nbias = false\nactivation = \"tanh\""),
        // Strides that leave the last rows unseen, that skip pixels, that differ.
        (image(8, 8, 9), "filters = 8\nkernel = 3\nstride = 2\npadding = 1\nactivation = \"relu\""),
        (image(9, 7, 8), "filters = 4\nkernel = 1\nstride = 2"),
        (image(10, 11, 8), "filters = 3\nkernel = [3, 2]\nstride = [2, 3]\npadding = [2, 0]"),
        // More zeros behind than in front: arranged in blocks of one pixel.
        (image(6, 6, 9), "filters = 4\nkernel = 2\npadding = \"same\"\nactivation = \"relu\""),
        (image(8, 7, 8), "filters = 8\nkernel = [3, 4]\nstride = 2\npadding = \"same\"\ngroups = 4"),
        // Few channels and a stride: space to depth.
        (image(23, 23, 3), "filters = 10\nkernel = 11\nstride = 4\npadding = 2\nactivation = \"relu\""),
        (image(8, 9, 1), "filters = 5\nkernel = [2, 3]\nstride = 2\nactivation = \"relu\""),
        (image(9, 9, 3), "filters = 4\nkernel = 3\nstride = 2\npadding = \"same\"\nbias = false"),
        // Groups, down to depthwise.
        (image(6, 7, 8), "filters = 12\nkernel = 3\npadding = 1\ngroups = 4"),
        (image(5, 5, 6), "filters = 6\nkernel = 3\npadding = 1\ngroups = 6\nactivation = \"relu\""),
    ];
    let case = |(input, keys), masks| Case {
        kind: "conv2d",
        keys,
        inputs: vec![input],
        masks_input: masks,
        sums_input: false,
        grad_masked: masks && keys.contains("relu"),
    };
    cases.iter().flat_map(|&each| [false, true].map(|masks| case(each, masks))).collect()
}

/// Prints a line a direction; returns those that are off.
fn check(gpu: &Gpu, case: &Case, element: Element, tf32: bool) -> Vec<String> {
    let (precision, limit) = match element {
        Element::F32 if tf32 => ("tf32", 1e-3),
        Element::F32 => ("f32", 1e-5),
        Element::Bf16 => ("bf16", 1e-2),
        Element::F16 => ("f16", 1e-3),
    };
    let kind = layers::find(case.kind).expect("a layer's type");
    let table = toml::from_str(case.keys).expect("keys");
    let spec = (kind.parse)(table).unwrap_or_else(|error| panic!("{case:?}: {error}")).spec;
    let operands = Operands::new(case, &*spec, BATCH, element, tf32);
    let mut errors = [0f64; 2];
    for call in [Call::training(BATCH), Call::training(BATCH - 1), Call::evaluation(BATCH)] {
        let (found, expected) = (operands.on_gpu(gpu, &*spec, call), operands.on_cpu(&*spec, call));
        let again = operands.on_gpu(gpu, &*spec, call);
        assert!(bits(&found) == bits(&again), "{case:?} in {precision}: a second run gives other bits");
        // In a second run, as the first looks functions up; and a convolution may until it has met its buffers (conv2d.rs).
        assert!(case.kind == "conv2d" || again.allocations == 0, "{case:?} in {precision} allocates in a pass");
        for (direction, (found, expected)) in found.values.iter().zip(&expected.values).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                let error = relative_error(found, expected);
                // Not `max`, which loses a NaN.
                let greatest = &mut errors[direction];
                *greatest = if greatest.is_nan() || error <= *greatest { *greatest } else { error };
            }
        }
    }
    let shapes: Vec<String> = case.inputs.iter().map(Shape::to_string).collect();
    let masks = if case.masks_input { " behind a relu" } else { "" };
    let sums = if case.sums_input { " with sums" } else { "" };
    let name = format!("{} {}{masks}{sums} on {}", case.kind, case.keys.replace('\n', " "), shapes.join(", "));
    print_errors(&name, precision, limit, errors)
}

/// A line for forward and one for backward; returns those that are not below the limit.
pub fn print_errors(name: &str, precision: &str, limit: f64, errors: [f64; 2]) -> Vec<String> {
    let lines = ["forward", "backward"].into_iter().zip(errors).map(|(direction, error)| {
        let line = format!("{name:<90} {precision:>9} {direction:>9} {error:>14.2e}");
        println!("{line}");
        (error < limit, line)
    });
    lines.filter(|(right, _)| !right).map(|(_, line)| line).collect()
}

fn bits(results: &Results) -> Vec<u32> {
    results.values.iter().flatten().flatten().map(|value| value.to_bits()).collect()
}

/// The norm of the difference over the norm of what was expected.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    match norm(&mut expected.iter().map(|value| f64::from(*value))) {
        0.0 => difference,
        length => difference / length,
    }
}
