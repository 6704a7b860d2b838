//! Collectives of the ranks' GPUs by NCCL, in device memory, on a stream.
//!
//! NCCL knows nothing of this program's ranks. The communicator that joins them hands round NCCL's id, and stays for all that
//! lies in host memory; NCCL has the gradients alone. The order of its sums is its own: it depends on the ranks, their GPUs and
//! the length, but not on time, so all ranks have equal bits, and two runs on the same machines too.
//!
//! A collective ends when all ranks have come to it. If one is lost, the others' GPUs wait for ever, and with them all that is
//! behind it in their streams; the host does not see that. So a thread watches: it asks NCCL for errors and `Health` for lost
//! peers, and aborts the communicator, which ends what is under way. What the GPU has then is garbage. Therefore `Health` knows of
//! the failure before: whoever has taken something from the GPU asks it whether that may be kept.

use super::Communicator;
use super::patience::Patience;
use crate::device::cuda::libraries::{self, Version};
use crate::device::cuda::nccl::{self, Code, Config, DataType, Functions, Handle, IN_PROGRESS, SUCCESS, SUM, UniqueId};
use crate::device::cuda::{Gpu, Stream};
use crate::device::{Place, SliceMut};
use crate::error::{Context, Error, Kind, Result};
use crate::launch::watch::Health;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks of the watching thread.
const LOOK: Duration = Duration::from_millis(50);
/// How long the ranks take leave of each other at most.
const FAREWELL: Duration = Duration::from_secs(5);

/// This rank's end of a communicator of NCCL's, with the thread that watches it.
pub struct Nccl {
    shared: Arc<Shared>,
    rank: usize,
    size: usize,
    watcher: Option<Watcher>,
}

/// What the two threads share.
struct Shared {
    nccl: &'static Functions,
    gpu: Gpu,
    health: Arc<Health>,
    /// None once it is aborted or left. A call holds it, and none lasts.
    handle: Mutex<Option<Communicating>>,
}

struct Communicating(Handle);

// SAFETY: NCCL's communicators may be used by any thread, one at a time.
unsafe impl Send for Communicating {}

struct Watcher {
    /// Dropped, it ends the thread.
    end: Sender<()>,
    thread: JoinHandle<()>,
}

impl Nccl {
    /// Joins the GPUs of all ranks of `comm`. Collective; no two ranks have one GPU, unless `share_gpus` was called. Fails with
    /// the kind Device if NCCL does, with PeerLost if a rank does not come.
    pub fn connect(gpu: &Gpu, comm: &mut dyn Communicator, health: &Arc<Health>) -> Result<Nccl> {
        let nccl = nccl::functions()?;
        let mut id = UniqueId([0; 32]);
        if comm.rank() == 0 {
            // SAFETY: NCCL writes the id.
            nccl::check(nccl, "ncclGetUniqueId", unsafe { (nccl.ncclGetUniqueId)(&mut id) })?;
        }
        // As words, which nobody reads as numbers.
        comm.broadcast(SliceMut::from(bytemuck::cast_slice_mut::<u32, f32>(&mut id.0)), 0)?;

        let (mut handle, mut config) = (ptr::null_mut(), Config::non_blocking());
        // NCCL takes the GPU that is current in this thread.
        gpu.compute().handle()?;
        let (size, rank) = (comm.size(), comm.rank());
        // SAFETY: NCCL writes the handle and reads the config, which says how long it is.
        let code = unsafe { (nccl.ncclCommInitRankConfig)(&mut handle, size as c_int, id, rank as c_int, &mut config) };
        nccl::check(nccl, "ncclCommInitRankConfig", code)?;
        let handle = Mutex::new(Some(Communicating(handle)));
        let shared = Arc::new(Shared { nccl, gpu: gpu.clone(), health: health.clone(), handle });
        let joined = Nccl { watcher: Some(Watcher::start(shared.clone())?), shared, rank, size };
        joined.shared.settle("ncclCommInitRankConfig", "waiting for the other ranks to join NCCL")?;
        Ok(joined)
    }

    /// Puts a sum over all ranks, in place, into the stream. All ranks give as many values of the type, and ask for one thing after
    /// the other in the same order. The host waits until NCCL has put it there, not for the sum.
    ///
    /// # Safety
    /// Until the stream has come past it, `data` stays allocated and nobody else touches it.
    pub unsafe fn all_reduce(&self, data: SliceMut<'_>, of: DataType, stream: &Stream) -> Result<()> {
        let (all, count, stream) = (address(&data), data.bytes() / of.bytes(), stream.handle()?);
        self.shared.call("ncclAllReduce", |nccl, handle| {
            // SAFETY: `count` values of device memory; for how long, the caller says.
            unsafe { (nccl.ncclAllReduce)(all, all, count, of, SUM, handle, stream) }
        })?;
        self.shared.settle("ncclAllReduce", "waiting for NCCL to begin an all-reduce")
    }

