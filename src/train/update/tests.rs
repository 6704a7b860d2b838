use super::*;
use crate::comm::bucket::Reducer;
use crate::comm::hosts::Hosts;
use crate::comm::{connect_hosts, split};
use crate::config::raw::Config;
use crate::device::Place;
use crate::launch::{rendezvous::Control, watch::Health};
use crate::model::net::Options;
use crate::model::precision::Precision;
use crate::model::spec::NetSpec;
use crate::optim::norm::sum_of_squares;
use half::bf16;
use std::time::Duration;

const RULES: &[&str] = &[
    "{ type = 'sgd', lr = 0.1, l1 = 0.01 }",
    "{ type = 'sgd', lr = 0.1, momentum = 0.9, weight_decay = 0.01, clip_value = 0.5 }",
    "{ type = 'sgd', lr = 0.1, momentum = 0.9, nesterov = true }",
    "{ type = 'adam', lr = 0.05, weight_decay = 0.01 }",
    "{ type = 'adamw', lr = 0.05, weight_decay = 0.01 }",
    "{ type = 'adagrad', lr = 0.5 }",
    "{ type = 'adadelta', lr = 5.0 }",
    "{ type = 'lars', lr = 1.0, trust_coefficient = 0.02 }",
    "{ type = 'adam', lr = 0.05, clip_norm = 1.0 }",
    "{ type = 'lars', lr = 1.0, weight_decay = 0.01, clip_norm = 1.0, clip_value = 0.02 }",
];

/// Odd sizes, tensors longer and shorter than a chunk or a piece, running statistics, several layers a bucket.
const NET: &str = "
    [data]
    format = 'shapes'
    [model]
    input = [5, 5, 3]
    [[model.layers]]
    type = 'conv2d'
    filters = 7
    kernel = 3
    [[model.layers]]
    type = 'batch_norm'
    [[model.layers]]
    type = 'flatten'
    [[model.layers]]
    type = 'linear'
    units = 211
    [[model.layers]]
    type = 'linear'
    units = 10
";

/// How a gradient's element differs by rank and step; the sum over ranks depends on the order.
type Terms = fn(usize, u64, usize) -> f32;

fn terms(rank: usize, step: u64, index: usize) -> f32 {
    let x = ((index * 7919 + rank * 104_729 + step as usize * 31) as f32 * 0.618_034).sin();
    x * 10f32.powi((rank * 3 + index) as i32 % 5 - 4)
}

fn config(optimizer: &str) -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    let rest = "[run]\nname = 'update'\nsteps = 1\n[batch]\nglobal = 12\n";
    std::fs::write(file.path(), format!("{rest}{NET}")).unwrap();
    crate::config::load(file.path(), &[format!("optimizer={optimizer}")]).unwrap()
}

fn at(step: u64) -> At {
    At { lr: 0.1 / (step + 1) as f32, step }
}

#[derive(Clone, Copy, Debug)]
struct World {
    /// Ranks that share a host: with all of them it is shm, with one tcp.
    a_host: usize,
    size: usize,
    overlap: bool,
    bucket_bytes: usize,
}

impl World {
    /// Updates of `steps` on all ranks, from `found` on, which rank 0 has, or from the start. What each rank then holds, and
    /// what rank 0 would save.
    fn run(self, optimizer: &str, steps: Range<u64>, terms: Terms, found: Option<&State>) -> (Vec<Vec<f32>>, State) {
        let config = config(optimizer);
        let ranks = Control::local(self.size).unwrap();
        let (config, results) = (
            &config,
            std::thread::scope(|scope| {
                let rank = |control: Control| {
                    let (steps, config) = (steps.clone(), &config);
                    scope.spawn(move || self.rank(control, config, steps, terms, found))
                };
                let threads: Vec<_> = ranks.into_iter().map(rank).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            }),
        );
        let (params, mut tensors): (Vec<_>, Vec<_>) = results.into_iter().unzip();
        let state = State {
            run: config.run.name.clone(),
            config: String::new(),
            seed: 0,
            world_size: self.size,
            step: steps.end,
            epoch: 0,
            samples: 0,
            best_accuracy: None,
            data: None,
            loss_scale: None,
            tensors: tensors.swap_remove(0),
        };
        (params, state)
    }

