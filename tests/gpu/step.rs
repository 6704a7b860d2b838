//! The loss and the update on a GPU against the CPU's.

use crate::allocations::allocations;
use crate::emulator;
use crate::values::{Values, distance, download, upload};
use lockstep::config::raw::{self, OptimizerShared, Rule};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Slice, SliceMut};
use lockstep::model::loss::{self, Loss};
use lockstep::model::params::{Init, Layout, Param, ParamSpec, ParamTable, Role};
use lockstep::model::precision::Precision;
use lockstep::optim::loss_scale::LossScale;
use lockstep::optim::{self, At, Norms, clip, norm};

#[test]
fn losses_agree_with_the_cpus() {
    let Some(gpu) = emulator::gpu() else { return };
    for (classes, batch) in [(2, 1), (10, 9), (33, 300), (1000, 17)] {
        let weights = (0..classes).map(|k| ((k + 1) % 5) as f32 * 0.5).collect::<Vec<_>>();
        let cross_entropy = |label_smoothing| raw::Loss::SoftmaxCrossEntropy { label_smoothing, class_weights: None };
        for (config, weights) in [
            (cross_entropy(0.0), None),
            (cross_entropy(0.1), None),
            (cross_entropy(0.2), Some(weights)),
            (raw::Loss::KlDivergence { label_smoothing: 0.3 }, None),
            (raw::Loss::Mse {}, None),
        ] {
            let loss = Loss::new(&config, classes, weights).unwrap();
            check_loss(&gpu, &loss, classes, batch, Element::F32);
            check_loss(&gpu, &loss, classes, batch.min(40), Element::Bf16);
            check_loss(&gpu, &loss, classes, batch.min(40), Element::F16);
        }
    }
}

fn check_loss(gpu: &Gpu, loss: &Loss, classes: usize, batch: usize, element: Element) {
    let value = |i: usize| ((i * 7919 % 1013) as f32 - 500.0) * 0.02;
    // Of equal values the first is the answer.
    let outputs = Values::of(gpu, &(0..batch * classes).map(|i| value(i).round()).collect::<Vec<_>>(), element);
    let labels: Vec<u32> = (0..batch).map(|i| (i * 13 % classes) as u32).collect();
    let (scale, loss_scale) = (1.0 / batch as f32, 4.0);
    let mut expected = vec![f32::NAN; batch * classes];
    let x = Slice::from(&outputs.values[..]);
    let sums = loss.forward_backward(x, &labels, loss_scale * scale, SliceMut::from(&mut expected[..]));

    let on_gpu = loss::cuda::Loss::new(loss, 300, element).unwrap();
    let sgd =
        raw::Optimizer { rule: Rule::Sgd { momentum: 0.0, nesterov: false }, shared: OptimizerShared::with_lr(0.1) };
    let update = optim::cuda::Update::new(&sgd, &table(&[1]), Precision::Fp16).unwrap();
    let control = update.control();
    control.set_loss_scale(LossScale { scale: loss_scale, ..control.loss_scale().unwrap() }).unwrap();
    let memory = upload(gpu, &labels);
    // SAFETY: nobody writes it.
    let labels = unsafe { memory.slice(0..memory.bytes()) };
    let (grad, found) = (Values::poisoned(gpu, batch * classes, element), Values::poisoned(gpu, 2, Element::F32));
    let launch = || {
        // SAFETY: all live until `download` has waited.
        unsafe { on_gpu.forward_backward(outputs.slice(), labels, scale, grad.slice_mut(), found.slice_mut(), control) }
            .unwrap()
    };
    // The first launch of a process looks functions up.
    launch();
    assert_eq!(allocations(launch), 0, "on the host");
    let what = format!("{loss:?} of {batch} samples in {element:?}");
    let error = distance(&grad.download(), &expected);
    assert!(error <= if element == Element::F32 { 3e-6 } else { 4e-3 }, "gradient of {what}: {error}");
    let both = found.download();
    assert!(((both[0] - sums.loss_sum) / sums.loss_sum).abs() < 1e-5, "{what}: {both:?}, {sums:?}");
    assert_eq!(both[1], sums.correct as f32, "{what}");

    let found = Values::poisoned(gpu, 2, Element::F32);
    // SAFETY: as above.
    unsafe { on_gpu.evaluate(outputs.slice(), labels, found.slice_mut()) }.unwrap();
    assert_eq!(found.download(), both, "{what}");
}

/// Every rule, with every kind of clipping and decay, gives the CPU's bits: over tensors that end within a line, within a chunk
/// and with one, some of them running statistics, cut anywhere. A step that is halted leaves no trace.
#[test]
fn updates_have_the_bits_of_the_cpus() {
    let Some(gpu) = emulator::gpu() else { return };
    for rule in [
        Rule::Sgd { momentum: 0.0, nesterov: false },
        Rule::Sgd { momentum: 0.9, nesterov: false },
        Rule::Sgd { momentum: 0.9, nesterov: true },
        Rule::Adam { betas: [0.9, 0.999], eps: 1e-8 },
        Rule::Adamw { betas: [0.9, 0.99], eps: 1e-8 },
        Rule::Adagrad { eps: 1e-10, lr_decay: 0.01 },
        Rule::Adadelta { rho: 0.9, eps: 1e-6 },
        Rule::Lars { momentum: 0.9, trust_coefficient: 0.01, eps: 1e-8 },
    ] {
        let plain = OptimizerShared::with_lr(0.1);
        let decayed =
            OptimizerShared { weight_decay: 1e-2, l1: 1e-3, clip_norm: Some(3.0), clip_value: Some(0.02), ..plain };
        for (shared, precision) in [(plain, Precision::F32), (decayed, Precision::Bf16)] {
            check_update(&gpu, &raw::Optimizer { rule: rule.clone(), shared }, precision);
        }
    }
}

