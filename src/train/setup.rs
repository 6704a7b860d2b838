//! From the configuration to what one rank trains with.

use super::Rank;
use super::agreement::{self, Fact};
use super::eval::{Evaluator, Source};
use super::factors::{self, Exchange};
use super::feed::{Dock, Feed, Inlet, Way};
use super::gradient::Gradient;
use super::judge::Judge;
use super::learner::Learner;
use super::replay::Replay;
use super::update::{self, GpuUpdater, Update, Updater};
use crate::comm::Communicator;
use crate::comm::nccl::Nccl;
use crate::config::plan::{Plan, Ranks, Samples};
use crate::config::raw::{self, Config};
use crate::data::augment::{self, Augmenter};
use crate::data::batch::{Form, Layout};
use crate::data::partition::Batching;
use crate::data::queue::{DataQueue, Loader, Position};
use crate::data::resident::{self, Resident};
use crate::data::{self, Dataset, order};
use crate::device::cuda::Gpu;
use crate::device::{self, Place, SliceMut};
use crate::error::{Error, Result};
use crate::launch::watch::Health;
use crate::launch::world::World;
use crate::model::Shape;
use crate::model::loss::Loss;
use crate::model::net::{self, Net};
use crate::model::params::ParamTable;
use crate::model::spec::NetSpec;
use crate::model::weights::Weights;
use crate::optim::cuda::Control;
use crate::optim::schedule::Schedule;
use std::sync::Arc;
use std::time::Duration;

/// The samples of a run.
pub struct Parts {
    pub train: Arc<dyn Dataset>,
    pub validation: Option<Arc<dyn Dataset>>,
    pub test: Arc<dyn Dataset>,
}

impl Parts {
    /// Opens the sets, checks that their images can become the model's input, and holds the validation split out of the
    /// training set.
    pub fn open(config: &Config) -> Result<Parts> {
        let (seed, net) = (config.run.seed, NetSpec::new(&config.model)?);
        let data::Sets { train, test } = sets(config, &net)?;
        augment::check(&config.data.shared.augment, train.shape(), net.input)?;
        resident::check(&config.data.shared, train.shape(), net.input)?;
        if config.data.shared.validation == 0.0 {
            return Ok(Parts { train, validation: None, test });
        }
        let (train, validation) = order::split_validation(&train, config.data.shared.validation, seed)?;
        Ok(Parts { train: Arc::new(train), validation: Some(Arc::new(validation)), test })
    }

    pub fn samples(&self) -> Samples {
        Samples {
            train: self.train.len(),
            validation: self.validation.as_ref().map_or(0, |set| set.len()),
            test: self.test.len(),
        }
    }

    /// How batches are made of them. Normalisation by the training set's own statistics reads all of it.
    pub fn loader(&self, config: &Config) -> Result<Loader> {
        let [h, w, c] = config.model.input;
        let input = Shape::new(h, w, c);
        Ok(Loader {
            augmenter: Augmenter::new(&config.data.shared.augment, &*self.train, input)?,
            form: Form::Values,
            sampler: config.data.shared.sampler,
            seed: config.run.seed,
            workers: config.data.shared.workers,
            prefetch: config.data.shared.prefetch,
            skipped: Arc::default(),
        })
    }
}

/// Opens the sets for this net.
pub fn sets(config: &Config, net: &NetSpec) -> Result<data::Sets> {
    let target = data::Target { input: net.input, outputs: net.output().len() };
    data::open(&config.data, target, config.run.seed)
}

/// The numbers of a run in this world, as `checked_plan`.
pub fn plan(config: &Config, parts: &Parts, world: &World) -> Result<Plan> {
    let ranks = Ranks { size: world.size, threads: rayon::current_num_threads() };
    checked_plan(config, &NetSpec::new(&config.model)?, parts, ranks)
}

/// The numbers of a run. All that a configuration can get wrong is refused here, before anything takes memory or time:
/// what `trainer plan` accepts is what training accepts.
pub fn checked_plan(config: &Config, net: &NetSpec, parts: &Parts, ranks: Ranks) -> Result<Plan> {
    let plan = Plan::new(config, ranks, parts.samples())?;
    loss(config, net, &*parts.train)?;
    Ok(plan)
}

/// Compares, over all ranks, what they are about to train with. `fingerprint` is the training set's. Collective.
pub fn agree(
    config: &Config,
    parts: &Parts,
    fingerprint: &str,
    rank: &Rank,
    comm: &mut dyn Communicator,
) -> Result<()> {
    let facts = [
        Fact::configuration(config),
        Fact::training_set(parts.train.len(), parts.train.classes(), fingerprint),
        Fact::parameters(&ParamTable::new(&NetSpec::new(&config.model)?)),
    ];
    let agreed = agreement::check(&facts, &rank.world, |bytes| agreement::gather_bytes(comm, bytes));
    agreed.map_err(|error| agreement::of_all(error, rank, comm))
}

