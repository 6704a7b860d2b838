use super::*;
use crate::device::{Slice, SliceMut};
use crate::model::{Backward, Forward, Pass};

/// A convolution as `[[model.layers]]` has it, over images of a shape.
pub(super) struct Case {
    pub input: Shape,
    keys: &'static str,
}

const fn case(input: (usize, usize, usize), keys: &'static str) -> Case {
    Case { input: Shape { h: input.0, w: input.1, c: input.2 }, keys }
}

pub(super) const CASES: &[Case] = &[
    // 1x1: a plain product, and one that skips pixels.
    case((5, 4, 7), "filters = 9\nkernel = 1"),
    case((5, 6, 3), "filters = 4\nkernel = 1\nstride = 2"),
    // 3x3 in all paddings, with one, three and many channels.
    case((28, 28, 1), "filters = 32\nkernel = 3\npadding = \"same\"\nactivation = \"relu\""),
    case((9, 7, 3), "filters = 17\nkernel = 3\npadding = \"valid\""),
    case((7, 7, 32), "filters = 20\nkernel = 3\npadding = 1\nactivation = \"relu\""),
    case((6, 9, 5), "filters = 6\nkernel = 3\npadding = 2"),
    // Strides: in step with the size or not, larger than the kernel, different on each axis.
    case((8, 8, 4), "filters = 8\nkernel = 3\nstride = 2\npadding = \"same\""),
    case((9, 7, 4), "filters = 8\nkernel = 3\nstride = 2\npadding = 1\nactivation = \"tanh\""),
    case((11, 10, 2), "filters = 3\nkernel = 2\nstride = 3"),
    case((10, 11, 2), "filters = 3\nkernel = [3, 2]\nstride = [2, 3]\npadding = [2, 0]"),
    case((23, 23, 3), "filters = 10\nkernel = 11\nstride = 4\npadding = 2\nactivation = \"relu\""),
    // Even and large kernels; a kernel larger than the image.
    case((6, 6, 3), "filters = 4\nkernel = 2\npadding = \"same\""),
    case((9, 8, 6), "filters = 5\nkernel = 5\npadding = 2\nactivation = \"sigmoid\""),
    case((3, 4, 2), "filters = 5\nkernel = 7\npadding = \"same\"\nbias = false"),
    case((1, 1, 3), "filters = 2\nkernel = 3\npadding = 1"),
    // Groups, down to depthwise with one and with several filters a channel.
    case((6, 7, 8), "filters = 12\nkernel = 3\npadding = 1\ngroups = 4"),
    case((7, 5, 6), "filters = 4\nkernel = 3\nstride = 2\npadding = 1\ngroups = 2\nactivation = \"relu\""),
    case((8, 8, 43), "filters = 43\nkernel = 3\npadding = 1\ngroups = 43\nactivation = \"relu\""),
    case((9, 6, 5), "filters = 10\nkernel = 3\nstride = 2\npadding = \"same\"\ngroups = 5"),
    // Winograd's transforms: tiles of 7 and of 8 values, filters of 3x3 and 5x5, all kinds of borders.
    case((13, 13, 16), "filters = 32\nkernel = 3\npadding = 1\nactivation = \"sigmoid\"\nalgorithm = \"winograd\""),
    case((8, 14, 32), "filters = 16\nkernel = 3\nactivation = \"relu\"\nalgorithm = \"winograd\""),
    case((9, 7, 16), "filters = 16\nkernel = 5\npadding = \"same\"\nbias = false\nalgorithm = \"winograd\""),
    case((8, 4, 16), "filters = 48\nkernel = 5\npadding = [2, 4]\nalgorithm = \"winograd\""),
    case((1, 2, 16), "filters = 16\nkernel = 3\npadding = 1\nalgorithm = \"winograd\""),
];

/// Everything that a forward and a backward call write.
#[derive(PartialEq)]
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

/// What goes in; the weight in the arena's layout, (KH, KW, C / groups, F).
struct Values {
    x: Vec<f32>,
    dy: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    pub fn spec(&self) -> Conv2d {
        toml::from_str(self.keys).unwrap_or_else(|error| panic!("{}: {error}", self.keys))
    }

