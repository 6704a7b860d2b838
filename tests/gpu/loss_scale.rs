//! Updates in fp16 against those in f32: the loss's scale leaves no trace in them, and an overflow changes nothing but the scale.

use crate::emulator;
use crate::step::{table, value};
use crate::values::{Values, distance, download};
use lockstep::config::raw::{self, OptimizerShared, Rule};
use lockstep::device::Arena;
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::model::params::ParamTable;
use lockstep::model::precision::Precision;
use lockstep::optim::loss_scale::LossScale;
use lockstep::optim::{self, At, cuda};

/// A tensor that ends within a chunk, a running statistic, one of a chunk and more.
const LENGTHS: [isize; 3] = [37, -100, 4100];

/// Parameters with their optimizer.
struct Subject<'a> {
    gpu: &'a Gpu,
    table: ParamTable,
    update: cuda::Update,
    params: Values,
    state: Vec<Arena>,
    rounded: Values,
    steps: u64,
}

impl<'a> Subject<'a> {
    fn new(gpu: &'a Gpu, config: &raw::Optimizer, precision: Precision) -> Subject<'a> {
        let table = table(&LENGTHS);
        let params = (0..table.len()).map(|i| value(i, 1.0)).collect::<Vec<_>>();
        let rounded = if precision == Precision::F32 { 0 } else { table.len() };
        Subject {
            update: cuda::Update::new(config, &table, precision).unwrap(),
            params: Values::of(gpu, &params, Element::F32),
            state: optim::new(config).state().iter().map(|_| gpu.allocate(4 * table.len()).unwrap()).collect(),
            rounded: Values::poisoned(gpu, rounded, precision.element()),
            steps: 0,
            table,
            gpu,
        }
    }

    /// A step with this gradient for each element of the arena.
    fn step(&mut self, gradient: impl Fn(usize) -> f32) {
        let grads = (0..self.table.len()).map(gradient).collect::<Vec<_>>();
        let grads = Values::of(self.gpu, &grads, Element::F32);
        self.update.begin(At { lr: 0.1, step: self.steps }).unwrap();
        self.steps += 1;
        let buffers = cuda::Buffers {
            params: self.params.slice_mut(),
            grads: grads.slice(),
            state: &self.state,
            first_state: 0,
            rounded: self.rounded.slice_mut(),
        };
        // SAFETY: all live until `download` has waited.
        unsafe {
            self.update.measure(self.gpu.compute(), grads.slice(), self.params.slice()).unwrap();
            self.update.update(self.gpu.compute(), 0..self.table.len(), buffers).unwrap();
        }
        self.gpu.compute().wait().unwrap();
    }

    /// Parameters and state.
    fn values(&self) -> Vec<Vec<f32>> {
        let state = self.state.iter().map(|arena| download(self.gpu, arena));
        std::iter::once(self.params.download()).chain(state).collect()
    }

    fn scale(&self) -> LossScale {
        self.update.control().loss_scale().unwrap()
    }
}

/// What is trained has a scaled gradient; a running statistic's value in its place is not one.
fn scaled(scale: f32, step: usize) -> impl Fn(usize) -> f32 {
    let statistic = table(&LENGTHS).params[1].range.clone();
    move |i| value(i + 31 * step, 0.1) * if statistic.contains(&i) { 1.0 } else { scale }
}

/// With every kind of clipping and decay; Adam and Adagrad count only the updates that were made, as in PyTorch.
#[test]
fn updates_do_not_know_the_scale_and_overflows_leave_no_trace() {
    let Some(gpu) = emulator::gpu() else { return };
    for rule in [
        Rule::Sgd { momentum: 0.9, nesterov: false },
        Rule::Adam { betas: [0.9, 0.999], eps: 1e-8 },
        Rule::Adagrad { eps: 1e-10, lr_decay: 0.5 },
        Rule::Lars { momentum: 0.9, trust_coefficient: 0.01, eps: 1e-8 },
    ] {
        let plain = OptimizerShared { weight_decay: 1e-2, l1: 1e-3, ..OptimizerShared::with_lr(0.1) };
        let clipped = OptimizerShared { clip_norm: Some(3.0), clip_value: Some(0.02), ..plain.clone() };
        for shared in [plain, clipped] {
            let config = raw::Optimizer { rule: rule.clone(), shared };
            let [mut exact, mut subject] =
                [Precision::F32, Precision::Fp16].map(|precision| Subject::new(&gpu, &config, precision));
            let tensors = exact.table.params.iter().map(|param| param.range.clone()).collect::<Vec<_>>();
            for (step, scale, overflow) in [
                (0, 65536.0, None),
                (1, 65536.0, Some(f32::NAN)),
                (1, 32768.0, Some(-f32::INFINITY)),
                (1, 16384.0, None),
            ] {
                assert_eq!(subject.scale().scale, scale);
                let (gradient, at) = (scaled(scale, step), tensors[2].end - 1);
                subject.step(|i| overflow.filter(|_| i == at).unwrap_or_else(|| gradient(i)));
                if overflow.is_none() {
                    exact.step(scaled(1.0, step));
                }
                for (found, expected) in subject.values().iter().zip(&exact.values()) {
                    let error = distance(found, expected);
                    assert!(error < 1e-6, "{config:?} after step {step}, {overflow:?}: {error}");
                }
            }
            let params = subject.params.download();
            let rounded = subject.rounded.download();
            for i in tensors.into_iter().flatten() {
                assert_eq!(rounded[i], half::f16::from_f32(params[i]).to_f32(), "{config:?}: rounded weight {i}");
            }
        }
    }
}

#[test]
fn the_scale_falls_at_once_and_grows_with_patience() {
    let Some(gpu) = emulator::gpu() else { return };
    let sgd = |growth_every| raw::Optimizer {
        rule: Rule::Sgd { momentum: 0.0, nesterov: false },
        shared: OptimizerShared {
            loss_scale: Some(8.0),
            loss_scale_growth_every: Some(growth_every),
            ..OptimizerShared::with_lr(0.1)
        },
    };
    let statistic = table(&LENGTHS).params[1].range.start;
    let [good, in_statistic, bad] = [usize::MAX, statistic, 0];
    // The places of the NaN, and what is to be then: the scale, steps that were good, updates skipped, and in a row.
    let course = [
        (good, (8.0, 1, 0, 0)),
        (in_statistic, (8.0, 2, 0, 0)),
        (good, (16.0, 0, 0, 0)),
        (good, (16.0, 1, 0, 0)),
        (bad, (8.0, 0, 1, 1)),
        (bad, (4.0, 0, 2, 2)),
        (good, (4.0, 1, 2, 0)),
    ];
    for growth_every in [3, 0] {
        let mut subject = Subject::new(&gpu, &sgd(growth_every), Precision::Fp16);
        for (step, (place, (scale, good_steps, skipped, skipped_in_a_row))) in course.into_iter().enumerate() {
            subject.step(|i| if i == place { f32::NAN } else { 1e-3 });
            let found = subject.scale();
            assert_eq!((found.skipped, found.skipped_in_a_row), (skipped, skipped_in_a_row), "after step {step}");
            let expected = if growth_every == 0 { (8.0, found.good_steps) } else { (scale, good_steps) };
            assert_eq!((found.scale, found.good_steps), expected, "after step {step}, growing every {growth_every}");
        }
        found_again(&subject);
    }
}

/// What was saved is what goes on.
fn found_again(subject: &Subject<'_>) {
    let saved = subject.scale();
    let other = LossScale { scale: 0.3, good_steps: 1, skipped: 9, skipped_in_a_row: 4 };
    for scale in [other, saved] {
        subject.update.control().set_loss_scale(scale).unwrap();
        assert_eq!(subject.scale(), scale);
    }
}

#[test]
fn a_run_of_skipped_updates_ends() {
    let of = |skipped_in_a_row| LossScale { scale: 1.5e-5, good_steps: 0, skipped: 40, skipped_in_a_row };
    assert!(of(31).check().is_ok());
    let error = of(32).check().unwrap_err();
    assert_eq!(error.kind(), lockstep::error::Kind::NonFinite);
    assert!(error.to_string().contains("the loss scale is 1.5e-5"), "{error}");
}

/// Nothing is measured, and no kernel launched over nothing.
#[test]
fn a_net_without_parameters_is_updated_too() {
    let Some(gpu) = emulator::gpu() else { return };
    let clipped = OptimizerShared { clip_norm: Some(1.0), ..OptimizerShared::with_lr(0.1) };
    let lars = Rule::Lars { momentum: 0.9, trust_coefficient: 0.01, eps: 1e-8 };
    let table = table(&[]);
    let update = cuda::Update::new(&raw::Optimizer { rule: lars, shared: clipped }, &table, Precision::Fp16).unwrap();
    update.begin(At { lr: 0.1, step: 0 }).unwrap();
    let nothing = gpu.allocate(0).unwrap();
    // SAFETY: there is no memory.
    unsafe {
        let buffers = cuda::Buffers {
            params: nothing.slice_mut(0..0),
            grads: nothing.slice(0..0),
            state: std::slice::from_ref(&nothing),
            first_state: 0,
            rounded: nothing.slice_mut(0..0),
        };
        update.measure(gpu.compute(), nothing.slice(0..0), nothing.slice(0..0)).unwrap();
        update.update(gpu.compute(), 0..0, buffers).unwrap();
    }
}
