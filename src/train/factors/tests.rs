use super::*;
use crate::comm::connect_hosts;
use crate::config::plan::{Ranks, Samples};
use crate::config::raw::Config;
use crate::device::Slice;
use crate::launch::{rendezvous::Control, watch::Health};
use crate::model::{Backward, Build, Pass, Shape};
use std::collections::BTreeMap;
use std::sync::Mutex;

const INPUTS: usize = 1100;
const UNITS: usize = 150;
const MICRO: usize = 5;
const MICROS: usize = 3;

fn config() -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "[run]\nname = 'factors'\nsteps = 1\n[data]\nformat = 'shapes'\n[batch]\nlocal = {}\nmicro = {MICRO}\n[optimizer]\n\
         type = 'sgd'\nlr = 0.1\n[model]\ninput = [1, 1, {INPUTS}]\n[[model.layers]]\ntype = 'linear'\nunits = {UNITS}\n",
        MICRO * MICROS
    );
    std::fs::write(file.path(), text).unwrap();
    crate::config::load(file.path(), &[]).unwrap()
}

/// Samples of a leaf: whole, short, and empty ones.
fn count(leaf: usize) -> usize {
    [MICRO, 2, MICRO, 0, 1][leaf % 5]
}

fn value(leaf: usize, index: usize) -> f32 {
    ((leaf * 7919 + index * 104_729) as f32 * 0.618_034).sin() * 10f32.powi((leaf % 5) as i32 - 2)
}

fn factors(leaf: usize) -> (Vec<f32>, Vec<f32>) {
    let values = |start: usize, len: usize| (0..len).map(|index| value(leaf, start + index)).collect();
    (values(0, count(leaf) * INPUTS), values(1_000_003, count(leaf) * UNITS))
}

/// What the layer's own backward gives, weights and then biases.
fn gradient(config: &Config, leaf: usize) -> Vec<f32> {
    let ((x, mut dy), mut grads) = (factors(leaf), vec![0.0; UNITS * INPUTS + UNITS]);
    if count(leaf) == 0 {
        return grads;
    }
    let (inputs, spec) = ([Shape::vector(INPUTS)], NetSpec::new(&config.model).unwrap());
    let build = Build { inputs: &inputs, batch: MICRO, threads: 1, ..Build::default() };
    let mut layer = spec.nodes[0].spec.build(&build).unwrap();
    let mut scratch = vec![0.0; layer.scratch_bytes() / 4];
    let (dweight, dbias) = grads.split_at_mut(UNITS * INPUTS);
    let weight = vec![0.0; UNITS * INPUTS];
    let io = Backward {
        inputs: &[x[..].into()],
        output: Slice::empty(),
        grad_output: SliceMut::from(&mut dy[..]),
        grad_inputs: &mut [SliceMut::empty()],
        params: &[weight[..].into()],
        params_rounded: &[],
        grad_params: &mut [dweight.into(), dbias.into()],
        factors: SliceMut::empty(),
        input_sums: SliceMut::empty(),
        saved: Slice::empty(),
        scratch: SliceMut::from(&mut scratch[..]),
    };
    layer.backward(&Pass { batch: count(leaf), training: true, first_sample: 0, share: 1.0 }, io).unwrap();
    grads
}

fn sum(first: usize, n: usize, of: &dyn Fn(usize) -> Vec<f32>) -> Vec<f32> {
    if n == 1 {
        return of(first);
    }
    let (mut left, right) = (sum(first, split(n), of), sum(first + split(n), n - split(n), of));
    left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
    left
}

/// On every host the ranks together make the whole gradient, each element once, with the bits of the trees over
/// micro-batches and over ranks.
#[test]
fn every_host_makes_the_gradient_that_the_ranks_would_sum() {
    for keys in [&[0, 1][..], &[0, 0, 1, 1], &[0, 0, 0, 1, 2]] {
        let (config, size, hosts) = (config(), keys.len(), Hosts::new(keys));
        let expected = sum(0, size, &|rank| sum(rank * MICROS, MICROS, &|leaf| gradient(&config, leaf)));
        let made: Vec<Mutex<BTreeMap<usize, Vec<f32>>>> = (0..hosts.count()).map(|_| Mutex::default()).collect();
        std::thread::scope(|scope| {
            for control in Control::local(size).unwrap() {
                let (config, hosts, made) = (&config, hosts.clone(), &made[hosts.of(control.rank())]);
                scope.spawn(move || rank(config, hosts, control, made));
            }
        });
        for (host, made) in made.into_iter().enumerate() {
            let mut found = Vec::new();
            for (start, sums) in made.into_inner().unwrap() {
                assert_eq!(start, found.len(), "host {host} of {keys:?}: a gap, or elements made twice");
                found.extend(sums);
            }
            let wrong = found.iter().zip(&expected).position(|(found, expected)| found.to_bits() != expected.to_bits());
            assert_eq!((wrong, found.len()), (None, expected.len()), "host {host} of {keys:?}");
        }
    }
}

fn rank(config: &Config, hosts: Hosts, control: Control, made: &Mutex<BTreeMap<usize, Vec<f32>>>) {
    let (rank, size) = (control.rank(), control.size());
    let mut comm = connect_hosts(hosts, control, Health::new(Duration::from_secs(60))).unwrap();
    let net = NetSpec::new(&config.model).unwrap();
    let samples = Samples { train: 1000, validation: 0, test: 0 };
    let plan = Plan::new(config, Ranks { size, threads: 1 }, samples).unwrap();
    let table = ParamTable::new(&net);
    let mut exchange = Exchange::new(0, &net, &table, &plan, &mut *comm).unwrap();
    for micro in 0..MICROS {
        let leaf = rank * MICROS + micro;
        let ((x, dy), mut memory) = (factors(leaf), exchange.leaves().next(micro, count(leaf)));
        memory.f32()[..x.len()].copy_from_slice(&x);
        memory.f32()[MICRO * INPUTS..][..dy.len()].copy_from_slice(&dy);
    }
    let keep = |elements: Range<usize>, sums: &mut [f32]| {
        // Without the padding between weight and bias.
        let start = if elements.start >= table.params[1].range.start {
            elements.start - table.params[1].range.start + UNITS * INPUTS
        } else {
            elements.start
        };
        assert!(made.lock().unwrap().insert(start, sums.to_vec()).is_none());
    };
    exchange.run(&mut *comm, &keep).unwrap();
    comm.barrier().unwrap();
}
