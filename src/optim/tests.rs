use super::clip::{clip_value, norm_factor, scale};
use super::norm::sum_of_squares;
use super::schedule::Schedule;
use super::*;
use crate::config::plan::{Cadence, Plan};
use crate::config::raw::{OptimizerShared, ScheduleShape, ScheduleShared};
use crate::rng::{Purpose, Rng};
use safetensors::SafeTensors;

fn values(stream: u64, len: usize) -> Vec<f32> {
    let mut rng = Rng::new(stream, Purpose::Test, 0, 0);
    (0..len).map(|_| rng.normal()).collect()
}

/// `[optimizer]` from its keys as the TOML would have them.
fn config(keys: &str) -> raw::Optimizer {
    let (mut shared, mut rule) = (toml::Table::new(), toml::Table::new());
    for (key, value) in keys.parse::<toml::Table>().unwrap() {
        let is_shared = ["lr", "weight_decay", "l1", "clip_norm", "clip_value"].contains(&key.as_str());
        if is_shared { &mut shared } else { &mut rule }.insert(key, value);
    }
    raw::Optimizer { rule: rule.try_into().unwrap(), shared: shared.try_into::<OptimizerShared>().unwrap() }
}

const RULES: &[&str] = &[
    "type = 'sgd'\nlr = 0.1\nl1 = 0.01",
    "type = 'sgd'\nlr = 0.1\nmomentum = 0.9\nweight_decay = 0.01",
    "type = 'sgd'\nlr = 0.1\nmomentum = 0.9\nnesterov = true",
    "type = 'adam'\nlr = 0.05\nweight_decay = 0.01",
    "type = 'adamw'\nlr = 0.05\nweight_decay = 0.01",
    "type = 'adagrad'\nlr = 0.5",
    "type = 'adadelta'\nlr = 5.0",
    "type = 'lars'\nlr = 1.0\ntrust_coefficient = 0.02",
];

fn run(keys: &str, params: &mut [f32], steps: u64, gradient: impl Fn(u64, &[f32]) -> Vec<f32>) -> Vec<Vec<f32>> {
    let config = config(keys);
    let optimizer = new(&config);
    let mut state = vec![vec![0.0; params.len()]; optimizer.state().len()];
    for step in 0..steps {
        let grads = gradient(step, params);
        let mut state: Vec<&mut [f32]> = state.iter_mut().map(|s| &mut s[..]).collect();
        let norm = |values: &[f32]| sum_of_squares(values).sqrt();
        let norms = || Norms { weight: norm(params), gradient: norm(&grads) };
        let lr = if optimizer.needs_norms() { optimizer.rate(config.shared.lr, norms()) } else { config.shared.lr };
        optimizer.update(At { lr, step }, params, &grads, &mut state);
    }
    state
}

/// Every case of scripts/oracles/optim.py: the parameters after every step and the state after the last.
#[test]
fn rules_follow_pytorch() {
    let bytes = std::fs::read("tests/oracles/optim.safetensors").unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| -> Vec<f32> {
        let words = file.tensor(name).unwrap().data().as_chunks::<4>().0;
        words.iter().map(|&word| f32::from_le_bytes(word)).collect()
    };
    let (start, grads) = (tensor("param"), tensor("grads"));
    let n = start.len();
    let cases = metadata.metadata().as_ref().unwrap();
    assert!(cases.len() >= 12);
    for (case, keys) in cases {
        let keys = toml::Table::try_from(serde_json::from_str::<serde_json::Value>(keys).unwrap()).unwrap().to_string();
        let expected = tensor(&format!("{case}.params"));
        for steps in 1..=grads.len() / n {
            let mut params = start.clone();
            let state = run(&keys, &mut params, steps as u64, |step, _| grads[step as usize * n..][..n].to_vec());
            assert_close(&params, &expected[(steps - 1) * n..][..n], &format!("{case}, step {steps}"));
            if steps == grads.len() / n {
                for (name, state) in new(&config(&keys)).state().iter().zip(&state) {
                    assert_close(state, &tensor(&format!("{case}.state.{name}")), &format!("{case}, {name}"));
                }
            }
        }
    }
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 1e-6 * e.abs().max(1.0), "{what}[{i}]: {f}, PyTorch has {e}");
    }
}

#[test]
fn penalties_are_added_to_the_gradient() {
    let mut params = [2.0, -2.0, 0.0];
    run("type = 'sgd'\nlr = 1.0\nl1 = 0.5\nweight_decay = 0.25", &mut params, 1, |_, _| vec![0.125; 3]);
    assert_eq!(params, [2.0 - 0.125 - 0.5 - 0.5, -2.0 - 0.125 + 0.5 + 0.5, -0.125]);
}

