//! Matrix products and the linear layer on a GPU, here an emulated one, against plain loops and the CPU's layer.

#[path = "common/emulator.rs"]
mod emulator;
#[path = "common/values.rs"]
mod values;

use emulator::gpu;
use lockstep::device::cuda::cublaslt::{Epilogue, Matmul, Operands, Product};
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Place, Slice, SliceMut};
use lockstep::model::{Backward, Build, Forward, Layer, LayerSpec, Pass, Shape, layers};
use values::{Values, distance};

#[test]
fn products_agree_with_plain_loops() {
    let lengths = [(1, 1, 1), (3, 5, 7), (16, 8, 32), (33, 17, 65)];
    let types = [Element::F32, Element::Bf16, Element::F16];
    let epilogues = [Epilogue::None, Epilogue::Relu, Epilogue::Bias, Epilogue::BiasRelu];
    for (m, n, k) in lengths {
        for (factors, result) in types.into_iter().flat_map(|of| [(of, of), (of, Element::F32)]) {
            for (number, epilogue) in epilogues.into_iter().enumerate() {
                let (transpose_left, transpose_right) = (number % 2 == 1, number / 2 == 1);
                let product =
                    Product { m, n, k, transpose_left, transpose_right, factors, result, tf32: false, epilogue };
                check(&product, m.max(k));
            }
        }
    }
}

/// The last batch of an epoch has fewer samples than the product was planned for; then comes a whole one again.
#[test]
fn a_planned_product_takes_fewer_samples() {
    let product = Product {
        m: 24,
        n: 16,
        k: 32,
        transpose_left: false,
        transpose_right: true,
        factors: Element::F32,
        result: Element::F32,
        tf32: false,
        epilogue: Epilogue::Bias,
    };
    check(&product, 5);
    check(&Product { transpose_left: true, transpose_right: false, epilogue: Epilogue::SumLeft, ..product }, 7);
}

#[test]
fn sums_of_the_left_matrix_come_with_the_product_or_not_at_all() {
    let product = |m, n| Product {
        m,
        n,
        k: 9,
        transpose_left: true,
        transpose_right: false,
        factors: Element::Bf16,
        result: Element::F32,
        tf32: false,
        epilogue: Epilogue::SumLeft,
    };
    check(&product(16, 24), 9);
    assert!(Matmul::new(gpu(), &product(15, 24)).unwrap().is_none());
}

/// TF32 cuts factors to 11 significant bits, but only where it is asked for.
#[test]
fn tf32_is_not_used_unasked() {
    let product = |tf32| Product {
        m: 4,
        n: 4,
        k: 64,
        transpose_left: false,
        transpose_right: false,
        factors: Element::F32,
        result: Element::F32,
        tf32,
        epilogue: Epilogue::None,
    };
    let [exact, cut] = [false, true].map(|tf32| error(&product(tf32), 4));
    assert!(exact < 1e-6, "{exact}");
    assert!((1e-5..1e-3).contains(&cut), "{cut}");
}

fn check(product: &Product, samples: usize) {
    let samples = samples.min(if product.transpose_left { product.k } else { product.m });
    let most = match product.result {
        Element::F32 => 1e-6,
        Element::Bf16 => 4e-3,
        Element::F16 => 5e-4,
    };
    let found = error(product, samples);
    assert!(found <= most, "{product:?} of {samples} samples: {found}");
}

/// The largest error of a product of the first `samples`, and of one of all behind it, relative to the largest value.
fn error(product: &Product, samples: usize) -> f32 {
    let mut matmul = Matmul::new(gpu(), product).unwrap().expect("an algorithm");
    let all = if product.transpose_left { product.k } else { product.m };
    let of = |samples: usize| match product.transpose_left {
        true => Product { k: samples, ..product.clone() },
        false => Product { m: samples, ..product.clone() },
    };
    [samples, all].map(|samples| run(&mut matmul, &of(samples), samples)).into_iter().fold(0.0, f32::max)
}