    fn values(&self, batch: usize) -> Values {
        let inferred = self.spec().infer(&[self.input]).unwrap();
        let values = |len: usize, seed: usize| {
            (0..len).map(|i| ((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.45).collect::<Vec<_>>()
        };
        let bias = inferred.params.get(1).map_or(vec![], |bias| values(bias.len(), 4));
        Values {
            x: values(batch * self.input.len(), 1),
            dy: values(batch * inferred.output.len(), 2),
            weight: values(inferred.params[0].len(), 3),
            bias,
        }
    }

    /// Forward and backward of the layer built for `built` samples, on `threads` threads, from poisoned buffers.
    fn run(&self, values: &Values, batch: usize, built: usize, threads: usize) -> Results {
        let spec = self.spec();
        let output = spec.infer(&[self.input]).unwrap().output;
        let build = Build { inputs: &[self.input], batch: built, threads, ..Build::default() };
        let mut layer = spec.build(&build).unwrap();
        let pass = Pass { batch, training: true, first_sample: 0, share: 1.0 };
        let poison = |len: usize| vec![f32::NAN; len];
        let (mut y, mut dx) = (poison(batch * output.len()), poison(values.x.len()));
        let (mut dweight, mut dbias) = (poison(values.weight.len()), poison(values.bias.len()));
        let (mut dy, mut scratch) = (values.dy.clone(), poison(layer.scratch_bytes() / 4));
        let params: Vec<Slice> =
            [&values.weight, &values.bias].into_iter().filter(|p| !p.is_empty()).map(|p| p[..].into()).collect();

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
            let grads = [&mut dweight, &mut dbias].into_iter().filter(|p| !p.is_empty());
            let mut grad_params: Vec<SliceMut> = grads.map(|p| (&mut p[..]).into()).collect();
            let backward = Backward {
                inputs: &[values.x[..].into()],
                output: if spec.activation == Activation::None { Slice::empty() } else { y[..].into() },
                grad_output: (&mut dy[..]).into(),
                grad_inputs: &mut [(&mut dx[..]).into()],
                params: &params,
                params_rounded: &[],
                grad_params: &mut grad_params,
                factors: SliceMut::empty(),
                input_sums: SliceMut::empty(),
                saved: Slice::empty(),
                scratch: (&mut scratch[..]).into(),
            };
            layer.backward(&pass, backward).unwrap();
        });
        Results { y, dx, dweight, dbias }
    }

    /// The definition, term by term in f64.
    fn reference(&self, values: &Values, batch: usize) -> [Vec<f64>; 4] {
        let spec = self.spec();
        let g = spec.geometry(&[self.input]).unwrap();
        let (input, output) = (g.input, g.output);
        let mut y: Vec<f64> = (0..batch * output.len())
            .map(|at| values.bias.get(at % output.c).map_or(0.0, |&bias| f64::from(bias)))
            .collect();
        let mut terms = Vec::new();
        for (at, y) in y.iter_mut().enumerate() {
            let (f, ow, oh) = (at % output.c, at / output.c % output.w, at / (output.c * output.w) % output.h);
            let image = at / output.len();
            for kh in g.rows.taps(oh) {
                for kw in g.columns.taps(ow) {
                    for c in 0..g.channels() {
                        let (ih, iw) = (g.rows.position(oh, kh), g.columns.position(ow, kw));
                        let channel = f / g.filters() * g.channels() + c;
                        let x = ((image * input.h + ih) * input.w + iw) * input.c + channel;
                        let weight = ((kh * g.columns.size + kw) * g.channels() + c) * output.c + f;
                        *y += f64::from(values.x[x]) * f64::from(values.weight[weight]);
                        terms.push((at, x, weight));
                    }
                }
            }
        }
        let mut dy: Vec<f64> = values.dy.iter().map(|&dy| f64::from(dy)).collect();
        for (y, dy) in y.iter_mut().zip(&mut dy) {
            match spec.activation {
                Activation::None => {}
                Activation::Relu => (*y, *dy) = if *y > 0.0 { (*y, *dy) } else { (0.0, 0.0) },
                Activation::Sigmoid => {
                    *y = 1.0 / (1.0 + (-*y).exp());
                    *dy *= *y * (1.0 - *y);
                }
                Activation::Tanh => {
                    *y = y.tanh();
                    *dy *= 1.0 - *y * *y;
                }
            }
        }
        let mut dx = vec![0.0; values.x.len()];
        let mut dweight = vec![0.0; values.weight.len()];
        let mut dbias = vec![0.0; values.bias.len()];
        for (at, x, weight) in terms {
            dx[x] += dy[at] * f64::from(values.weight[weight]);
            dweight[weight] += dy[at] * f64::from(values.x[x]);
        }
        if !dbias.is_empty() {
            dy.iter().enumerate().for_each(|(at, dy)| dbias[at % output.c] += dy);
        }
        [y, dx, dweight, dbias]
    }
}