/// Against the paper's formula, written out in f64 for two steps; and a fresh bias moves by the plain rate.
#[test]
fn lars_follows_its_paper() {
    let (start, grads) = (values(1, 50), values(2, 50));
    let mut params = start.clone();
    let keys = "type = 'lars'\nlr = 0.5\nmomentum = 0.9\ntrust_coefficient = 0.01\nweight_decay = 0.1\neps = 0.0";
    run(keys, &mut params, 2, |_, _| grads.clone());

    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let g: Vec<f64> = grads.iter().map(|&x| x.into()).collect();
    let mut w: Vec<f64> = start.iter().map(|&x| x.into()).collect();
    let mut b = vec![0.0; 50];
    for _ in 0..2 {
        let rate = 0.5 * 0.01 * norm(&w) / (norm(&g) + 0.1 * norm(&w));
        for i in 0..50 {
            b[i] = 0.9 * b[i] + rate * (g[i] + 0.1 * w[i]);
            w[i] -= b[i];
        }
    }
    assert_close(&params, &w.iter().map(|&x| x as f32).collect::<Vec<_>>(), "lars");

    let mut bias = [0.0; 2];
    run("type = 'lars'\nlr = 0.5", &mut bias, 1, |_, _| vec![1.0, -2.0]);
    assert_eq!(bias, [-0.5, 1.0]);
}

/// f(w) = 1/2 sum a_i (w_i - c_i)^2 with curvatures a from 0.1 to 1.
#[test]
fn every_rule_descends_a_quadratic() {
    let goal = values(3, 20);
    let curvature = |i: usize| 0.1 + 0.9 * i as f32 / 19.0;
    let loss = |w: &[f32]| (0..20).map(|i| curvature(i) * (w[i] - goal[i]).powi(2)).sum::<f32>();
    for keys in RULES {
        let mut params = values(4, 20);
        let before = loss(&params);
        run(keys, &mut params, 300, |_, w| (0..20).map(|i| curvature(i) * (w[i] - goal[i])).collect());
        let after = loss(&params);
        assert!(after < 0.05 * before, "{keys}: the loss went from {before} to {after}");
    }
}

/// Long enough that a tensor is cut among tasks; the second pool cuts in other places at other times.
#[test]
fn bits_depend_neither_on_threads_nor_on_the_cut() {
    const LEN: usize = 70_001;
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let gradient = |step: u64| values(10 + step, LEN);
    for keys in RULES {
        let whole = |threads| {
            let mut params = values(5, LEN);
            let state = pool(threads).install(|| run(keys, &mut params, 2, |step, _| gradient(step)));
            (params, state)
        };
        let expected = whole(1);
        assert!(expected == whole(2), "{keys}: one and two threads differ");
        if keys.contains("lars") {
            continue;
        }
        let mut pieces = values(5, LEN);
        let mut from = 0;
        for len in [1, 15, 16_385, 40_000, LEN - 56_401] {
            run(keys, &mut pieces[from..from + len], 2, |step, _| gradient(step)[from..from + len].to_vec());
            from += len;
        }
        assert!(expected.0 == pieces, "{keys}: cutting the tensor changes the bits");
    }
    let long = values(6, LEN);
    let sums = [1, 2, 3].map(|threads| pool(threads).install(|| sum_of_squares(&long)));
    assert!(sums.iter().all(|sum| *sum == sums[0]));
    let plain: f64 = long.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    assert!((sums[0] / plain - 1.0).abs() < 1e-12);
}

#[test]
fn clipping_bounds_the_values_and_the_common_norm() {
    let mut grads = [3.0, -4.0, 0.5];
    clip_value(&mut grads, 2.0);
    assert_eq!(grads, [2.0, -2.0, 0.5]);

    // torch.nn.utils.clip_grad_norm_([3, 4], [12], max_norm=1): norm 13.
    let (mut a, mut b) = ([3.0, 4.0], [12.0]);
    let factor = norm_factor(sum_of_squares(&a) + sum_of_squares(&b), 1.0);
    scale(&mut a, factor);
    scale(&mut b, factor);
    assert_close(&[a[0], a[1], b[0]], &[3.0 / 13.0, 4.0 / 13.0, 12.0 / 13.0], "clip_norm");
    assert_eq!(norm_factor(0.25, 1.0), 1.0);
    assert_eq!(norm_factor(0.0, 1.0), 1.0);
}