/// The net with its loss, gradient arenas and optimizer. Collective.
pub fn learner(
    config: &Config,
    plan: &Plan,
    parts: &Parts,
    rank: &Rank,
    mut comm: Box<dyn Communicator>,
) -> Result<Learner> {
    let spec = NetSpec::new(&config.model)?;
    let len = ParamTable::new(&spec).len();
    let place = device::choose(config.run.device);
    let allocate = |bytes| match place {
        Place::Host => comm.allocate_replicated(bytes),
        Place::Cuda => device::allocate(place, bytes),
    };
    let weights = Arc::new(Weights::new(len, config.run.precision, allocate)?);
    let net = Net::with_weights(spec, &net_options(config, plan, true)?, weights.clone());
    let net = agreement::together(net, rank, &mut *comm)?;
    // Where they share one copy, every rank has written the same initial values.
    comm.barrier()?;
    let nccl = match place {
        Place::Host => None,
        Place::Cuda => update::nccl::connect(&config.parallel, rank, &mut *comm)?,
    };
    let transport = if nccl.is_some() { "nccl" } else { comm.transport() };
    let updater = updater(config, plan, &net, weights, (&rank.health, nccl), &mut *comm)?;
    let judge = judge(config, plan, net.spec(), &*parts.train, updater.control())?;
    let alone = comm.size() == 1;
    let replay = match place {
        Place::Cuda if config.run.cuda_graphs => Some(Replay::new(&Gpu::of_this_rank()?)),
        _ => None,
    };
    let overlap = config.parallel.overlap && !alone;
    let gradient = Gradient::new(comm, updater, plan.micros_per_rank, overlap, replay)?;
    Ok(Learner {
        judge,
        net,
        part_times: vec![Duration::ZERO; gradient.parts() + 1],
        gradient,
        schedule: Schedule::new(&config.schedule, config.optimizer.shared.lr, plan),
        samples: parts.train.len(),
        alone,
        transport,
    })
}

fn updater(
    config: &Config,
    plan: &Plan,
    net: &Net,
    weights: Arc<Weights>,
    (health, nccl): (&Arc<Health>, Option<Nccl>),
    comm: &mut dyn Communicator,
) -> Result<Box<dyn Update>> {
    let (optimizer, table) = (&config.optimizer, net.table());
    Ok(match weights.f32.place() {
        Place::Host => {
            let exchanges = exchanges(config, plan, net, comm)?;
            Box::new(Updater::new(optimizer, table, plan.bucket_bytes, weights, exchanges, comm)?)
        }
        Place::Cuda => {
            let bucket_bytes = if nccl.is_some() { plan.nccl_bucket_bytes } else { plan.bucket_bytes };
            let parallel = &config.parallel;
            Box::new(GpuUpdater::new(optimizer, parallel, table, bucket_bytes, weights, (health, nccl), comm)?)
        }
    })
}

/// For the layers whose factors the ranks exchange. Collective.
fn exchanges(config: &Config, plan: &Plan, net: &Net, comm: &mut dyn Communicator) -> Result<Vec<Exchange>> {
    let hosts = comm.hosts().count();
    let norms = update::needs_norms(&config.optimizer);
    let estimates = factors::estimate(&config.parallel, net.spec(), plan, hosts, norms);
    // Rank 0 decides for all: by its threads, of which other ranks may have more or fewer.
    let mut flags: Vec<f32> = estimates.iter().map(|layer| f32::from(u8::from(layer.chosen))).collect();
    comm.broadcast(SliceMut::from(&mut flags[..]), 0)?;
    let chosen = estimates.iter().zip(&flags).filter(|(_, flag)| **flag > 0.0);
    let chosen: Vec<usize> = chosen.map(|(layer, _)| layer.node).collect();
    if comm.rank() == 0 && !chosen.is_empty() {
        let names: Vec<&str> = chosen.iter().map(|&node| &*net.spec().nodes[node].name).collect();
        tracing::info!("the hosts exchange factors instead of gradients: {}", names.join(", "));
    }
    let exchange = |node| Exchange::new(node, net.spec(), net.table(), plan, comm);
    chosen.into_iter().map(exchange).collect()
}

/// The net of one rank, for evaluation alone.
pub fn net(config: &Config, plan: &Plan) -> Result<Net> {
    Net::new(NetSpec::new(&config.model)?, &net_options(config, plan, false)?)
}

fn net_options(config: &Config, plan: &Plan, training: bool) -> Result<net::Options> {
    Ok(net::Options {
        batch: plan.micro_batch,
        place: device::choose(config.run.device),
        threads: rayon::current_num_threads(),
        seed: config.run.seed,
        precision: config.run.precision,
        tf32: config.run.tf32,
        nondeterministic: !config.run.deterministic,
        training,
    })
}