    fn rank(
        self,
        control: Control,
        config: &Config,
        steps: Range<u64>,
        terms: Terms,
        found: Option<&State>,
    ) -> (Vec<f32>, Vec<Tensor>) {
        let hosts = Hosts::new(&(0..control.size()).map(|rank| rank / self.a_host).collect::<Vec<_>>());
        let mut comm = connect_hosts(hosts, control, Health::new(Duration::from_secs(60))).unwrap();
        let (rank, size) = (comm.rank(), comm.size());
        let spec = NetSpec::new(&config.model).unwrap();
        let (len, precision) = (ParamTable::new(&spec).len(), Precision::Bf16);
        let weights = Arc::new(Weights::new(len, precision, |bytes| comm.allocate_replicated(bytes)).unwrap());
        let options = Options {
            batch: 1,
            place: Place::Host,
            threads: 1,
            seed: 3,
            precision,
            training: true,
            ..Options::default()
        };
        let mut net = Net::with_weights(spec, &options, weights.clone()).unwrap();
        comm.barrier().unwrap();
        assert_rounded(&net, &weights);
        let mut updater =
            Updater::new(&config.optimizer, net.table(), self.bucket_bytes, weights.clone(), Vec::new(), &mut *comm)
                .unwrap();
        if steps.start > 0 {
            let found = found.filter(|_| rank == 0);
            found.iter().for_each(|found| import_params(&mut net, found).unwrap());
            net.edit_params(|_, params| comm.broadcast(params.into(), 0)).unwrap().unwrap();
            updater.import(found, &mut *comm).unwrap();
        }
        let grads = updater.grads().clone();
        let parts: Vec<Range<usize>> = updater.parts().into_iter().map(|part| part.elements).collect();
        let mut reducer = Reducer::new(comm, updater, parts.len(), self.overlap).unwrap();
        for step in steps {
            reducer.with(|_, updater| updater.begin(at(step))).unwrap();
            for (number, part) in parts.iter().enumerate() {
                // SAFETY: nobody touches a part between its start and its wait.
                let values = unsafe { grads.slice_mut(bytes(part)) }.into_f32();
                values.iter_mut().zip(part.clone()).for_each(|(x, index)| *x = terms(rank, step, index));
                unsafe { reducer.start(number) }.unwrap();
            }
            for part in 0..parts.len() {
                reducer.wait(part).unwrap();
            }
            reducer.with(|comm, updater| updater.finish(comm)).unwrap();
            let tail = parts.last().unwrap();
            // SAFETY: the step is over.
            let sums = unsafe { grads.slice(bytes(tail)) }.f32();
            assert!(sums.iter().zip(tail.clone()).all(|(sum, index)| *sum == tree_of(size, step, index, terms)));
        }
        let tensors = reducer.with(|comm, updater| updater.export(&net, comm)).unwrap();
        assert_eq!(tensors.is_empty(), rank > 0);
        let params = net.params().unwrap().to_vec();
        assert_rounded(&net, &weights);
        // As long as a rank reads the one copy, none may be off to change it.
        reducer.with(|comm, _| comm.barrier()).unwrap();
        (params, tensors)
    }
}

/// The copy in bf16 is that of all parameters.
fn assert_rounded(net: &Net, weights: &Weights) {
    // SAFETY: between steps nobody writes.
    let rounded = unsafe { weights.rounded.slice(0..weights.rounded.bytes()) }.bf16();
    let params = net.params().unwrap();
    let stale = params.iter().zip(rounded).position(|(param, rounded)| bf16::from_f32(*param) != *rounded);
    assert_eq!((rounded.len(), stale), (params.len(), None), "the copy in bf16");
}

fn tree_of(size: usize, step: u64, index: usize, terms: Terms) -> f32 {
    fn tree(ranks: Range<usize>, term: &impl Fn(usize) -> f32) -> f32 {
        if ranks.len() == 1 {
            return term(ranks.start);
        }
        let middle = ranks.start + split(ranks.len());
        tree(ranks.start..middle, term) + tree(middle..ranks.end, term)
    }
    tree(0..size, &|rank| terms(rank, step, index))
}

/// Sums over `size` ranks, then clipping and the rule over whole tensors, as one would write it down: parameters and, by
/// its name in a checkpoint, state.
fn plainly(optimizer: &str, size: usize, steps: u64, terms: Terms) -> (Vec<f32>, Vec<(String, Vec<f32>)>) {
    let config = config(optimizer);
    let rule = optim::new(&config.optimizer);
    let options = Options {
        batch: 1,
        place: Place::Host,
        threads: 1,
        seed: 3,
        precision: Precision::F32,
        training: true,
        ..Options::default()
    };
    let net = Net::new(NetSpec::new(&config.model).unwrap(), &options).unwrap();
    let (table, mut params) = (net.table().clone(), net.params().unwrap().to_vec());
    let mut state = vec![vec![0.0; params.len()]; rule.state().len()];
    for step in 0..steps {
        let mut grads: Vec<f32> = (0..params.len()).map(|index| tree_of(size, step, index, terms)).collect();
        let trainable = || table.params.iter().filter(|param| param.spec.role == Role::Trainable);
        let squares = trainable().map(|param| sum_of_squares(&grads[param.range.clone()])).sum();
        for param in &table.params {
            let (params, grads) = (&mut params[param.range.clone()], &mut grads[param.range.clone()]);
            if let Role::Running { momentum } = param.spec.role {
                params.iter_mut().zip(grads).for_each(|(value, mean)| *value += momentum * (*mean - *value));
                continue;
            }
            if let Some(limit) = config.optimizer.shared.clip_norm {
                clip::scale(grads, clip::norm_factor(squares, limit));
            }
            clip_values(config.optimizer.shared.clip_value, grads);
            let norm = |values: &[f32]| sum_of_squares(values).sqrt();
            let norms = optim::Norms { weight: norm(params), gradient: norm(grads) };
            let At { lr, step } = at(step);
            let mut state: Vec<&mut [f32]> = state.iter_mut().map(|state| &mut state[param.range.clone()]).collect();
            rule.update(At { lr: rule.rate(lr, norms), step }, params, grads, &mut state);
        }
    }
    let mut named = Vec::new();
    for (name, state) in rule.state().iter().zip(&state) {
        for param in table.params.iter().filter(|param| param.spec.role == Role::Trainable) {
            let tensor = canonical(state_name(name, &param.name), param, &state[param.range.clone()]);
            named.push((tensor.name, tensor.values));
        }
    }
    (params, named)
}

