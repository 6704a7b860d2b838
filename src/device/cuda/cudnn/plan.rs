//! A plan: a graph on one engine, ready to run.

use super::descriptor::{Descriptor, check};
use super::graph::{ALIGNMENT, Graph};
use crate::error::Result;
use cudarc::cudnn::sys::{self, cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind};
use std::sync::Arc;

/// Buffers at most of a product.
const BUFFERS: usize = 4;
/// Packs that are kept. A training step uses the same buffers again and again, but for the data, which come in turn from a
/// few buffers of a queue.
const PACKS: usize = 8;

pub struct Plan {
    descriptor: Descriptor,
    graph: Arc<Graph>,
    name: String,
    workspace_bytes: usize,
    packs: Vec<Pack>,
    /// Where the next pack goes when all are in use.
    oldest: usize,
}

/// The buffers of an execution as cuDNN wants them. Once finalized they cannot change, and to make a pack is to allocate: so
/// there is one for each set of buffers that was met.
struct Pack {
    buffers: [usize; BUFFERS],
    workspace: usize,
    descriptor: Descriptor,
}

impl Plan {
    /// The error is that the engine does not support the graph.
    pub(super) fn new(graph: &Arc<Graph>, configuration: Descriptor, name: String) -> Result<Plan> {
        let alone = graph.handle.lock()?;
        let descriptor = (graph.handle.of_plan(Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?)?)
            .with(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, &[configuration.link()])?
            .finalized()?;
        drop(alone);
        let bytes = descriptor.integer(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
        Ok(Plan {
            descriptor,
            graph: graph.clone(),
            name,
            workspace_bytes: usize::try_from(bytes).unwrap_or(0),
            packs: Vec::with_capacity(PACKS),
            oldest: 0,
        })
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }
    /// Engine and knobs.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Of memory that `run` may write.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Puts the product into the handle's stream. `buffers` are addresses in the product's order; the first run with any of
    /// them allocates on the host, later ones do not.
    ///
    /// # Safety
    /// The buffers have the graph's lengths, and `workspace` as many bytes as it says; until the stream has come past the
    /// product they stay allocated, and nobody else writes them or touches the result.
    pub unsafe fn run(&mut self, buffers: &[usize], workspace: usize) -> Result<()> {
        let aligned = buffers.iter().chain([&workspace]).all(|address| address % ALIGNMENT == 0);
        assert!(aligned && buffers.len() == self.graph.buffers().len(), "{buffers:x?} for the {}", self.graph);
        let mut key = [0; BUFFERS];
        key[..buffers.len()].copy_from_slice(buffers);
        let known = self.packs.iter().position(|pack| pack.buffers == key && pack.workspace == workspace);
        let pack = match known {
            Some(known) => known,
            None => self.add(key, buffers, workspace)?,
        };
        let (handle, pack) = (self.graph.handle.raw()?, &self.packs[pack].descriptor);
        let _alone = self.graph.handle.lock()?;
        // SAFETY: the plan fits the pack; the memory is the caller's promise.
        let status = unsafe { sys::cudnnBackendExecute(handle, self.descriptor.raw(), pack.raw()) };
        check("cudnnBackendExecute", status)
            .map_err(|error| error.context(format_args!("{}, {}", self.graph, self.name)))
    }

    /// The number of a new pack.
    fn add(&mut self, key: [usize; BUFFERS], buffers: &[usize], workspace: usize) -> Result<usize> {
        let pack = Pack { buffers: key, workspace, descriptor: self.graph.pack(buffers, workspace)? };
        if self.packs.len() < PACKS {
            self.packs.push(pack);
            return Ok(self.packs.len() - 1);
        }
        let number = self.oldest;
        self.packs[number] = pack;
        self.oldest = (self.oldest + 1) % PACKS;
        Ok(number)
    }
}
