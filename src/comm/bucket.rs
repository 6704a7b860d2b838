//! Gradients are reduced while backward goes on. They lie in one arena in the order in which backward finishes them; a
//! bucket is a contiguous range of it, all-reduced in place as soon as its last tensor is written.
//!
//! ```text
//! training thread        backward ... start(0) ... start(1) ... start(2)  wait(0) update  wait(1) update ...
//! lockstep-comm thread               [ all-reduce 0 ][ all-reduce 1 ][ all-reduce 2 ]
//! ```
//!
//! Buckets are reduced one after the other, in the order in which they were started, which must be the same on all ranks.

use super::Communicator;
use crate::device::SliceMut;
use crate::error::{Context, Error, Kind, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What waiting for a bucket cost the training thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Time in which the training thread stood still.
    pub exposed: Duration,
    /// How much of it went into waiting for other ranks to come, rather than into moving and adding bytes.
    pub for_peers: Duration,
}

/// Runs the all-reduces of buckets, on a thread of its own or, without overlap, on the caller's.
pub struct Reducer {
    comm: Arc<Mutex<Box<dyn Communicator>>>,
    thread: Option<CommThread>,
    /// By bucket: what became of it, from its end until `wait`.
    outcomes: Vec<Option<Result<Waited>>>,
    started: usize,
    finished: usize,
}

struct CommThread {
    requests: Sender<Request>,
    results: Receiver<(usize, Result<Duration>)>,
    handle: JoinHandle<()>,
}

struct Request {
    bucket: usize,
    data: SliceMut<'static>,
}

impl Reducer {
    /// For at most `buckets` buckets under way. With `overlap` a communication thread is started.
    pub fn new(comm: Box<dyn Communicator>, buckets: usize, overlap: bool) -> Result<Reducer> {
        let comm = Arc::new(Mutex::new(comm));
        let thread = if overlap { Some(CommThread::start(comm.clone(), buckets)?) } else { None };
        Ok(Reducer { comm, thread, outcomes: vec![None; buckets], started: 0, finished: 0 })
    }

    /// Starts the all-reduce of a bucket that backward has written. Returns at once with overlap; allocates nothing.
    ///
    /// # Safety
    /// `data` stays valid, and nobody else touches it, until `wait(bucket)` has returned or the reducer is dropped.
    pub unsafe fn start(&mut self, bucket: usize, data: SliceMut<'_>) -> Result<()> {
        self.started += 1;
        let Some(thread) = &self.thread else {
            let start = Instant::now();
            let result = lock(&self.comm).all_reduce(data);
            let waited = |for_peers| Waited { exposed: start.elapsed(), for_peers };
            self.outcomes[bucket] = Some(result.map(waited));
            self.finished += 1;
            return Ok(());
        };
        // SAFETY: the caller keeps the memory as long as the request lives.
        let data = unsafe { SliceMut::from_raw(data.place(), data.address(), data.bytes()) };
        thread.requests.send(Request { bucket, data }).or_kind(Kind::Internal, "the communication thread has ended")
    }

    /// Returns when the bucket holds the sum over ranks.
    pub fn wait(&mut self, bucket: usize) -> Result<Waited> {
        let start = Instant::now();
        while self.outcomes[bucket].is_none() {
            self.collect()?;
        }
        let outcome = self.outcomes[bucket].take().expect("the loop ended");
        if self.thread.is_none() {
            return outcome;
        }
        let exposed = start.elapsed();
        outcome.map(|waited| Waited { exposed, for_peers: waited.for_peers.min(exposed) })
    }

    /// The communicator for other collectives, once all buckets that were started are done.
    pub fn with<T>(&mut self, use_it: impl FnOnce(&mut dyn Communicator) -> Result<T>) -> Result<T> {
        while self.finished < self.started {
            self.collect()?;
        }
        use_it(&mut **lock(&self.comm))
    }

