//! Gradients are reduced, and what follows from their sums is done, while backward goes on. They lie in one arena in the
//! order in which backward finishes them; a bucket is a contiguous range of it, worked off as soon as its last tensor is
//! written.
//!
//! ```text
//! training thread        backward ... start(0) ... start(1) ... start(2)  wait(0) wait(1) wait(2): [ bucket 2 ]
//! lockstep-comm thread               [ bucket 0 ]  [ bucket 1 ]
//! ```
//!
//! Buckets are worked off one after the other, in the order in which they were started, which must be the same on all ranks;
//! on which thread makes no difference to the others. A thread that waits for a bucket works off what is still queued itself:
//! once backward is over, that is the rank's whole team of threads rather than the communication thread alone. Without a
//! communication thread all is done when it is waited for, so that the time counts as communication.

use super::Communicator;
use crate::error::{Context, Error, Kind, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What is to be done with buckets.
pub trait Work: Send + 'static {
    /// The collectives of one bucket and what else belongs to it.
    fn run(&mut self, bucket: usize, comm: &mut dyn Communicator) -> Result<Waited>;
}

/// Time that went into waiting rather than into work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Waited {
    /// For this rank's GPU, which still computed what is to be reduced. It comes before all else.
    pub for_gpu: Duration,
    /// For other ranks to come.
    pub for_peers: Duration,
}

impl Waited {
    pub fn for_peers(for_peers: Duration) -> Waited {
        Waited { for_gpu: Duration::ZERO, for_peers }
    }
}

/// Works off buckets, on a thread of its own or on that of the caller.
pub struct Reducer<W: Work> {
    desk: Arc<Desk<W>>,
    thread: Option<CommThread>,
}

/// What the two threads share.
struct Desk<W> {
    hands: Mutex<Hands<W>>,
    /// Buckets that were started and not yet taken up. Whoever takes one holds `hands`.
    inbox: Sender<usize>,
    queue: Receiver<usize>,
}

/// Who holds these works.
struct Hands<W> {
    comm: Box<dyn Communicator>,
    work: W,
    /// By bucket: what became of it, from its end until `wait`.
    outcomes: Vec<Option<Outcome>>,
}

#[derive(Clone)]
struct Outcome {
    begun: Instant,
    waited: Result<Waited>,
}

struct CommThread {
    /// Rings once for every bucket.
    bell: Sender<()>,
    handle: JoinHandle<()>,
}

impl<W: Work> Reducer<W> {
    /// For at most `buckets` buckets under way. With `overlap` a communication thread is started.
    pub fn new(comm: Box<dyn Communicator>, work: W, buckets: usize, overlap: bool) -> Result<Reducer<W>> {
        let (inbox, queue) = bounded(buckets);
        let hands = Mutex::new(Hands { comm, work, outcomes: vec![None; buckets] });
        let desk = Arc::new(Desk { hands, inbox, queue });
        let thread = if overlap { Some(CommThread::start(desk.clone(), buckets)?) } else { None };
        Ok(Reducer { desk, thread })
    }

    /// Queues a bucket that backward has written. Returns at once; allocates nothing.
    ///
    /// # Safety
    /// Until `wait(bucket)` has returned, or the reducer is dropped, nobody else touches the memory that `Work::run` uses
    /// for this bucket.
    pub unsafe fn start(&mut self, bucket: usize) -> Result<()> {
        self.desk.inbox.try_send(bucket).or_kind(Kind::Internal, "more buckets under way than there are")?;
        if let Some(CommThread { bell, .. }) = &self.thread {
            // Full: then the thread is going to look into the queue anyway.
            let _ = bell.try_send(());
        }
        Ok(())
    }

    /// Returns when the bucket is done, doing what is in the queue before it. Gives what of this wait did not go into work.
    pub fn wait(&mut self, bucket: usize) -> Result<Waited> {
        let start = Instant::now();
        let mut hands = self.desk.hands();
        loop {
            if let Some(outcome) = hands.outcomes[bucket].take() {
                return outcome.since(start);
            }
            if !self.desk.work_off_next(&mut hands) {
                return Err(Error::internal("waiting for a bucket that was not started"));
            }
        }
    }

