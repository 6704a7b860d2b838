//! What must hold of single layers beside their gradients and PyTorch's numbers.

use crate::harness::{Section, evaluation, training, values, with_threads};
use lockstep::model::params::Init;
use lockstep::model::{Pass, Shape};

fn section(kind: &str, keys: &str, inputs: &[Shape]) -> Section {
    Section { kind: kind.to_owned(), keys: keys.to_owned(), inputs: inputs.to_vec() }
}

#[test]
fn dropout_drops_its_rate_and_keeps_the_mean() {
    let section = section("dropout", "rate = 0.3", &[Shape::vector(50_001)]);
    let y = section.build(2).forward(&training(2), &[vec![1.0; 100_002]], &[]);
    let dropped = y.iter().filter(|y| **y == 0.0).count() as f32 / 100_002.0;
    // Five standard deviations of the share: 5 * sqrt(0.3 * 0.7 / 1e5).
    assert!((dropped - 0.3).abs() < 0.0073, "{dropped} dropped");
    assert!(y.iter().all(|y| *y == 0.0 || (y - 1.0 / 0.7).abs() < 1e-4), "the kept are divided by 0.7");
}

#[test]
fn dropout_depends_on_the_sample_not_on_its_batch() {
    let section = section("dropout", "", &[Shape::vector(40)]);
    let x = values(120, 0);
    let together = section.build(3).forward(&training(3), std::slice::from_ref(&x), &[]);
    for (i, (x, y)) in x.chunks(40).zip(together.chunks(40)).enumerate() {
        let pass = Pass { first_sample: training(1).first_sample + i as u64, ..training(1) };
        assert_eq!(section.build(1).forward(&pass, &[x.to_vec()], &[]), y, "sample {i}");
    }
    assert_ne!(
        together[..40].iter().map(|y| *y == 0.0).collect::<Vec<_>>(),
        together[40..80].iter().map(|y| *y == 0.0).collect::<Vec<_>>()
    );
}

/// 7500 rows are three chunks, the last one short; the mean is far from zero and drifts from chunk to chunk.
#[test]
fn batch_statistics_are_exact_over_many_chunks() {
    let (pixels, c) = (50 * 50 * 3, 5);
    let section = section("batch_norm", "", &[Shape::new(50, 50, c)]);
    let x: Vec<f32> = values(pixels * c, 3).iter().enumerate().map(|(i, x)| x + 100.0 + i as f32 * 1e-4).collect();
    let params = [vec![1.0; c], vec![0.0; c], vec![0.0; c], vec![1.0; c]];
    let mut subject = section.build(3);
    let pass = Pass { share: 0.25, ..training(3) };
    let y = subject.forward(&pass, std::slice::from_ref(&x), &params);
    let grads = subject.backward(&pass, std::slice::from_ref(&x), &[], &vec![1.0; x.len()], &params);
    for channel in 0..c {
        let column = |x: &[f32]| x.iter().skip(channel).step_by(c).map(|x| f64::from(*x)).collect::<Vec<_>>();
        let x = column(&x);
        let mean = x.iter().sum::<f64>() / pixels as f64;
        let squares = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        let inverse_std = 1.0 / (squares / pixels as f64 + 1e-5).sqrt();
        for (x, y) in x.iter().zip(column(&y)) {
            assert!(((x - mean) * inverse_std - y).abs() < 2e-5, "channel {channel}: {x} gave {y}");
        }
        let slot = |param: usize| f64::from(grads.params[param][channel]);
        assert!((slot(2) - 0.25 * mean).abs() < 1e-5, "running_mean");
        assert!((slot(3) - 0.25 * squares / (pixels - 1) as f64).abs() < 1e-5, "running_var");
    }
}

#[test]
fn a_batch_of_one_value_normalizes_to_the_bias() {
    let section = section("batch_norm", "", &[Shape::vector(2)]);
    let params = [vec![2.0, 3.0], vec![0.5, -0.5], vec![0.0; 2], vec![1.0; 2]];
    let mut subject = section.build(4);
    let y = subject.forward(&training(1), &[vec![7.0, -7.0]], &params);
    assert_eq!(y, [0.5, -0.5]);
    let grads = subject.backward(&training(1), &[vec![7.0, -7.0]], &y, &[1.0, 1.0], &params);
    assert_eq!(grads.params[3], [0.0, 0.0]);
    assert_eq!(grads.inputs[0], [0.0, 0.0]);
}

