//! Gradients are reduced while backward goes on. They lie in one arena in the order in which backward finishes them; a
//! bucket is a contiguous range of it, all-reduced in place as soon as its last tensor is written.
//!
//! ```text
//! training thread        backward ... start(0) ... start(1) ... start(2)  wait(0) update  wait(1) update ...
//! lockstep-comm thread               [ all-reduce 0 ][ all-reduce 1 ][ all-reduce 2 ]
//! ```
//!
//! Buckets are reduced one after the other, in the order in which they were started, which must be the same on all ranks.
//! Without the communication thread they are reduced when they are waited for, so that the time counts as communication.

use super::Communicator;
use crate::device::SliceMut;
use crate::error::{Context, Error, Kind, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Runs the all-reduces of buckets, on a thread of its own or, without overlap, on the caller's.
pub struct Reducer {
    comm: Arc<Mutex<Box<dyn Communicator>>>,
    thread: Option<CommThread>,
    /// Without a thread: buckets that were started and not yet reduced.
    queue: VecDeque<Request>,
    /// By bucket: what became of it and how long its all-reduce waited for other ranks, from its end until `wait`.
    outcomes: Vec<Option<Result<Duration>>>,
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
        let queue = VecDeque::with_capacity(buckets);
        Ok(Reducer { comm, thread, queue, outcomes: vec![None; buckets], started: 0, finished: 0 })
    }

    /// Starts the all-reduce of a bucket that backward has written. Returns at once; allocates nothing.
    ///
    /// # Safety
    /// `data` stays valid, and nobody else touches it, until `wait(bucket)` has returned or the reducer is dropped.
    pub unsafe fn start(&mut self, bucket: usize, data: SliceMut<'_>) -> Result<()> {
        // SAFETY: the caller keeps the memory as long as the request lives.
        let data = unsafe { SliceMut::from_raw(data.place(), data.address(), data.bytes()) };
        let request = Request { bucket, data };
        self.started += 1;
        match &self.thread {
            Some(thread) => thread.requests.send(request).or_kind(Kind::Internal, "the communication thread has ended"),
            None => {
                self.queue.push_back(request);
                Ok(())
            }
        }
    }

    /// Returns when the bucket holds the sum over ranks. Gives the part of this wait that went into waiting for other ranks
    /// to come, rather than into moving and adding bytes.
    pub fn wait(&mut self, bucket: usize) -> Result<Duration> {
        let start = Instant::now();
        while self.outcomes[bucket].is_none() {
            self.collect()?;
        }
        let outcome = self.outcomes[bucket].take().expect("the loop ended");
        outcome.map(|for_peers| for_peers.min(start.elapsed()))
    }

    /// The communicator for other collectives, once all buckets that were started are done.
    pub fn with<T>(&mut self, use_it: impl FnOnce(&mut dyn Communicator) -> Result<T>) -> Result<T> {
        while self.finished < self.started {
            self.collect()?;
        }
        use_it(&mut **lock(&self.comm))
    }

    /// Takes the next result of the communication thread; without one, reduces the next bucket.
    fn collect(&mut self) -> Result<()> {
        if self.finished == self.started {
            return Err(Error::internal("waiting for a bucket that was not started"));
        }
        let (bucket, result) = match &self.thread {
            Some(thread) => {
                thread.results.recv().or_kind(Kind::Internal, "the communication thread has ended before its work")?
            }
            None => {
                let Request { bucket, data } = self.queue.pop_front().expect("started and not finished");
                (bucket, lock(&self.comm).all_reduce(data))
            }
        };
        self.outcomes[bucket] = Some(result);
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
    /// Ends the communication thread: the bucket under way is reduced, or fails with its peers.
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
                        reducer.wait(bucket).unwrap();
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

    /// Rank 1 comes to the first bucket only when rank 0 has given up on it. Then rank 0 begins nothing more: it ends
    /// after one time-out, whatever it has started, and rank 1 learns that it was left, not that it is out of step.
    #[test]
    fn after_a_failure_nothing_is_begun() {
        const TIMEOUT: Duration = Duration::from_secs(2);
        // More than the sockets take, so that rank 0 gives up in the middle of a stream.
        const VALUES: usize = 8 << 20;
        for (transport, overlap) in [
            (TransportChoice::Shm, true),
            (TransportChoice::Shm, false),
            (TransportChoice::Tcp, true),
            (TransportChoice::Tcp, false),
        ] {
            let [first, second] = Control::local(2).unwrap().try_into().unwrap();
            let (given_up, go_on) = bounded::<()>(0);
            let late = std::thread::spawn(move || {
                let mut comm = connect(transport, second, Health::new(Duration::from_secs(60))).unwrap();
                let mut data = vec![1.0f32; VALUES];
                // Ends when rank 0 lets go of the other end.
                let _ = go_on.recv();
                (0..4).find_map(|_| comm.all_reduce(SliceMut::from(&mut data[..])).err()).unwrap()
            });

            let health = Health::new(TIMEOUT);
            let comm = connect(transport, first, health.clone()).unwrap();
            let mut reducer = Reducer::new(comm, 3, overlap).unwrap();
            let mut data = vec![vec![1.0f32; VALUES]; 3];
            let start = Instant::now();
            for (bucket, data) in data.iter_mut().enumerate() {
                // SAFETY: the data outlives the reducer.
                unsafe { reducer.start(bucket, SliceMut::from(&mut data[..])) }.unwrap();
            }
            let error = reducer.wait(0).unwrap_err();
            assert_eq!(error.kind(), Kind::PeerLost, "{error}");
            assert_eq!(health.check().unwrap_err().to_string(), error.to_string(), "it ends the other waits");
            drop(given_up);
            for bucket in [1, 2] {
                assert_eq!(reducer.wait(bucket).unwrap_err().to_string(), error.to_string());
            }
            assert_eq!(reducer.with(|comm| comm.barrier()).unwrap_err().to_string(), error.to_string());
            drop(reducer);
            assert!(start.elapsed() < TIMEOUT * 2, "{transport:?}, overlap {overlap}: {:?}", start.elapsed());
            let error = late.join().unwrap();
            assert_eq!(error.kind(), Kind::PeerLost, "{transport:?}, overlap {overlap}: {error}");
        }
    }

    /// Without overlap the time of an all-reduce is that of `wait`, where the budget counts it as communication.
    #[test]
    fn without_overlap_a_bucket_is_reduced_when_it_is_waited_for() {
        let [first, second] = Control::local(2).unwrap().try_into().unwrap();
        let connect = |control| connect(TransportChoice::Shm, control, Health::new(Duration::from_secs(60))).unwrap();
        let (started, go_on) = bounded::<()>(0);
        let peer = std::thread::spawn(move || {
            let mut comm = connect(second);
            let _ = go_on.recv();
            comm.all_reduce(SliceMut::from(&mut [2.0f32; 10][..])).unwrap();
        });
        let mut reducer = Reducer::new(connect(first), 1, false).unwrap();
        let mut data = [1.0f32; 10];
        // SAFETY: the data outlives the reducer's use of it.
        unsafe { reducer.start(0, SliceMut::from(&mut data[..])) }.unwrap();
        // A `start` that reduced would wait for the peer, which waits for this.
        drop(started);
        reducer.wait(0).unwrap();
        assert_eq!(data, [3.0; 10]);
        peer.join().unwrap();
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