fn assert_close(what: &str, case: &Case, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1.0, |scale: f64, x| scale.max(x.abs()));
    let tolerance = if case.keys.contains("winograd") { 2e-5 } else { 2e-6 };
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= tolerance * scale,
            "{what}[{at}] is {found}, expected {expected}, for {} over {}",
            case.keys.replace('\n', ", "),
            case.input
        );
    }
}

#[test]
fn all_three_products_equal_the_definition() {
    for case in CASES {
        for batch in [1, 5] {
            let values = case.values(batch);
            let found = case.run(&values, batch, batch, 1);
            let [y, dx, dweight, dbias] = case.reference(&values, batch);
            assert_close("y", case, &found.y, &y);
            assert_close("dx", case, &found.dx, &dx);
            assert_close("dweight", case, &found.dweight, &dweight);
            assert_close("dbias", case, &found.dbias, &dbias);
        }
    }
}

#[test]
fn blocks_of_a_part_add_up() {
    // 35 images are more than there are parts, and a block holds one of the first kind, two of the second.
    for case in [
        case((96, 96, 4), "filters = 2\nkernel = 1"),
        case((8, 8, 120), "filters = 120\nkernel = 3\npadding = 1\ngroups = 120"),
    ] {
        let values = case.values(35);
        let found = case.run(&values, 35, 35, 2);
        let [y, dx, dweight, dbias] = case.reference(&values, 35);
        assert_close("y", &case, &found.y, &y);
        assert_close("dx", &case, &found.dx, &dx);
        assert_close("dweight", &case, &found.dweight, &dweight);
        assert_close("dbias", &case, &found.dbias, &dbias);
    }
}

#[test]
fn chunks_of_transformed_tiles_add_up() {
    // A tile an image, and more of them than a chunk holds. The backward of tanh must go over each value once.
    let keys = "filters = 16\nkernel = 3\npadding = 1\nactivation = \"tanh\"\nalgorithm = \"winograd\"";
    let case = case((1, 2, 16), keys);
    let values = case.values(2500);
    let found = case.run(&values, 2500, 2500, 2);
    let [y, dx, dweight, dbias] = case.reference(&values, 2500);
    assert_close("y", &case, &found.y, &y);
    assert_close("dx", &case, &found.dx, &dx);
    assert_close("dweight", &case, &found.dweight, &dweight);
    assert_close("dbias", &case, &found.dbias, &dbias);
}

#[test]
fn threads_do_not_change_a_bit() {
    for case in CASES {
        let values = case.values(37);
        let one = case.run(&values, 37, 37, 1);
        for threads in [2, 3] {
            assert!(one == case.run(&values, 37, 37, threads), "{}, {threads} threads", case.keys);
        }
    }
}

#[test]
fn a_short_batch_equals_the_same_samples_of_a_full_one() {
    for case in CASES {
        let values = case.values(3);
        let found = case.run(&values, 3, 40, 2);
        let [y, dx, dweight, dbias] = case.reference(&values, 3);
        assert_close("y", case, &found.y, &y);
        assert_close("dx", case, &found.dx, &dx);
        assert_close("dweight", case, &found.dweight, &dweight);
        assert_close("dbias", case, &found.dbias, &dbias);
    }
}