    /// The communicator for other collectives, and the work, once all buckets that were started are done.
    pub fn with<T>(&self, use_them: impl FnOnce(&mut dyn Communicator, &mut W) -> T) -> T {
        let mut hands = self.desk.hands();
        while self.desk.work_off_next(&mut hands) {}
        let Hands { comm, work, .. } = &mut *hands;
        use_them(&mut **comm, work)
    }
}

impl<W: Work> Desk<W> {
    /// A panic inside a collective has already ended its thread; the others still may ask.
    fn hands(&self) -> MutexGuard<'_, Hands<W>> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if nothing is queued.
    fn work_off_next(&self, hands: &mut Hands<W>) -> bool {
        let Ok(bucket) = self.queue.try_recv() else { return false };
        let begun = Instant::now();
        hands.outcomes[bucket] = Some(Outcome { begun, waited: hands.work.run(bucket, &mut *hands.comm) });
        true
    }
}

impl Outcome {
    /// What of its waits lies behind `start`.
    fn since(self, start: Instant) -> Result<Waited> {
        let Waited { for_gpu, for_peers } = self.waited?;
        let for_gpu = (self.begun + for_gpu).saturating_duration_since(start.max(self.begun));
        Ok(Waited { for_gpu, for_peers: for_peers.min(start.elapsed().saturating_sub(for_gpu)) })
    }
}

impl CommThread {
    fn start<W: Work>(desk: Arc<Desk<W>>, buckets: usize) -> Result<CommThread> {
        let (bell, rings) = bounded::<()>(buckets);
        let run = move || {
            for () in rings {
                // What the training thread has done meanwhile is no longer there.
                desk.work_off_next(&mut desk.hands());
            }
        };
        let handle = std::thread::Builder::new().name("lockstep-comm".into()).spawn(run);
        Ok(CommThread { bell, handle: handle.or_kind(Kind::Internal, "starting the communication thread")? })
    }
}

