//! Matrix products of a GPU against plain loops: transposed and not, in every type, with what is done to them on their way to
//! memory, between guards.

use crate::allocations::allocations;
use crate::emulator;
use crate::values::{Values, distance};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::cublaslt::{Epilogue, Matmul, Operands, Product};
use lockstep::device::cuda::kernels::Element;

/// x (m, k) times W^T (k, n), as a linear layer's forward.
const PRODUCT: Product = Product {
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

#[test]
fn products_agree_with_plain_loops() {
    let Some(gpu) = emulator::gpu() else { return };
    let types = [Element::F32, Element::Bf16, Element::F16];
    let epilogues = [Epilogue::None, Epilogue::Relu, Epilogue::Bias, Epilogue::BiasRelu];
    for (m, n, k) in [(1, 1, 1), (3, 5, 7), (16, 8, 32), (33, 17, 65)] {
        for (factors, result) in types.into_iter().flat_map(|of| [(of, of), (of, Element::F32)]) {
            for (number, epilogue) in epilogues.into_iter().enumerate() {
                let (transpose_left, transpose_right) = (number % 2 == 1, number / 2 == 1);
                let tf32 = false;
                check(&gpu, &Product { m, n, k, transpose_left, transpose_right, factors, result, tf32, epilogue }, 1);
            }
        }
    }
}

/// The last batch of an epoch has fewer samples than the product was planned for; then comes a whole one again.
#[test]
fn a_planned_product_takes_fewer_samples() {
    let Some(gpu) = emulator::gpu() else { return };
    check(&gpu, &PRODUCT, 5);
    check(&gpu, &weight_gradient(16, 24), 7);
}

/// Neither with the greatest number of samples nor with fewer.
#[test]
fn an_execution_allocates_nothing_on_the_host() {
    let Some(gpu) = emulator::gpu() else { return };
    for product in [PRODUCT, weight_gradient(16, 24)] {
        let mut matmul = Matmul::new(&gpu, &product).unwrap();
        let all = if product.transpose_left { product.k } else { product.m };
        let of = |len| Values::poisoned(&gpu, len, Element::F32);
        let (left, right, result) = (of(product.m * product.k), of(product.k * product.n), of(product.m * product.n));
        let (bias, workspace) = (of(product.m.max(product.n)), of(matmul.workspace_bytes()));
        let mut run = |samples| {
            let operands = Operands {
                left: left.slice(),
                right: right.slice(),
                result: result.slice_mut(),
                bias: bias.slice().address(),
                workspace: workspace.slice_mut(),
            };
            matmul.run(samples, operands).unwrap();
        };
        // The first of each kind in a process looks functions up.
        [all, all - 2].into_iter().for_each(&mut run);
        assert_eq!(allocations(|| [all, all - 2, all].into_iter().for_each(&mut run)), 0, "{product:?}");
    }
}

/// A library may have no algorithm that also sums; what it has is right.
#[test]
fn sums_of_the_left_matrix_come_with_the_product_or_not_at_all() {
    let Some(gpu) = emulator::gpu() else { return };
    check(&gpu, &weight_gradient(16, 24), 9);
    let odd = weight_gradient(15, 24);
    if Matmul::new(&gpu, &odd).is_ok() {
        check(&gpu, &odd, 9);
    }
}

/// TF32 cuts factors to 11 significant bits, but only where it is asked for.
#[test]
fn tf32_is_not_used_unasked() {
    let Some(gpu) = emulator::gpu() else { return };
    let cube = |tf32| Product { m: 64, n: 64, k: 64, tf32, epilogue: Epilogue::None, ..PRODUCT };
    let [exact, cut] = [false, true].map(|tf32| error(&gpu, &cube(tf32), 64));
    assert!(exact < 2e-6, "{exact}");
    assert!((1e-5..1e-3).contains(&cut), "{cut}");
}

/// dy^T (units, 9) times x (9, inputs), and the sums of dy^T's rows.
fn weight_gradient(units: usize, inputs: usize) -> Product {
    Product {
        m: units,
        n: inputs,
        k: 9,
        transpose_left: true,
        transpose_right: false,
        factors: Element::Bf16,
        epilogue: Epilogue::SumLeft,
        ..PRODUCT
    }
}

fn check(gpu: &Gpu, product: &Product, samples: usize) {
    let most = match product.result {
        Element::F32 => 2e-6,
        Element::Bf16 => 4e-3,
        Element::F16 => 5e-4,
    };
    let found = error(gpu, product, samples);
    assert!(found <= most, "{product:?} of {samples} samples: {found}");
}

/// The largest error of a product of the first `samples`, and of one of all after it, relative to the largest value.
fn error(gpu: &Gpu, product: &Product, samples: usize) -> f32 {
    let mut matmul = Matmul::new(gpu, product).unwrap();
    let all = if product.transpose_left { product.k } else { product.m };
    let of = |samples: usize| match product.transpose_left {
        true => Product { k: samples, ..product.clone() },
        false => Product { m: samples, ..product.clone() },
    };
    [samples, all].map(|samples| run(gpu, &mut matmul, &of(samples), samples)).into_iter().fold(0.0, f32::max)
}

fn run(gpu: &Gpu, matmul: &mut Matmul, product: &Product, samples: usize) -> f32 {
    let &Product { m, n, k, factors, result, epilogue, .. } = product;
    let (left, right) = (values(gpu, m * k, 1, factors), values(gpu, k * n, 2, factors));
    let bias = match epilogue {
        Epilogue::SumLeft => Values::poisoned(gpu, m, result),
        _ => values(gpu, n, 3, result),
    };
    let output = Values::poisoned(gpu, m * n, result);
    let workspace = Values::poisoned(gpu, matmul.workspace_bytes(), Element::F32);
    let operands = Operands {
        left: left.slice(),
        right: right.slice(),
        result: output.slice_mut(),
        bias: if matches!(epilogue, Epilogue::None | Epilogue::Relu) { 0 } else { bias.slice().address() },
        workspace: workspace.slice_mut(),
    };
    matmul.run(samples, operands).unwrap();
    let [expected, sums] = plainly(product, &left.values, &right.values, &bias.values);
    let error = distance(&output.download(), &expected);
    match epilogue {
        Epilogue::SumLeft => error.max(distance(&bias.download(), &sums)),
        _ => error,
    }
}

/// The result, and the sums of the left matrix over k.
fn plainly(product: &Product, left: &[f32], right: &[f32], bias: &[f32]) -> [Vec<f32>; 2] {
    let &Product { m, n, k, transpose_left, transpose_right, epilogue, .. } = product;
    let left = |i: usize, l: usize| f64::from(left[if transpose_left { l * m + i } else { i * k + l }]);
    let right = |l: usize, j: usize| f64::from(right[if transpose_right { j * k + l } else { l * n + j }]);
    let value = |index: usize| {
        let (i, j) = (index / n, index % n);
        let sum = (0..k).map(|l| left(i, l) * right(l, j)).sum::<f64>() as f32;
        match epilogue {
            Epilogue::None | Epilogue::SumLeft => sum,
            Epilogue::Relu => sum.max(0.0),
            Epilogue::Bias => sum + bias[j],
            Epilogue::BiasRelu => (sum + bias[j]).max(0.0),
        }
    };
    let sum = |i: usize| (0..k).map(|l| left(i, l)).sum::<f64>() as f32;
    [(0..m * n).map(value).collect(), (0..m).map(sum).collect()]
}

/// Values that depend on their index, as the type holds them.
fn values(gpu: &Gpu, len: usize, seed: usize, element: Element) -> Values {
    let value = |i: usize| ((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.45;
    Values::of(gpu, &(0..len).map(value).collect::<Vec<_>>(), element)
}