fn run(matmul: &mut Matmul, product: &Product, samples: usize) -> f32 {
    let &Product { m, n, k, factors, result, epilogue, .. } = product;
    let (left, right) = (values_of(m * k, 1, factors), values_of(k * n, 2, factors));
    let sums = epilogue == Epilogue::SumLeft;
    let bias = if sums { Values::poisoned(m, result) } else { values_of(n, 3, result) };
    let output = Values::poisoned(m * n, result);
    let workspace = Values::poisoned(matmul.workspace_bytes(), Element::F32);
    let operands = Operands {
        left: left.slice(),
        right: right.slice(),
        result: output.slice_mut(),
        bias: if matches!(epilogue, Epilogue::None | Epilogue::Relu) { 0 } else { bias.slice().address() },
        workspace: workspace.slice_mut(),
    };
    matmul.run(samples, operands).unwrap();
    let at = |transposed: bool, i: usize, rows: usize, j: usize, columns: usize| match transposed {
        true => j * rows + i,
        false => i * columns + j,
    };
    let expected: Vec<f32> = (0..m * n)
        .map(|index| {
            let (i, j) = (index / n, index % n);
            let products = (0..k).map(|l| {
                let left = left.values[at(product.transpose_left, i, m, l, k)];
                f64::from(left) * f64::from(right.values[at(product.transpose_right, l, k, j, n)])
            });
            let sum = products.sum::<f64>() as f32;
            let sum = if matches!(epilogue, Epilogue::Bias | Epilogue::BiasRelu) { sum + bias.values[j] } else { sum };
            if matches!(epilogue, Epilogue::Relu | Epilogue::BiasRelu) { sum.max(0.0) } else { sum }
        })
        .collect();
    let error = distance(&output.download(), &expected);
    if !sums {
        return error;
    }
    let row = |i| (0..k).map(|l| left.values[at(product.transpose_left, i, m, l, k)]).sum();
    error.max(distance(&bias.download(), &(0..m).map(row).collect::<Vec<f32>>()))
}

#[test]
fn the_linear_layer_agrees_with_the_cpus() {
    for (inputs, keys) in [
        (1, "units = 1"),
        (37, "units = 70\nactivation = \"relu\""),
        (64, "units = 48\nactivation = \"relu\""),
        (64, "units = 40\nactivation = \"tanh\""),
        (50, "units = 33\nbias = false\nactivation = \"sigmoid\""),
        (24, "units = 16\nbias = false\nactivation = \"relu\""),
    ] {
        for element in [Element::F32, Element::Bf16] {
            for grad_masked in [false, true] {
                let case = Case { inputs: Shape::vector(inputs), keys, element, grad_masked, built_for: 9 };
                case.check(9);
                case.check(4);
            }
        }
    }
}

struct Case {
    inputs: Shape,
    keys: &'static str,
    element: Element,
    grad_masked: bool,
    built_for: usize,
}

impl Case {
    fn check(&self, batch: usize) {
        let kind = layers::find("linear").unwrap();
        let spec = (kind.parse)(toml::from_str(self.keys).unwrap()).unwrap().spec;
        let inferred = spec.infer(&[self.inputs]).unwrap();
        if self.grad_masked && !inferred.relu_output {
            return;
        }
        let exact = Element::Bf16;
        let x = values_of(batch * self.inputs.len(), 1, exact).values;
        let dy = values_of(batch * inferred.output.len(), 2, exact).values;
        let params: Vec<_> =
            inferred.params.iter().enumerate().map(|(i, p)| values_of(p.len(), 3 + i, exact).values).collect();
        let expected = self.on_cpu(&*spec, batch, &x, &dy, &params);
        let found = self.on_gpu(&*spec, batch, &x, &dy, &params);
        let most = if self.element == Element::F32 { 1e-6 } else { 1.5e-2 };
        for (what, (found, expected)) in ["y", "dx", "dweight", "dbias"].iter().zip(found.iter().zip(&expected)) {
            let error = distance(found, expected);
            assert!(
                error <= most,
                "{what} of {} {} {:?}, {batch} samples: {error}",
                self.inputs,
                self.keys,
                self.element
            );
        }
    }