    /// As `all_reduce`, but rank r gets the sums of `part(r)` alone, in their place; the rest of `data` is unspecified.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn reduce_scatter(&self, data: SliceMut<'_>, of: DataType, stream: &Stream) -> Result<()> {
        let (all, part, stream) = (address(&data), self.part(data.bytes()), stream.handle()?);
        let (mine, count) = (all.wrapping_byte_add(part.start), part.len() / of.bytes());
        self.shared.call("ncclReduceScatter", |nccl, handle| {
            // SAFETY: as above, for each rank; the results at their place among the terms, which NCCL takes for "in place".
            unsafe { (nccl.ncclReduceScatter)(all, mine, count, of, SUM, handle, stream) }
        })?;
        self.shared.settle("ncclReduceScatter", "waiting for NCCL to begin a reduce-scatter")
    }

    /// Every rank gets what rank r has in `part(r)`, in its place. For the rest as `all_reduce`.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn all_gather(&self, data: SliceMut<'_>, stream: &Stream) -> Result<()> {
        let (all, part, stream) = (address(&data), self.part(data.bytes()), stream.handle()?);
        let (mine, of) = (all.wrapping_byte_add(part.start), DataType::Float32);
        self.shared.call("ncclAllGather", |nccl, handle| {
            // SAFETY: as above.
            unsafe { (nccl.ncclAllGather)(mine, all, part.len() / of.bytes(), of, handle, stream) }
        })?;
        self.shared.settle("ncclAllGather", "waiting for NCCL to begin an all-gather")
    }

    /// This rank's of as many equal parts as there are ranks.
    fn part(&self, bytes: usize) -> Range<usize> {
        assert!(bytes.is_multiple_of(self.size), "{bytes} bytes for {} ranks", self.size);
        let each = bytes / self.size;
        self.rank * each..(self.rank + 1) * each
    }
}

fn address(data: &SliceMut<'_>) -> *mut c_void {
    assert_eq!(data.place(), Place::Cuda, "NCCL was given memory of the CPU");
    data.address() as *mut c_void
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if let Some(Watcher { end, thread }) = self.watcher.take() {
            drop(end);
            let _ = thread.join();
        }
        self.shared.leave();
    }
}

impl Watcher {
    fn start(shared: Arc<Shared>) -> Result<Watcher> {
        let (end, ended) = bounded::<()>(0);
        let watch = move || {
            while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = shared.look() {
                    // Known before what the GPU has is garbage.
                    shared.health.fail(error);
                    return shared.abort();
                }
            }
        };
        let thread = std::thread::Builder::new().name("lockstep-nccl".into()).spawn(watch);
        let thread = thread.or_kind(Kind::Internal, "starting the thread that watches NCCL")?;
        Ok(Watcher { end, thread })
    }
}

impl Shared {
    /// Whether all is well, with NCCL and with the ranks.
    fn look(&self) -> Result<()> {
        self.health.check()?;
        match self.state("ncclCommGetAsyncError") {
            // The watch of the ranks knows better whom it has lost.
            Err(error) if error.kind() == Kind::PeerLost => Err(self.health.account(error)),
            other => other.map(drop),
        }
    }

    /// Returns when the call of this name, the last one, is over: whether NCCL went on with it in a thread of its own or not.
    fn settle(&self, function: &str, what: &str) -> Result<()> {
        let patience = Patience::new();
        let poll = |_| {
            let settled = self.state(function)? == SUCCESS;
            if !settled {
                patience.rest();
            }
            Ok(settled)
        };
        self.health.wait(what, poll).map(drop)
    }

    /// `SUCCESS`, `IN_PROGRESS`, or the error with which the call of this name, or anything since, has ended.
    fn state(&self, function: &str) -> Result<Code> {
        let mut state = SUCCESS;
        // SAFETY: NCCL writes the state.
        self.call("ncclCommGetAsyncError", |nccl, handle| unsafe { (nccl.ncclCommGetAsyncError)(handle, &mut state) })?;
        nccl::check(self.nccl, function, state).map(|()| state)
    }

    fn call(&self, function: &str, call: impl FnOnce(&Functions, Handle) -> Code) -> Result<()> {
        let held = self.held();
        let Some(Communicating(handle)) = &*held else {
            self.health.check()?;
            return Err(Error::internal(format!("{function} was called when the ranks had left NCCL")));
        };
        nccl::check(self.nccl, function, call(self.nccl, *handle))
    }

    /// Ends what is under way, on the GPU too.
    fn abort(&self) {
        let Some(Communicating(handle)) = self.held().take() else { return };
        // What fails here has failed before, and was said there.
        let _ = self.gpu.compute().handle();
        // SAFETY: nobody has the handle any more.
        let _ = unsafe { (self.nccl.ncclCommAbort)(handle) };
    }

    /// In order where all is well: then all ranks do, and none is asked for anything that is not there any more.
    fn leave(&self) {
        if self.health.check().is_err() || self.finalize().is_err() {
            return self.abort();
        }
        let Some(Communicating(handle)) = self.held().take() else { return };
        // SAFETY: as above.
        let _ = unsafe { (self.nccl.ncclCommDestroy)(handle) };
    }

    fn finalize(&self) -> Result<()> {
        self.gpu.compute().handle()?;
        // SAFETY: the handle is alive.
        self.call("ncclCommFinalize", |nccl, handle| unsafe { (nccl.ncclCommFinalize)(handle) })?;
        let (start, patience) = (Instant::now(), Patience::new());
        while self.state("ncclCommFinalize")? == IN_PROGRESS {
            self.health.check()?;
            if start.elapsed() > FAREWELL {
                return Err(Error::peer_lost("the other ranks do not leave NCCL"));
            }
            patience.rest();
        }
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, Option<Communicating>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets ranks share a GPU, which NCCL otherwise refuses. Before `connect`, on all ranks.
pub fn share_gpus(rank: usize) -> Result<()> {
    const KNOWS_OF_SHARING: Version = Version { major: 2, minor: 30, patch: 0 };
    let (name, value) = match libraries::nccl()?.version >= KNOWS_OF_SHARING {
        true => ("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned()),
        // An older one takes each rank for a host of its own, and connects them by sockets.
        false => ("NCCL_HOSTID", format!("lockstep-rank-{rank}")),
    };
    // SAFETY: NCCL has not begun, and this program's other threads read variables through the standard library alone.
    unsafe { std::env::set_var(name, value) };
    Ok(())
}