#[test]
fn without_a_use_for_dx_the_other_gradients_are_the_same() {
    let case = &CASES[4];
    let values = case.values(5);
    let whole = case.run(&values, 5, 5, 1);
    let spec = case.spec();
    let build = Build { inputs: &[case.input], batch: 5, threads: 1, ..Build::default() };
    let mut layer = spec.build(&build).unwrap();
    let (mut dy, mut scratch) = (values.dy.clone(), vec![f32::NAN; layer.scratch_bytes() / 4]);
    let (mut dweight, mut dbias) = (vec![f32::NAN; values.weight.len()], vec![f32::NAN; values.bias.len()]);
    let backward = Backward {
        inputs: &[values.x[..].into()],
        output: whole.y[..].into(),
        grad_output: (&mut dy[..]).into(),
        grad_inputs: &mut [SliceMut::empty()],
        params: &[values.weight[..].into(), values.bias[..].into()],
        params_rounded: &[],
        grad_params: &mut [(&mut dweight[..]).into(), (&mut dbias[..]).into()],
        factors: SliceMut::empty(),
        input_sums: SliceMut::empty(),
        saved: Slice::empty(),
        scratch: (&mut scratch[..]).into(),
    };
    layer.backward(&Pass { batch: 5, training: true, first_sample: 0, share: 1.0 }, backward).unwrap();
    assert!(dweight == whole.dweight && dbias == whole.dbias);
}

#[test]
fn the_tables_of_a_block_stay_within_32_bits() {
    // A block of 6250 such images would fit the cache by its input, but its output has 6.25e9 values.
    let case = case((1, 1, 1), "filters = 1000000\nkernel = 1");
    let (inputs, batch) = (&[case.input], 100_000);
    let layer = case.spec().build(&Build { inputs, batch, threads: 1, ..Build::default() });
    assert!(layer.unwrap().scratch_bytes() > 0);
}

#[test]
fn what_does_not_fit_is_named() {
    let error = |input, keys| case(input, keys).spec().infer(&[case(input, keys).input]).unwrap_err();
    assert_eq!(
        error((7, 7, 64), "filters = 8\nkernel = 3\ngroups = 3"),
        "groups = 3 must divide the 64 channels of its input (7x7x64) and its 8 filters"
    );
    assert_eq!(
        error((9, 9, 16), "filters = 32\nkernel = 3\nstride = 2\nalgorithm = \"winograd\""),
        "algorithm = \"winograd\" needs a stride of 1; leave the choice to \"auto\""
    );
    assert!(error((2, 2, 3), "filters = 8\nkernel = 3").contains("3x3 kernel does not fit into its input, 2x2x3"));
    assert!(error((8, 8, 3), "filters = 8\nkernel = 3\npadding = 3").contains("padding 3 is not smaller"));
    assert!(error((8, 8, 3), "filters = 9223372036854775807\nkernel = 3").contains("weight"));
    assert!(
        error((8, 8, 3), "filters = 8\nkernel = 9223372036854775807\npadding = \"same\"").contains("smaller sizes"),
    );
    let padded = error((1, 1, 1), "filters = 1\nkernel = 40000\npadding = 39999");
    assert!(padded.contains("its padded input would be 79999x79999x1, more than 2^32"), "{padded}");
    let padded = error((30000, 30000, 1), "filters = 4\nkernel = 5001\npadding = \"same\"");
    assert!(padded.contains("its padded output gradient would be 37500x37500x4, more than 2^32"), "{padded}");
}

#[test]
fn the_algorithm_is_chosen_by_shapes() {
    let pays = |input: (usize, usize, usize), keys, batch| {
        let case = case(input, keys);
        winograd::pays(&case.spec().geometry(&[case.input]).unwrap(), batch)
    };
    // AlexNet's five.
    assert!(!pays((227, 227, 3), "filters = 96\nkernel = 11\nstride = 4", 32));
    assert!(pays((27, 27, 96), "filters = 256\nkernel = 5\npadding = 2", 32));
    assert!(pays((13, 13, 256), "filters = 384\nkernel = 3\npadding = 1", 32));
    assert!(pays((13, 13, 384), "filters = 384\nkernel = 3\npadding = 1", 32));
    assert!(pays((13, 13, 384), "filters = 256\nkernel = 3\npadding = 1", 32));
    // Too few images to transform the filter for.
    assert!(!pays((13, 13, 384), "filters = 384\nkernel = 3\npadding = 1", 1));
    assert!(!pays((13, 13, 384), "filters = 384\nkernel = 3\npadding = 1\nstride = 2", 32));
    assert!(!pays((13, 13, 384), "filters = 384\nkernel = 3\npadding = 1\ngroups = 2", 32));
}