fn worlds() -> impl Iterator<Item = World> {
    let hosts = [4, 1, 2];
    let sizes = hosts.into_iter().flat_map(|a_host| (1..=4).map(move |size| (a_host, size)));
    sizes.flat_map(|(a_host, size)| {
        [(true, 0), (false, 5000), (true, usize::MAX)].map(|(overlap, bucket_bytes)| World {
            a_host,
            size,
            overlap,
            bucket_bytes,
        })
    })
}

/// Bit for bit an all-reduce followed by the plain optimizer: over shared memory, tcp and both, 1 to 4 ranks, with and without a
/// communication thread, however the buckets are cut. So norms, too, depend on nothing but the sums.
#[test]
fn sharded_updates_are_those_of_the_plain_optimizer() {
    for optimizer in RULES {
        for size in 1..=4 {
            let (params, state) = plainly(optimizer, size, 3, terms);
            for world in worlds().filter(|world| world.size == size) {
                let (found, saved) = world.run(optimizer, 0..3, terms, None);
                for (rank, found) in found.iter().enumerate() {
                    let odd = found.iter().zip(&params).position(|(found, param)| found.to_bits() != param.to_bits());
                    assert_eq!(odd, None, "{optimizer}, {world:?}: parameters of rank {rank}");
                }
                for (name, values) in &state {
                    let tensor = saved.tensors.iter().find(|tensor| tensor.name == *name).unwrap();
                    assert!(tensor.values == *values, "{optimizer}, {world:?}: {name}");
                }
            }
        }
    }
}

/// To the last bit of an f64, of which a learning rate would not show the last thirty.
#[test]
fn norms_are_those_of_whole_tensors() {
    let config = config(RULES[0]);
    let table = ParamTable::new(&NetSpec::new(&config.model).unwrap());
    let values: Vec<f32> = (0..table.len()).map(|index| terms(0, 0, index)).collect();
    let rank = |control: Control| {
        let mut comm = connect_hosts(Hosts::new(&[(); 2]), control, Health::new(Duration::from_secs(60))).unwrap();
        let arena = Arena::host(4 * table.len()).unwrap();
        // SAFETY: nobody else has this arena.
        unsafe { arena.slice_mut(0..arena.bytes()) }.f32().copy_from_slice(&values);
        for bucket_bytes in [0, 5000, usize::MAX] {
            let mut norms = Norms::new(&table, &table.buckets(bucket_bytes, |_| false), comm.size());
            let mut squares = vec![0.0; table.params.len()];
            // SAFETY: as above.
            unsafe { norms.measure(&arena, &mut squares, &mut *comm) }.unwrap();
            for (param, squares) in table.params.iter().zip(squares).filter(|(p, _)| p.spec.role == Role::Trainable) {
                let whole = sum_of_squares(&values[param.range.clone()]);
                assert_eq!(squares.to_bits(), whole.to_bits(), "{}, {} ranks", param.name, comm.size());
            }
        }
    };
    for size in 1..=4 {
        std::thread::scope(|scope| {
            Control::local(size).unwrap().into_iter().for_each(|control| drop(scope.spawn(|| rank(control))));
        });
    }
}

/// What some ranks save others take up, on any transport, and go on to the same bits.
#[test]
fn state_moves_to_other_ranks_and_transports() {
    // Of one rank alone, so that the sums do not depend on the number of ranks.
    let first: Terms = |rank, step, index| if rank == 0 { terms(0, step, index) } else { 0.0 };
    for optimizer in ["{ type = 'adam', lr = 0.05 }", "{ type = 'sgd', lr = 0.1, momentum = 0.9 }"] {
        let (params, _) = plainly(optimizer, 1, 4, first);
        let worlds: Vec<World> = worlds().collect();
        for (number, saves) in worlds.iter().enumerate() {
            let goes_on = worlds[(number * 7 + 5) % worlds.len()];
            let (_, state) = saves.run(optimizer, 0..2, first, None);
            let (found, _) = goes_on.run(optimizer, 2..4, first, Some(&state));
            for found in found {
                assert!(found == params, "{optimizer}: from {saves:?} to {goes_on:?}");
            }
        }
    }
}
