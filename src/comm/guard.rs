//! Nothing is begun after a failure.
//!
//! After one the ranks are no longer in step: a stream may end in the middle of a message, and a peer that comes late may
//! still write into this rank's arenas. So the first error, of whatever operation or from the watch, is the answer to
//! every later operation, and it ends this rank's other waits.

use super::hosts::Hosts;
use super::{Communicator, Update};
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use crate::launch::watch::Health;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub struct Guarded {
    comm: Box<dyn Communicator>,
    /// Holds the first failure.
    health: Arc<Health>,
}

impl Guarded {
    pub fn new(comm: Box<dyn Communicator>, health: Arc<Health>) -> Guarded {
        Guarded { comm, health }
    }

    fn run<T>(&mut self, operation: impl FnOnce(&mut dyn Communicator) -> Result<T>) -> Result<T> {
        self.health.check()?;
        operation(&mut *self.comm).inspect_err(|error| self.health.fail(error.clone()))
    }
}

impl Communicator for Guarded {
    fn rank(&self) -> usize {
        self.comm.rank()
    }
    fn size(&self) -> usize {
        self.comm.size()
    }
    fn hosts(&self) -> Hosts {
        self.comm.hosts()
    }
    fn transport(&self) -> &'static str {
        self.comm.transport()
    }
    fn allocate(&mut self, bytes: usize) -> Result<Arena> {
        self.run(|comm| comm.allocate(bytes))
    }
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena> {
        self.run(|comm| comm.allocate_replicated(bytes))
    }
    fn received(&self, len: usize, each: &mut dyn FnMut(Range<usize>)) {
        self.comm.received(len, each);
    }
    fn all_reduce(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(|comm| comm.all_reduce(data))
    }
    fn reduce_scatter(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(|comm| comm.reduce_scatter(data))
    }
    fn all_gather(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(|comm| comm.all_gather(data))
    }
    fn reduce_update(&mut self, terms: SliceMut<'_>, values: SliceMut<'_>, update: &Update<'_>) -> Result<Duration> {
        self.run(|comm| comm.reduce_update(terms, values, update))
    }
    fn broadcast(&mut self, data: SliceMut<'_>, root: usize) -> Result<Duration> {
        self.run(|comm| comm.broadcast(data, root))
    }
    fn barrier(&mut self) -> Result<Duration> {
        self.run(|comm| comm.barrier())
    }
    fn expose(&mut self, data: SliceMut<'_>, work: &mut dyn FnMut(&[usize], Range<usize>)) -> Result<bool> {
        self.run(|comm| comm.expose(data, work))
    }
}
