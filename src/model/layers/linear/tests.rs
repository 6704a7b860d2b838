use super::*;
use crate::device::{Slice, SliceMut};
use crate::model::{Backward, Forward, Pass};

#[derive(PartialEq)]
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

struct Values {
    x: Vec<f32>,
    dy: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// Values that depend on the index; `batch` samples.
fn values(batch: usize, inputs: usize, units: usize) -> Values {
    let values = |len: usize, seed: usize| {
        (0..len).map(|i| ((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.45).collect::<Vec<_>>()
    };
    Values {
        x: values(batch * inputs, 1),
        dy: values(batch * units, 2),
        weight: values(units * inputs, 3),
        bias: values(units, 4),
    }
}

/// Forward and backward of a layer built for `built` samples, on `threads` threads, from poisoned buffers.
fn run(values: &Values, batch: usize, built: usize, threads: usize, activation: Activation) -> Results {
    let (inputs, units) = (values.x.len() / batch, values.bias.len());
    let spec = Linear { units, bias: true, activation, init: Initializer::default(), bias_init: 0.0 };
    let shape = [Shape::vector(inputs)];
    let build = Build { inputs: &shape, batch: built, threads, ..Build::default() };
    let mut layer = spec.build(&build).unwrap();
    let pass = Pass { batch, training: true, first_sample: 0, share: 1.0 };
    let poison = |len: usize| vec![f32::NAN; len];
    let (mut y, mut dx) = (poison(batch * units), poison(values.x.len()));
    let (mut dweight, mut dbias) = (poison(values.weight.len()), poison(units));
    let (mut dy, mut scratch) = (values.dy.clone(), poison(layer.scratch_bytes() / 4));
    let params: [Slice; 2] = [values.weight[..].into(), values.bias[..].into()];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let forward = Forward {
            inputs: &[values.x[..].into()],
            output: (&mut y[..]).into(),
            params: &params,
            params_rounded: &[],
            saved: SliceMut::empty(),
            scratch: (&mut scratch[..]).into(),
        };
        layer.forward(&pass, forward).unwrap();
        scratch.fill(f32::NAN);
        let backward = Backward {
            inputs: &[values.x[..].into()],
            output: y[..].into(),
            grad_output: (&mut dy[..]).into(),
            grad_inputs: &mut [(&mut dx[..]).into()],
            params: &params,
            params_rounded: &[],
            grad_params: &mut [(&mut dweight[..]).into(), (&mut dbias[..]).into()],
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: (&mut scratch[..]).into(),
        };
        layer.backward(&pass, backward).unwrap();
    });
    Results { y, dx, dweight, dbias }
}

/// The definition in f64; `relu` or nothing.
fn reference(values: &Values, batch: usize, relu: bool) -> [Vec<f64>; 4] {
    let (inputs, units) = (values.x.len() / batch, values.bias.len());
    let mut results = [batch * units, batch * inputs, units * inputs, units].map(|len| vec![0.0; len]);
    let [y, dx, dweight, dbias] = &mut results;
    for (n, o) in (0..batch).flat_map(|n| (0..units).map(move |o| (n, o))) {
        let (x, weight) = (&values.x[n * inputs..][..inputs], &values.weight[o * inputs..][..inputs]);
        let sum: f64 = x.iter().zip(weight).map(|(&x, &weight)| f64::from(x) * f64::from(weight)).sum();
        let sum = sum + f64::from(values.bias[o]);
        let (sum, dy) = if relu && sum <= 0.0 { (0.0, 0.0) } else { (sum, f64::from(values.dy[n * units + o])) };
        y[n * units + o] = sum;
        dbias[o] += dy;
        for i in 0..inputs {
            dx[n * inputs + i] += dy * f64::from(weight[i]);
            dweight[o * inputs + i] += dy * f64::from(x[i]);
        }
    }
    results
}

fn check(batch: usize, built: usize, inputs: usize, units: usize, activation: Activation) {
    let values = values(batch, inputs, units);
    let found = run(&values, batch, built, 1, activation);
    let expected = reference(&values, batch, activation == Activation::Relu);
    for (number, found) in [&found.y, &found.dx, &found.dweight, &found.dbias].into_iter().enumerate() {
        let scale = expected[number].iter().fold(1.0, |scale: f64, x| scale.max(x.abs()));
        for (at, (&found, &expected)) in found.iter().zip(&expected[number]).enumerate() {
            let what = ["y", "dx", "dweight", "dbias"][number];
            assert!(
                (f64::from(found) - expected).abs() <= 2e-6 * scale,
                "{batch} of {built} samples, {inputs} to {units}: {what}[{at}] is {found}, expected {expected}"
            );
        }
    }
    for threads in [2, 3] {
        assert!(found == run(&values, batch, built, threads, activation), "{threads} threads");
    }
}

#[test]
fn all_three_products_equal_the_definition() {
    for (batch, inputs, units) in [(1, 1, 1), (3, 7, 5), (16, 100, 10), (33, 31, 17), (64, 257, 49)] {
        check(batch, batch, inputs, units, Activation::Relu);
        check(batch, batch + 3, inputs, units, Activation::None);
    }
    // More than one block of the weight in backward-data.
    check(5, 5, 197, 391, Activation::Relu);
}

#[test]
fn an_image_and_a_giant_are_refused() {
    let spec: Linear = toml::from_str("units = 10").unwrap();
    assert_eq!(
        spec.infer(&[Shape::new(7, 7, 64)]).unwrap_err(),
        "takes a vector, but its input is 7x7x64; put a flatten or global_avg_pool layer before it"
    );
    let spec: Linear = toml::from_str("units = 9223372036854775807").unwrap();
    assert!(spec.infer(&[Shape::vector(3)]).unwrap_err().contains("its weight would be 9223372036854775807x3, more"));
}