/// As in PyTorch. Behind a ReLU without a mask, windows of zeros are common.
#[test]
fn of_equal_values_the_first_has_the_gradient() {
    let image = Shape::new(4, 6, 25);
    let mut subject = section("max_pool", "size = 2", &[image]).build(1);
    let x = vec![vec![0.5; image.len()]];
    let y = subject.forward(&training(1), &x, &[]);
    let dy = values(y.len(), 9);
    let found = &subject.backward(&training(1), &x, &y, &dy, &[]).inputs[0];
    for (at, found) in found.iter().enumerate() {
        let (h, w, channel) = (at / (6 * 25), at / 25 % 6, at % 25);
        let first = h % 2 == 0 && w % 2 == 0;
        let expected = if first { dy[(h / 2 * 3 + w / 2) * 25 + channel] } else { 0.0 };
        assert_eq!(*found, expected, "channel {channel} of ({h}, {w})");
    }
}

#[test]
fn broken_values_are_passed_on() {
    let image = Shape::new(3, 3, 17);
    for (kind, keys) in [
        ("relu", ""),
        ("max_pool", "size = 2\nstride = 1"),
        ("avg_pool", "size = 2\nstride = 1"),
        ("global_max_pool", ""),
        ("global_avg_pool", ""),
        ("lrn", ""),
        ("softmax", ""),
    ] {
        for broken in 0..image.len() {
            let mut x = values(image.len(), 1);
            x[broken] = f32::NAN;
            let y = section(kind, keys, &[image]).build(1).forward(&evaluation(1), &[x], &[]);
            assert!(y.iter().any(|y| y.is_nan()), "{kind} hides a NaN at {broken}");
        }
    }
}

#[test]
fn biases_start_as_the_config_says() {
    for (kind, keys, input) in
        [("conv2d", "filters = 2\nkernel = 3", Shape::new(8, 8, 16)), ("linear", "units = 2", Shape::vector(16))]
    {
        let first = |keys: &str| section(kind, keys, &[input]).infer().params[1].init;
        assert_eq!(first(keys), Init::Constant(0.0), "{kind}");
        assert_eq!(first(&format!("{keys}\nbias_init = 1.0")), Init::Constant(1.0), "{kind}");
    }
}

/// Buffers long enough to be cut into tasks.
#[test]
fn large_buffers_do_not_depend_on_threads() {
    let image = Shape::new(33, 35, 21);
    for (kind, keys, inputs) in [
        ("conv2d", "filters = 9\nkernel = 3\npadding = 1", vec![image]),
        ("linear", "units = 700", vec![Shape::vector(900)]),
        ("max_pool", "size = 3\nstride = 2\npadding = 1", vec![image]),
        ("avg_pool", "size = 3\nstride = 2\npadding = 1", vec![image]),
        ("global_avg_pool", "", vec![image]),
        ("global_max_pool", "", vec![image]),
        ("lrn", "", vec![image]),
        ("batch_norm", "activation = \"relu\"", vec![image]),
        ("dropout", "", vec![image]),
        ("flatten", "", vec![image]),
        ("tanh", "", vec![image]),
        ("softmax", "", vec![image]),
        ("add", "activation = \"relu\"", vec![image, image]),
        ("concat", "", vec![image, image]),
    ] {
        let section = section(kind, keys, &inputs);
        let run = || {
            let inputs: Vec<_> = inputs.iter().map(|shape| values(3 * shape.len(), 1)).collect();
            let params: Vec<_> = section.infer().params.iter().map(|spec| vec![0.9; spec.len()]).collect();
            let mut subject = section.build(3);
            let y = subject.forward(&training(3), &inputs, &params);
            let dy = values(y.len(), 9);
            (subject.backward(&training(3), &inputs, &y, &dy, &params), y)
        };
        assert_eq!(with_threads(1, run), with_threads(3, run), "{kind}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (a, b, vector) = (Shape::new(8, 8, 16), Shape::new(8, 7, 16), Shape::vector(16));
    for (kind, keys, inputs, expected) in [
        ("max_pool", "size = 9", vec![a], "a 9x9 window does not fit into 8x8x16 (after padding 0)"),
        ("avg_pool", "size = 2\npadding = 2", vec![a], "padding 2 with a 2x2 window"),
        ("relu", "", vec![a, b], "takes one input, but `from` names 2"),
        ("add", "", vec![a], "takes two or more inputs"),
        ("add", "", vec![a, a, b], "the first is 8x8x16 and number 3 is 8x7x16"),
        ("concat", "", vec![a, b], "the first is 8x8x16 and number 2 is 8x7x16"),
        (
            "conv2d",
            "filters = 2\nkernel = 1\nbias = false\nbias_init = 1.0",
            vec![a],
            "bias_init = 1 has no bias to set",
        ),
        ("linear", "units = 2\nbias = false\nbias_init = 1.0", vec![vector], "bias_init = 1 has no bias to set"),
    ] {
        let refusal = section(kind, keys, &inputs).refusal();
        assert!(refusal.contains(expected), "{kind} {keys}: {refusal}");
    }
}