fn check_update(gpu: &Gpu, config: &raw::Optimizer, precision: Precision) {
    let table = table(&[1, 4096, -100, 37, 5000, 2 * 4096 + 16 * 5 + 3, -7]);
    let states = optim::new(config).state().len();
    let mut expected = vec![vec![0.0; table.len()]; 1 + states];
    (0..).zip(&mut expected[0]).for_each(|(i, w)| *w = value(i, 1.0));
    let params = Values::of(gpu, &expected[0], Element::F32);
    let state: Vec<_> = (0..states).map(|_| gpu.allocate(4 * table.len()).unwrap()).collect();
    let rounded = if precision == Precision::F32 { 0 } else { table.len() };
    let rounded = Values::poisoned(gpu, rounded, precision.element());
    let update = optim::cuda::Update::new(config, &table, precision).unwrap();
    for step in 0..3 {
        let at = At { lr: 0.1 / (step + 1) as f32, step };
        let grads = (0..table.len()).map(|i| value(i + 31 * step as usize, 0.1)).collect::<Vec<_>>();
        let on_gpu = Values::of(gpu, &grads, Element::F32);
        let launch = |halted: bool| {
            update.begin(at).unwrap();
            if halted {
                gpu.compute().copy_and_wait(Slice::from(&[1.0][..]), update.control().halt()).unwrap();
            }
            // SAFETY: all live until `download` has waited.
            unsafe { update.measure(gpu.compute(), on_gpu.slice(), params.slice()) }.unwrap();
            for elements in [0..16 * 300, 16 * 300..table.len()] {
                let buffers = optim::cuda::Buffers {
                    params: params.slice_mut(),
                    grads: on_gpu.slice(),
                    state: &state,
                    first_state: elements.start,
                    rounded: rounded.slice_mut(),
                };
                // SAFETY: as above.
                unsafe { update.update(gpu.compute(), elements, buffers) }.unwrap();
            }
        };
        launch(true);
        let allocated = allocations(|| launch(false));
        // The first launch of a process looks functions up.
        assert!(step == 0 || allocated == 0, "{allocated} allocations on the host");
        update_on_cpu(config, &table, at, grads, &mut expected);
    }
    let what = format!("{config:?}");
    let state = state.iter().map(|arena| download(gpu, arena));
    for (found, expected) in std::iter::once(params.download()).chain(state).zip(&expected) {
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{what} at {i}: {found}, on the CPU {expected}");
        }
    }
    let in_tensors = |i: &usize| table.params.iter().any(|param| param.range.contains(i));
    for (i, found) in rounded.download().into_iter().enumerate().filter(|(i, _)| in_tensors(i)) {
        assert_eq!(found, half::bf16::from_f32(expected[0][i]).to_f32(), "{what}: rounded weight {i}");
    }
}

/// As `train::update` does it. arenas: parameters, and each tensor of state.
fn update_on_cpu(config: &raw::Optimizer, table: &ParamTable, at: At, mut grads: Vec<f32>, arenas: &mut [Vec<f32>]) {
    let rule = optim::new(config);
    let trainable = || table.params.iter().filter(|param| param.spec.role == Role::Trainable);
    if let Some(limit) = config.shared.clip_norm {
        let squares = trainable().map(|param| norm::sum_of_squares(&grads[param.range.clone()])).sum();
        trainable().for_each(|param| clip::scale(&mut grads[param.range.clone()], clip::norm_factor(squares, limit)));
    }
    let [params, state @ ..] = arenas else { unreachable!("parameters come first") };
    for param in &table.params {
        let (params, grads) = (&mut params[param.range.clone()], &mut grads[param.range.clone()]);
        if let Role::Running { momentum } = param.spec.role {
            params.iter_mut().zip(&*grads).for_each(|(value, mean)| *value += momentum * (mean - *value));
            continue;
        }
        if let Some(limit) = config.shared.clip_value {
            clip::clip_value(grads, limit);
        }
        let [weight, gradient] = [&*params, grads].map(|values| norm::sum_of_squares(values).sqrt());
        let at = At { lr: rule.rate(at.lr, Norms { weight, gradient }), ..at };
        let mut state: Vec<&mut [f32]> = state.iter_mut().map(|arena| &mut arena[param.range.clone()]).collect();
        rule.update(at, params, grads, &mut state);
    }
}

pub fn value(i: usize, scale: f32) -> f32 {
    ((i * 7919 % 1013) as f32 - 500.0) * scale * 10f32.powi((i % 7) as i32 - 5)
}

/// Tensors of these lengths, each from a cache line on; less than 0: running statistics.
pub fn table(lengths: &[isize]) -> ParamTable {
    let mut end = 0;
    let param = |(number, length): (usize, &isize)| {
        let len = length.unsigned_abs();
        let range = end..end + len;
        end = range.end.next_multiple_of(16);
        let role = if *length < 0 { Role::Running { momentum: 0.1 } } else { Role::Trainable };
        let (layout, init) = (Layout::Canonical, Init::Constant(0.0));
        let spec = ParamSpec { name: "weight", shape: vec![len], layout, init, role };
        Param { name: number.to_string(), node: number, number: number as u32, spec, range }
    };
    let params = lengths.iter().enumerate().map(param).collect();
    ParamTable { params, tail: end..end + 16 }
}