    fn build(&self, spec: &dyn LayerSpec, place: Place) -> Box<dyn Layer> {
        let inputs = [self.inputs];
        let (batch, grad_masked) = (self.built_for, self.grad_masked);
        let build = Build { inputs: &inputs, batch, place, threads: 1, grad_masked, ..Build::default() };
        match place == Place::Cuda && self.element == Element::Bf16 {
            true => spec.build_bf16(&build).unwrap(),
            false => spec.build(&build).unwrap(),
        }
    }

    /// y, dx and the gradients of the parameters.
    fn on_cpu(&self, spec: &dyn LayerSpec, batch: usize, x: &[f32], dy: &[f32], params: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let mut layer = self.build(spec, Place::Host);
        let (mut y, mut dx, mut dy) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()], dy.to_vec());
        let mut grads: Vec<_> = params.iter().map(|param| vec![f32::NAN; param.len()]).collect();
        let mut scratch = vec![f32::NAN; layer.scratch_bytes().div_ceil(4)];
        let slices: Vec<Slice> = params.iter().map(|param| param[..].into()).collect();
        let [x] = [Slice::from(x)];
        let io = Forward {
            inputs: &[x],
            output: SliceMut::from(&mut y[..]),
            params: &slices,
            params_bf16: &[],
            saved: SliceMut::empty(),
            scratch: SliceMut::from(&mut scratch[..]),
        };
        layer.forward(&pass(batch), io).unwrap();
        let io = Backward {
            inputs: &[x],
            output: if self.grad_masked { Slice::empty() } else { Slice::from(&y[..]) },
            grad_output: SliceMut::from(&mut dy[..]),
            grad_inputs: &mut [SliceMut::from(&mut dx[..])],
            params: &slices,
            params_bf16: &[],
            grad_params: &mut grads.iter_mut().map(|grad| SliceMut::from(&mut grad[..])).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: SliceMut::from(&mut scratch[..]),
        };
        layer.backward(&pass(batch), io).unwrap();
        [y, dx].into_iter().chain(grads).collect()
    }

    /// The same, from poisoned device memory.
    fn on_gpu(&self, spec: &dyn LayerSpec, batch: usize, x: &[f32], dy: &[f32], params: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let mut layer = self.build(spec, Place::Cuda);
        let of = self.element;
        let (x, dy) = (Values::of(x, of), Values::of(dy, of));
        let (y, dx) = (Values::poisoned(dy.values.len(), of), Values::poisoned(x.values.len(), of));
        let weights: Vec<_> = params.iter().map(|param| Values::of(param, Element::F32)).collect();
        let rounded: Vec<_> = params.iter().map(|param| Values::of(param, Element::Bf16)).collect();
        let grads: Vec<_> = params.iter().map(|param| Values::poisoned(param.len(), Element::F32)).collect();
        let scratch = Values::poisoned(layer.scratch_bytes(), Element::F32);
        let [weights, rounded] = [&weights, &rounded].map(|all| all.iter().map(|v| v.slice()).collect::<Vec<_>>());
        let io = Forward {
            inputs: &[x.slice()],
            output: y.slice_mut(),
            params: &weights,
            params_bf16: &rounded,
            saved: SliceMut::empty(),
            scratch: scratch.slice_mut(),
        };
        layer.forward(&pass(batch), io).unwrap();
        let io = Backward {
            inputs: &[x.slice()],
            output: if self.grad_masked { Slice::empty() } else { y.slice() },
            grad_output: dy.slice_mut(),
            grad_inputs: &mut [dx.slice_mut()],
            params: &weights,
            params_bf16: &rounded,
            grad_params: &mut grads.iter().map(|grad| grad.slice_mut()).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: scratch.slice_mut(),
        };
        layer.backward(&pass(batch), io).unwrap();
        [y, dx].into_iter().chain(grads).map(|values| values.download()).collect()
    }
}

fn pass(batch: usize) -> Pass {
    Pass { batch, training: true, first_sample: 0, share: 1.0 }
}

/// Values that depend on their index, as the type holds them.
fn values_of(len: usize, seed: usize, element: Element) -> Values {
    let value = |i: usize| ((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.45;
    Values::of(&(0..len).map(value).collect::<Vec<_>>(), element)
}