impl<W: Work> Drop for Reducer<W> {
    /// Ends the communication thread: the bucket under way is done, or fails with its peers; the others are dropped.
    fn drop(&mut self) {
        while self.desk.queue.try_recv().is_ok() {}
        if let Some(CommThread { bell, handle }) = self.thread.take() {
            drop(bell);
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::connect;
    use crate::config::raw::{Parallel, TransportChoice};
    use crate::device::{Place, SliceMut};
    use crate::launch::{rendezvous::Control, watch::Health};

    /// All-reduces bucket b, the values at address b.
    struct AllReduce {
        addresses: Vec<usize>,
        values: usize,
    }

    impl AllReduce {
        fn of(buckets: &mut [Vec<f32>]) -> AllReduce {
            let values = buckets[0].len();
            AllReduce { addresses: buckets.iter_mut().map(|bucket| bucket.as_mut_ptr() as usize).collect(), values }
        }
    }

    impl Work for AllReduce {
        fn run(&mut self, bucket: usize, comm: &mut dyn Communicator) -> Result<Waited> {
            // SAFETY: the tests keep the values, and leave a bucket alone until it is done.
            let data = unsafe { SliceMut::from_raw(Place::Host, self.addresses[bucket], 4 * self.values) };
            comm.all_reduce(data).map(Waited::for_peers)
        }
    }

    /// Three buckets a step, waited for out of order, with other collectives in between.
    #[test]
    fn buckets_are_summed_on_either_thread() {
        for overlap in [true, false] {
            let rank = move |control: Control| {
                let rank = control.rank();
                let health = Health::new(Duration::from_secs(60));
                let mut comm = connect(&Parallel::over(TransportChoice::Shm), control, health).unwrap();
                let arena = comm.allocate(4 * 30_000).unwrap();
                let addresses = (0..3).map(|bucket| arena.address() + bucket * 40_000).collect();
                let work = AllReduce { addresses, values: 10_000 };
                let mut reducer = Reducer::new(comm, work, 3, overlap).unwrap();
                for step in 0..20 {
                    for bucket in [2, 0, 1] {
                        let bytes = bucket * 40_000..(bucket + 1) * 40_000;
                        // SAFETY: nobody touches a bucket between its start and its wait.
                        let mut data = unsafe { arena.slice_mut(bytes.clone()) };
                        data.f32().fill((rank * 10 + bucket + step) as f32);
                        unsafe { reducer.start(bucket) }.unwrap();
                    }
                    for bucket in 0..3 {
                        reducer.wait(bucket).unwrap();
                        // SAFETY: as above.
                        let data = unsafe { arena.slice(bucket * 40_000..(bucket + 1) * 40_000) };
                        let expected = (10 + 2 * (bucket + step)) as f32;
                        assert!(data.f32().iter().all(|sum| *sum == expected), "step {step}, bucket {bucket}");
                    }
                    reducer.with(|comm, _| comm.barrier()).unwrap();
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
                let mut comm =
                    connect(&Parallel::over(transport), second, Health::new(Duration::from_secs(60))).unwrap();
                let mut data = vec![1.0f32; VALUES];
                // Ends when rank 0 lets go of the other end.
                let _ = go_on.recv();
                (0..4).find_map(|_| comm.all_reduce(SliceMut::from(&mut data[..])).err()).unwrap()
            });

            let health = Health::new(TIMEOUT);
            let comm = connect(&Parallel::over(transport), first, health.clone()).unwrap();
            let mut data = vec![vec![1.0f32; VALUES]; 3];
            let mut reducer = Reducer::new(comm, AllReduce::of(&mut data), 3, overlap).unwrap();
            let start = Instant::now();
            for bucket in 0..3 {
                // SAFETY: the data outlives the reducer.
                unsafe { reducer.start(bucket) }.unwrap();
            }
            let error = reducer.wait(0).unwrap_err();
            assert_eq!(error.kind(), Kind::PeerLost, "{error}");
            assert_eq!(health.check().unwrap_err().to_string(), error.to_string(), "it ends the other waits");
            drop(given_up);
            for bucket in [1, 2] {
                assert_eq!(reducer.wait(bucket).unwrap_err().to_string(), error.to_string());
            }
            assert_eq!(reducer.with(|comm, _| comm.barrier()).unwrap_err().to_string(), error.to_string());
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
        let connect = |control| {
            connect(&Parallel::over(TransportChoice::Shm), control, Health::new(Duration::from_secs(60))).unwrap()
        };
        let (started, go_on) = bounded::<()>(0);
        let peer = std::thread::spawn(move || {
            let mut comm = connect(second);
            let _ = go_on.recv();
            comm.all_reduce(SliceMut::from(&mut [2.0f32; 10][..])).unwrap();
        });
        let mut data = [vec![1.0f32; 10]];
        let mut reducer = Reducer::new(connect(first), AllReduce::of(&mut data), 1, false).unwrap();
        // SAFETY: the data outlives the reducer's use of it.
        unsafe { reducer.start(0) }.unwrap();
        // A `start` that reduced would wait for the peer, which waits for this.
        drop(started);
        reducer.wait(0).unwrap();
        assert_eq!(data[0], [3.0; 10]);
        peer.join().unwrap();
    }

    /// Of a bucket that was begun before it was waited for, only what still went on counts.
    #[test]
    fn a_wait_is_told_what_of_it_was_not_work() {
        let ms = Duration::from_millis;
        let begun = Instant::now() - ms(100);
        let since = |start| {
            let waited = Waited { for_gpu: ms(30), for_peers: Duration::MAX };
            Outcome { begun, waited: Ok(waited) }.since(start).unwrap()
        };
        for (start, for_gpu) in [(begun - ms(10), 30), (begun, 30), (begun + ms(20), 10), (begun + ms(40), 0)] {
            let waited = since(start);
            assert_eq!(waited.for_gpu, ms(for_gpu));
            assert!(waited.for_peers + waited.for_gpu <= start.elapsed());
        }
        assert_eq!(since(Instant::now() + ms(1000)), Waited::default());
    }

    #[test]
    fn a_lost_peer_is_reported_by_wait() {
        let [first, second] = Control::local(2).unwrap().try_into().unwrap();
        let connect = |control| {
            connect(&Parallel::over(TransportChoice::Shm), control, Health::new(Duration::from_secs(60))).unwrap()
        };
        let peer = std::thread::spawn(move || drop(connect(second)));
        let mut data = [vec![1.0f32; 5000]];
        let mut reducer = Reducer::new(connect(first), AllReduce::of(&mut data), 1, true).unwrap();
        // SAFETY: the data outlives the reducer's use of it.
        unsafe { reducer.start(0) }.unwrap();
        assert_eq!(reducer.wait(0).unwrap_err().kind(), Kind::PeerLost);
        peer.join().unwrap();
    }
}