/// Where PyTorch's ranges end: averages that never take anything in, and betas that are 1 in single precision only.
#[test]
fn the_ends_of_the_ranges_give_finite_updates() {
    for keys in [
        "type = 'adadelta'\nlr = 0.1\nrho = 1.0",
        "type = 'adadelta'\nlr = 0.1\nrho = 0.0",
        "type = 'adam'\nlr = 0.1\nbetas = [0.99999999, 0.99999999]",
        "type = 'adamw'\nlr = 0.1\nbetas = [0.0, 0.0]",
    ] {
        let mut params = values(7, 20);
        run(keys, &mut params, 5, |step, _| values(20 + step, 20));
        assert!(params.iter().all(|w| w.is_finite()) && params != values(7, 20), "{keys}: {params:?}");
    }
}

/// Ten steps an epoch, four ranks.
fn schedule(shape: ScheduleShape, shared: ScheduleShared, warmup_steps: u64, total_steps: u64) -> Schedule {
    let never = Cadence { every_steps: None, every_epochs_steps: None };
    let plan = Plan {
        ranks: 4,
        global_batch: 4,
        local_batch: 1,
        micro_batch: 1,
        micros_per_rank: 1,
        steps_per_epoch: 10,
        total_steps: Some(total_steps),
        warmup_steps,
        eval: never,
        checkpoint: never,
        audit: never,
        log_every_steps: 1,
        bucket_bytes: 1,
        nccl_bucket_bytes: 1,
        threads: 1,
    };
    Schedule::new(&raw::Schedule { shape, shared }, 0.8, &plan)
}

fn rates(shape: ScheduleShape, steps: &[u64]) -> Vec<f32> {
    let schedule = schedule(shape, ScheduleShared::default(), 0, 100);
    steps.iter().map(|&step| schedule.lr(step)).collect()
}

/// One hundred steps in all, lr 0.8.
#[test]
fn schedules_follow_their_closed_forms() {
    use ScheduleShape::*;
    assert_eq!(rates(Constant {}, &[0, 99, 1000]), [0.8; 3]);
    let every = Step { gamma: 0.5, every_epochs: Some(2.5), at_epochs: None };
    assert_eq!(rates(every, &[0, 24, 25, 49, 50]), [0.8, 0.8, 0.4, 0.4, 0.2]);
    let at = Step { gamma: 0.5, every_epochs: None, at_epochs: Some(vec![3.0, 6.05]) };
    assert_eq!(rates(at, &[29, 30, 60, 61]), [0.8, 0.4, 0.4, 0.2]);
    assert_close(&rates(Exponential { gamma: 0.25 }, &[0, 5, 10]), &[0.8, 0.4, 0.2], "exponential");
    let polynomial = Polynomial { power: 2.0, end_lr: 0.08 };
    assert_close(&rates(polynomial, &[0, 50, 100, 200]), &[0.8, 0.2 + 0.06, 0.08, 0.08], "polynomial");
    let half = 0.5f32.sqrt() * 0.4;
    assert_close(&rates(Cosine { end_lr: 0.0 }, &[0, 25, 50, 100]), &[0.8, 0.4 + half, 0.4, 0.0], "cosine");
}

#[test]
fn warmup_rises_linearly_and_then_the_shape_begins() {
    let shared = ScheduleShared { scale_lr_with_world: true, ..Default::default() };
    let schedule = schedule(ScheduleShape::Cosine { end_lr: 0.0 }, shared, 20, 100);
    let found: Vec<f32> = [0, 9, 19, 20, 60, 100].iter().map(|&step| schedule.lr(step)).collect();
    assert_close(&found, &[3.2 / 20.0, 1.6, 3.2, 3.2, 1.6, 0.0], "warm-up to 4 x 0.8");
}

/// Of every shape: the rate rises as if the run went on.
#[test]
fn a_run_that_ends_within_its_warm_up_has_the_rates_of_a_longer_one() {
    use ScheduleShape::*;
    for shape in [
        Constant {},
        Step { gamma: 0.5, every_epochs: Some(2.5), at_epochs: None },
        Step { gamma: 0.5, every_epochs: None, at_epochs: Some(vec![3.0]) },
        Exponential { gamma: 0.25 },
        Polynomial { power: 2.0, end_lr: 0.08 },
        Cosine { end_lr: 0.08 },
    ] {
        let rates = |total| {
            let schedule = schedule(shape.clone(), ScheduleShared::default(), 20, total);
            [0, 4, 9].map(|step| schedule.lr(step))
        };
        assert_close(&rates(10), &[0.04, 0.2, 0.4], "20 steps of warm-up in a run of 10");
        assert_eq!(rates(10), rates(100), "{shape:?}");
    }
}
