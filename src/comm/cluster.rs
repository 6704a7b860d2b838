//! Ranks of several hosts: the ring schedule between hosts, over whatever connects them, and shared memory inside a host.
//!
//! The ranks of a host arrive at an operation as in `shm`; then each works for its own chunk, and as its host's delegate for
//! chunks of others, with the data of all of them in reach; then they leave together. A rank alone on its host needs neither.

use super::hosts::Hosts;
use super::ring::{Job, Mesh, Ring};
use super::shm::Shm;
use super::{Communicator, Operation, Update, chunk, reduce_then_update};
use crate::device::{Arena, SliceMut};
use crate::error::Result;
use std::ops::Range;
use std::time::Duration;

pub struct Cluster {
    rank: usize,
    mesh: Box<dyn Mesh>,
    ring: Ring,
    /// Where ranks share this host.
    inside: Option<Inside>,
    /// Addresses of the arenas that a rank alone on its host has got.
    arenas: Vec<Range<usize>>,
    transport: &'static str,
}

struct Inside {
    shm: Shm,
    /// For data that is in no arena; as large as the largest so far.
    stage: Option<Arena>,
}

impl Cluster {
    /// `mesh` connects `rank` with its peers; `inside` the ranks of its host, if there are more.
    pub fn new(
        rank: usize,
        hosts: Hosts,
        mesh: Box<dyn Mesh>,
        inside: Option<Shm>,
        transport: &'static str,
    ) -> Cluster {
        let inside = inside.map(|shm| Inside { shm, stage: None });
        Cluster { rank, mesh, ring: Ring::new(rank, hosts), inside, arenas: Vec::new(), transport }
    }

    fn run(&mut self, operation: Operation, root: usize, mut data: SliceMut<'_>) -> Result<Duration> {
        let len = data.f32().len();
        let Some(inside) = &mut self.inside else {
            let job = Job { operation, root, len, data: &[data.address()], update: None };
            // SAFETY: `data` is borrowed for as long as this takes.
            return unsafe { self.ring.run(&mut *self.mesh, &job) };
        };
        let (waited, data_of) = inside.shm.arrive(operation, root, &data)?;
        let Some(data_of) = data_of else { return Ok(waited + self.staged(operation, root, data)?) };
        let job = Job { operation, root, len, data: data_of, update: None };
        // SAFETY: arenas of all ranks of this host, which are between the two synchronisation points of one operation.
        let waited = waited + unsafe { self.ring.run(&mut *self.mesh, &job) }?;
        Ok(waited + inside.shm.leave()?)
    }

    /// Whether terms and values are where a `reduce_update` is one pass: all ranks say the same, whoever shares a host.
    fn reaches(&self, terms: &SliceMut<'_>, values: &SliceMut<'_>) -> bool {
        let in_arena = |data: &SliceMut<'_>| self.arenas.iter().any(|arena| arena.contains(&data.address()));
        match &self.inside {
            Some(inside) => inside.shm.reaches(terms, values),
            None => in_arena(terms) && in_arena(values),
        }
    }

    /// Of a rank alone on its host.
    fn arena(&mut self, bytes: usize) -> Result<Arena> {
        let arena = Arena::host(bytes)?;
        self.arenas.push(arena.address()..arena.address() + bytes.max(1));
        Ok(arena)
    }

    /// Someone's data is in no arena.
    fn staged(&mut self, operation: Operation, root: usize, data: SliceMut<'_>) -> Result<Duration> {
        let bytes = data.bytes();
        let Some(inside) = &mut self.inside else { unreachable!("a rank alone stages nothing") };
        if inside.stage.as_ref().is_none_or(|stage| stage.bytes() < bytes) {
            inside.stage = Some(inside.shm.allocate(bytes)?);
        }
        let stage = inside.stage.take().expect("just made");
        let data = data.into_f32();
        // SAFETY: between operations the stage is idle; while it is borrowed here, only the operation touches it.
        let mut staged = unsafe { stage.slice_mut(0..bytes) };
        staged.f32().copy_from_slice(data);
        let waited = self.run(operation, root, staged.reborrow())?;
        data.copy_from_slice(staged.f32());
        self.inside.as_mut().expect("as above").stage = Some(stage);
        Ok(waited)
    }
}

impl Communicator for Cluster {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.ring.hosts().size()
    }
    fn hosts(&self) -> Hosts {
        self.ring.hosts().clone()
    }
    fn transport(&self) -> &'static str {
        self.transport
    }

    fn allocate(&mut self, bytes: usize) -> Result<Arena> {
        match &mut self.inside {
            Some(inside) => inside.shm.allocate(bytes),
            None => self.arena(bytes),
        }
    }
    fn allocate_replicated(&mut self, bytes: usize) -> Result<Arena> {
        match &mut self.inside {
            Some(inside) => inside.shm.allocate_replicated(bytes),
            None => self.arena(bytes),
        }
    }
    fn received(&self, len: usize, each: &mut dyn FnMut(Range<usize>)) {
        let hosts = self.ring.hosts();
        hosts.represented(self.rank).for_each(|owner| each(chunk(len, hosts.size(), owner)));
    }

    fn all_reduce(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::AllReduce, 0, data)
    }
    fn reduce_scatter(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::ReduceScatter, 0, data)
    }
    fn all_gather(&mut self, data: SliceMut<'_>) -> Result<Duration> {
        self.run(Operation::AllGather, 0, data)
    }

    fn reduce_update(
        &mut self,
        mut terms: SliceMut<'_>,
        mut values: SliceMut<'_>,
        update: &Update<'_>,
    ) -> Result<Duration> {
        let len = terms.f32().len();
        assert_eq!(len, values.f32().len(), "a value for every sum");
        if !self.reaches(&terms, &values) {
            return reduce_then_update(self, terms, values, update);
        }
        let (operation, update_of) = (Operation::ReduceUpdate, Some((values.address(), update)));
        let Some(inside) = &mut self.inside else {
            let job = Job { operation, root: 0, len, data: &[terms.address()], update: update_of };
            // SAFETY: both are borrowed for as long as this takes.
            return unsafe { self.ring.run(&mut *self.mesh, &job) };
        };
        let (waited, data_of) = inside.shm.arrive(operation, 0, &terms)?;
        let data = data_of.expect("terms are in arenas on all ranks or on none");
        let job = Job { operation, root: 0, len, data, update: update_of };
        // SAFETY: as in `run`, and of the values every rank writes what nobody else does.
        let waited = waited + unsafe { self.ring.run(&mut *self.mesh, &job) }?;
        Ok(waited + inside.shm.leave()?)
    }

    fn broadcast(&mut self, data: SliceMut<'_>, root: usize) -> Result<Duration> {
        self.run(Operation::Broadcast, root, data)
    }
    fn barrier(&mut self) -> Result<Duration> {
        self.run(Operation::Barrier, 0, SliceMut::empty())
    }
}