/// What judges the outputs, on the net's device. `control` is told of a loss that is not finite.
pub fn judge(
    config: &Config,
    plan: &Plan,
    net: &NetSpec,
    train: &dyn Dataset,
    control: Option<Arc<Control>>,
) -> Result<Judge> {
    let passes = plan.micros_per_rank.max(Evaluator::PASSES);
    let place = device::choose(config.run.device);
    Judge::new(place, loss(config, net, train)?, plan.micro_batch, passes, control)
}

fn loss(config: &Config, net: &NetSpec, train: &dyn Dataset) -> Result<Loss> {
    let (output, classes) = (net.output(), train.classes());
    if output.len() != classes {
        let last = net.nodes.last().map_or("", |node| &node.name);
        return Err(Error::usage(format!(
            "the last layer, `{last}`, gives {output}, {} values a sample, but the data set has {classes} classes",
            output.len()
        )));
    }
    let weights = match &config.loss {
        raw::Loss::SoftmaxCrossEntropy { class_weights: Some(raw::ClassWeights::Given(weights)), .. } => {
            Some(weights.clone())
        }
        raw::Loss::SoftmaxCrossEntropy { class_weights: Some(raw::ClassWeights::Balanced(_)), .. } => {
            Some(data::balanced_class_weights(train))
        }
        _ => None,
    };
    Loss::new(&config.loss, classes, weights)
}

/// Where this rank's GPU, if it has one, reads samples.
pub fn inlet(config: &Config, plan: &Plan) -> Result<Option<Arc<Inlet>>> {
    match device::choose(config.run.device) {
        Place::Host => Ok(None),
        Place::Cuda => {
            let values = config.model.input.iter().product();
            let (gpu, element) = (Gpu::of_this_rank()?, config.run.precision.element());
            Ok(Some(Arc::new(Inlet::new(&gpu, plan.micro_batch, values, element)?)))
        }
    }
}

/// This rank's batches from `start` on, without end: the loop knows when the run is over.
pub fn feed(
    config: &Config,
    plan: &Plan,
    parts: &Parts,
    rank: &Rank,
    (loader, inlet): (Loader, Option<Arc<Inlet>>),
    start: Position,
) -> Result<Feed> {
    let Rank { world, health } = rank;
    let batching =
        Batching { global: plan.global_batch, micro: config.batch.micro, rank: world.rank, size: world.size };
    let way = ways(config, plan, &loader.augmenter, inlet, &[(&parts.train, "training")])?.remove(0);
    let loader = Loader { form: Way::form(&way), ..loader };
    let queue = DataQueue::train(parts.train.clone(), loader, batching, start, u32::MAX)?;
    Ok(Feed::new(queue, way, health.clone()))
}

pub fn evaluator(
    config: &Config,
    plan: &Plan,
    parts: &Parts,
    rank: &Rank,
    (loader, inlet): (Loader, Option<Arc<Inlet>>),
) -> Result<Evaluator> {
    let named = parts.validation.iter().map(|set| (set, "validation")).chain([(&parts.test, "test")]);
    let named: Vec<(&Arc<dyn Dataset>, &str)> = named.collect();
    let ways = ways(config, plan, &loader.augmenter.without_randomness(), inlet, &named)?;
    let mut sources =
        named.into_iter().zip(ways).map(|((set, _), way)| Source { set: set.clone(), way, buffers: Vec::new() });
    Ok(Evaluator {
        validation: parts.validation.as_ref().and_then(|_| sources.next()),
        test: sources.next().expect("there is a test set"),
        loader,
        batch: plan.micro_batch,
        rank: rank.world.rank,
        size: rank.world.size,
        health: rank.health.clone(),
    })
}

/// How sets that are fed one after the other get to the inlet on the GPU; none where there is none.
fn ways(
    config: &Config,
    plan: &Plan,
    augmenter: &Augmenter,
    inlet: Option<Arc<Inlet>>,
    sets: &[(&Arc<dyn Dataset>, &str)],
) -> Result<Vec<Option<Arc<Way>>>> {
    let Some(inlet) = inlet else { return Ok(vec![None; sets.len()]) };
    let gpu = Gpu::of_this_rank()?;
    let choice = config.data.shared.resident;
    let resident = |(set, name): &(&Arc<dyn Dataset>, &str)| Resident::new(choice, &gpu, &***set, augmenter, name);
    let residents: Vec<Option<Resident>> = sets.iter().map(resident).collect::<Result<_>>()?;
    let values = augmenter.output().len();
    let layout = |resident: &Option<Resident>| Layout::new(plan.micro_batch, values, resident.is_some());
    let layouts: Vec<Layout> = residents.iter().map(layout).collect();
    let dock = Arc::new(Dock::new(&gpu, &layouts)?);
    let way = |(resident, layout)| {
        let way = Way::new(&gpu, (inlet.clone(), dock.clone(), layout), augmenter, resident)?;
        Ok(Some(Arc::new(way)))
    };
    residents.into_iter().zip(layouts).map(way).collect()
}
