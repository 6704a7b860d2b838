//! What a rank takes of its GPU's memory, counted before any of it is taken: for `trainer plan`, and to refuse a batch that
//! does not fit by the one that would. Only the workspaces of cuDNN's and cuBLASLt's algorithms, among which timing chooses, are
//! not known before; of them there is a bound. What CUDA and NCCL take for themselves is not counted: it depends on their versions
//! and, NCCL's, on how the GPUs are connected.

use super::feed;
use super::update::{nccl::bytes_to_sum_in, shards};
use crate::config::plan::{Plan, Samples};
use crate::config::raw::{Config, NcclUpdate, Parallel, Resident, TransportChoice};
use crate::device::Place;
use crate::device::cuda::{WORKSPACE_PART, mib};
use crate::error::Result;
use crate::model::GpuScratch;
use crate::model::net::{self, Options};
use crate::model::params::ParamTable;
use crate::model::precision::Precision;
use crate::model::spec::NetSpec;
use crate::optim;

/// By what it is for; tables of a few KiB are left out.
pub struct Bill {
    pub rows: Vec<(&'static str, usize)>,
    /// At most so much more for workspaces.
    pub workspaces: usize,
}

impl Bill {
    /// Without workspaces.
    pub fn total(&self) -> usize {
        self.rows.iter().map(|(_, bytes)| bytes).sum()
    }

    /// With the workspaces that are possible on a GPU of so many bytes.
    fn most(&self, gpu: usize) -> usize {
        self.total() + self.workspaces.min(gpu / WORKSPACE_PART)
    }
}

/// What a rank needs that trains, or that only evaluates.
pub struct Need<'a> {
    config: &'a Config,
    plan: &'a Plan,
    net: NetSpec,
    samples: Samples,
    training: bool,
}

impl<'a> Need<'a> {
    pub fn new(config: &'a Config, plan: &'a Plan, samples: Samples, training: bool) -> Result<Need<'a>> {
        Ok(Need { config, plan, net: NetSpec::new(&config.model)?.on(Place::Cuda), samples, training })
    }

    pub fn bill(&self) -> Bill {
        self.bill_for(self.plan)
    }

    fn bill_for(&self, plan: &Plan) -> Bill {
        let Need { config, net, training, .. } = self;
        let (len, precision) = (ParamTable::new(net).len(), config.run.precision);
        let parameters = len * Precision::F32.bytes();
        let (least, workspaces) = self.activations(plan);
        let mut rows = vec![("activations, their gradients, scratch", least)];
        rows.extend(self.data(plan));
        rows.push(("parameters", parameters));
        if precision != Precision::F32 {
            rows.push(("parameters in 16 bits", len * precision.bytes()));
        }
        if *training {
            rows.push(("gradients", parameters));
            // See `gradient`: a sum for each level of the tree over micro-batches.
            let levels = plan.micros_per_rank.next_power_of_two().ilog2() as usize;
            rows.push(("gradients of micro-batches", levels * parameters));
            let (held, to_sum) = self.update(plan, &ParamTable::new(net));
            rows.push(("optimizer state", optim::new(&config.optimizer).state().len() * held));
            rows.push(("gradients in 16 bits", to_sum));
        }
        rows.retain(|(_, bytes)| *bytes > 0);
        Bill { rows, workspaces }
    }

    /// Bytes of a tensor of the optimizer's state, and those in which NCCL sums.
    fn update(&self, plan: &Plan, table: &ParamTable) -> (usize, usize) {
        let Parallel { transport, nccl_update, reduce_dtype, .. } = self.config.parallel;
        if transport != TransportChoice::Nccl || plan.ranks == 1 {
            return (table.len() * size_of::<f32>(), 0);
        }
        let buckets = table.buckets(plan.nccl_bucket_bytes, |_| false);
        let shards = match nccl_update {
            NcclUpdate::Replicated => shards::replicated(&buckets),
            // All ranks hold as much.
            NcclUpdate::Sharded => shards::sharded(&buckets, plan.ranks, 0),
        };
        (shards::held(&shards) * size_of::<f32>(), bytes_to_sum_in(reduce_dtype, &shards))
    }

    /// Bytes of the net's arena without workspaces, and how much more it is at most with them.
    fn activations(&self, plan: &Plan) -> (usize, usize) {
        let (precision, training) = (self.config.run.precision, self.training);
        let options =
            Options { batch: plan.micro_batch, place: Place::Cuda, precision, training, ..Options::default() };
        let scratch = net::gpu_scratch(&self.net, &options);
        let with = |of: fn(&GpuScratch) -> usize| {
            net::memory_bytes(&self.net, &options, &scratch.iter().map(of).collect::<Vec<_>>())
        };
        let least = with(|node| node.bytes);
        (least, with(|node| node.bytes + node.workspace) - least)
    }

    /// Batches, and sets that are to stay on the GPU. A set that may is no need: it does if there is room.
    fn data(&self, plan: &Plan) -> [(&'static str, usize); 2] {
        let (values, resident) = (self.net.input.len(), self.config.data.shared.resident == Resident::On);
        let element = self.config.run.precision.element();
        let (inlet, dock) = feed::gpu_bytes(plan.micro_batch, values, element, resident);
        let Samples { train, validation, test } = self.samples;
        // Training has a dock, and so has evaluation.
        let (docks, samples) = if self.training { (2, train) } else { (1, 0) };
        let sets = if resident { (samples + validation + test) * values } else { 0 };
        [("a batch", inlet + docks * dock), ("data sets", sets)]
    }

    /// The whole, row by row.
    pub fn describe(&self) -> String {
        let bill = self.bill();
        let rows: Vec<String> = bill.rows.iter().map(|(what, bytes)| format!("{what} {}", mib(*bytes))).collect();
        format!(
            "{} samples at once take {} ({}), and up to {} more for workspaces of algorithms",
            self.plan.micro_batch,
            mib(bill.total()),
            rows.join(", "),
            mib(bill.workspaces)
        )
    }

    /// What to set so that a rank fits into so many bytes of a GPU with `gpu` bytes.
    pub fn advice(&self, room: usize, gpu: usize) -> String {
        let Plan { local_batch, micro_batch, ranks, .. } = *self.plan;
        let fits = |samples: usize, micros: usize| {
            self.bill_for(&Plan { micro_batch: samples, micros_per_rank: micros, ..self.plan.clone() }).most(gpu)
                <= room
        };
        // `fits(low)`, if it is not 0, and not `fits(high)`.
        let (mut low, mut high) = (0, micro_batch);
        while high - low > 1 {
            let middle = (low + high) / 2;
            *(if fits(middle, 1) { &mut low } else { &mut high }) = middle;
        }
        let mut divisors = (1..=low).rev().filter(|samples| local_batch.is_multiple_of(*samples));
        let micro = divisors.find(|&samples| fits(samples, local_batch / samples));
        let micro = micro.map(|samples| format!("batch.micro = {samples}"));
        let batch = &self.config.batch;
        let whole = match (batch.micro, batch.global) {
            (Some(_), _) => None,
            (None, Some(_)) => Some(format!("batch.global = {}", low * ranks)),
            (None, None) => Some(format!("batch.local = {low}")),
        };
        let ways: Vec<String> = whole.into_iter().chain(micro).collect();
        match low {
            0 => "Not even one sample fits: take a GPU with more memory, or a smaller model".to_owned(),
            _ if ways.is_empty() => {
                format!("At most {low} samples fit, in one pass: take batch.micro out, and lower the batch")
            }
            _ => format!("At most {low} samples at once fit: set {}", ways.join(", or ")),
        }
    }
}