    /// Takes the next result of the communication thread.
    fn collect(&mut self) -> Result<()> {
        let thread = self.thread.as_ref().filter(|_| self.finished < self.started);
        let thread = thread.ok_or_else(|| Error::internal("waiting for a bucket that was not started"))?;
        let (bucket, result) =
            thread.results.recv().or_kind(Kind::Internal, "the communication thread has ended before its work")?;
        self.outcomes[bucket] = Some(result.map(|for_peers| Waited { exposed: Duration::ZERO, for_peers }));
        self.finished += 1;
        Ok(())
    }
}

impl CommThread {
    fn start(comm: Arc<Mutex<Box<dyn Communicator>>>, buckets: usize) -> Result<CommThread> {
        let (requests, work) = bounded::<Request>(buckets);
        let (done, results) = bounded(buckets);
        let run = move || {
            for Request { bucket, data } in work {
                let result = lock(&comm).all_reduce(data);
                if done.send((bucket, result)).is_err() {
                    return;
                }
            }
        };
        let handle = std::thread::Builder::new().name("lockstep-comm".into()).spawn(run);
        Ok(CommThread {
            requests,
            results,
            handle: handle.or_kind(Kind::Internal, "starting the communication thread")?,
        })
    }
}

impl Drop for Reducer {
    /// Ends the communication thread: buckets under way are reduced, or fail with their peers.
    fn drop(&mut self) {
        if let Some(CommThread { requests, results, handle }) = self.thread.take() {
            drop((requests, results));
            let _ = handle.join();
        }
    }
}

/// A panic inside a collective has already ended its thread; the others still may ask.
fn lock(comm: &Mutex<Box<dyn Communicator>>) -> std::sync::MutexGuard<'_, Box<dyn Communicator>> {
    comm.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::connect;
    use crate::config::raw::TransportChoice;
    use crate::launch::{rendezvous::Control, watch::Health};

    /// Three buckets a step, waited for out of order, with other collectives in between.
    #[test]
    fn buckets_are_summed_on_either_thread() {
        for overlap in [true, false] {
            let rank = move |control: Control| {
                let rank = control.rank();
                let health = Health::new(Duration::from_secs(60));
                let comm = connect(TransportChoice::Shm, control, health).unwrap();
                let mut reducer = Reducer::new(comm, 3, overlap).unwrap();
                let arena = reducer.with(|comm| comm.allocate(4 * 30_000)).unwrap();
                for step in 0..20 {
                    for bucket in [2, 0, 1] {
                        let bytes = bucket * 40_000..(bucket + 1) * 40_000;
                        // SAFETY: nobody touches a bucket between its start and its wait.
                        let mut data = unsafe { arena.slice_mut(bytes.clone()) };
                        data.f32().fill((rank * 10 + bucket + step) as f32);
                        unsafe { reducer.start(bucket, data) }.unwrap();
                    }
                    for bucket in 0..3 {
                        let waited = reducer.wait(bucket).unwrap();
                        assert!(waited.for_peers <= waited.exposed);
                        // SAFETY: as above.
                        let data = unsafe { arena.slice(bucket * 40_000..(bucket + 1) * 40_000) };
                        let expected = (10 + 2 * (bucket + step)) as f32;
                        assert!(data.f32().iter().all(|sum| *sum == expected), "step {step}, bucket {bucket}");
                    }
                    reducer.with(|comm| comm.barrier()).unwrap();
                }
                assert!(reducer.wait(0).unwrap_err().to_string().contains("not started"));
            };
            std::thread::scope(|scope| {
                Control::local(2).unwrap().into_iter().for_each(|control| drop(scope.spawn(move || rank(control))));
            });
        }
    }

    #[test]
    fn a_lost_peer_is_reported_by_wait() {
        let [first, second] = Control::local(2).unwrap().try_into().unwrap();
        let connect = |control| connect(TransportChoice::Shm, control, Health::new(Duration::from_secs(60))).unwrap();
        let peer = std::thread::spawn(move || drop(connect(second)));
        let mut reducer = Reducer::new(connect(first), 1, true).unwrap();
        let mut data = vec![1.0f32; 5000];
        // SAFETY: the data outlives the reducer's use of it.
        unsafe { reducer.start(0, SliceMut::from(&mut data[..])) }.unwrap();
        assert_eq!(reducer.wait(0).unwrap_err().kind(), Kind::PeerLost);
        peer.join().unwrap();
    }
}
