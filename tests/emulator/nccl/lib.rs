//! libnccl for the emulator: ranks are processes of one machine, and their sums are made by a thread of the rank that made the
//! unique id (hub.rs).
//!
//! It behaves as a non-blocking communicator of NCCL's. Calls return at once, most with ncclInProgress; a collective waits in its
//! stream for the other ranks, whether the host does or not. When a rank has ended, the others' sums never end, and
//! ncclCommGetAsyncError says ncclRemoteError; or, with `LOCKSTEP_EMULATOR_NCCL=deaf`, nothing at all, as where GPUs are
//! connected directly. Only ncclCommAbort ends them.
//!
//! It is strict: a call before the one before is over, after the communicator is gone, or with another GPU current is refused,
//! and so is a collective for which the ranks give different numbers of values, or whose buffers overlap in another way than
//! "in place". Two ranks on one GPU are refused as NCCL does.

mod driver;
mod hub;
#[path = "../queue.rs"]
mod queue;

use hub::{Frame, Kind};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// ncclResult_t
pub type Code = c_int;
pub const SUCCESS: Code = 0;
pub const SYSTEM_ERROR: Code = 2;
pub const INVALID_ARGUMENT: Code = 4;
pub const INVALID_USAGE: Code = 5;
pub const REMOTE_ERROR: Code = 6;
const IN_PROGRESS: Code = 7;

/// ncclSum
const SUM: c_int = 0;

/// 2.29.2: one that does not know of sharing a GPU.
const VERSION: c_int = 22_902;
const MAGIC: c_uint = 0xcafe_beef;
/// How late a collective begins of which nobody waits for the stream.
const LATE: Duration = Duration::from_millis(20);

/// ncclUniqueId: a socket's name, zeros behind it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; 128]);

/// ncclConfig_t as far as all versions have it.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

struct Communicator {
    /// The one that was current when it was made.
    context: usize,
    rank: usize,
    size: usize,
    /// Of the call before: over, in progress, or how it failed, for ever.
    state: AtomicI32,
    aborted: AtomicBool,
    hub: Mutex<Option<Arc<UnixStream>>>,
    /// Those that were given collectives.
    streams: Mutex<BTreeSet<usize>>,
}

/// By handles, which are never used again.
static ALIVE: Mutex<BTreeMap<usize, Arc<Communicator>>> = Mutex::new(BTreeMap::new());

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refuse(code: Code, why: &str) -> Code {
    LAST_ERROR.set(CString::new(why).unwrap_or_default());
    code
}

fn alive(handle: usize) -> Result<Arc<Communicator>, Code> {
    let found = lock(&ALIVE).get(&handle).cloned();
    found.ok_or_else(|| refuse(INVALID_ARGUMENT, "this communicator was never there, or is no more"))
}

/// A communicator that waits for nothing, in a thread where its GPU is current.
fn ready(handle: usize) -> Result<Arc<Communicator>, Code> {
    let found = alive(handle)?;
    match found.state.load(SeqCst) {
        SUCCESS if driver::current_context() == found.context => Ok(found),
        SUCCESS => Err(refuse(INVALID_USAGE, "another GPU is current than the communicator's")),
        IN_PROGRESS => Err(refuse(INVALID_USAGE, "the call before is not over")),
        failed => Err(refuse(failed, "the communicator has failed before")),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> Code {
    let given = std::env::var("LOCKSTEP_EMULATOR_NCCL_VERSION").ok().and_then(|version| version.parse().ok());
    unsafe { version.write(given.unwrap_or(VERSION)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> Code {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let name = format!("lockstep-nccl-{}-{}", std::process::id(), NUMBER.fetch_add(1, SeqCst));
    let mut bytes = [0; 128];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    unsafe { id.write(UniqueId(bytes)) };
    match hub::open(&name) {
        Ok(()) => SUCCESS,
        Err(error) => refuse(SYSTEM_ERROR, &format!("no socket: {error}")),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    handle: *mut usize,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> Code {
    static NEXT: AtomicUsize = AtomicUsize::new(0xACC1);
    let config = unsafe { &*config };
    if config.magic != MAGIC || config.size < size_of::<Config>() || config.version < 21_400 {
        return refuse(INVALID_ARGUMENT, "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER");
    }
    if config.blocking != 0 || !(0..size).contains(&rank) {
        return refuse(INVALID_ARGUMENT, "a blocking communicator, or a rank that is not below their number");
    }
    let context = driver::current_context();
    if context == 0 {
        return refuse(INVALID_USAGE, "no GPU is current");
    }
    let communicator = Arc::new(Communicator {
        context,
        rank: rank as usize,
        size: size as usize,
        state: AtomicI32::new(IN_PROGRESS),
        aborted: AtomicBool::new(false),
        hub: Mutex::default(),
        streams: Mutex::default(),
    });
    let number = NEXT.fetch_add(0x10, SeqCst);
    lock(&ALIVE).insert(number, communicator.clone());
    unsafe { handle.write(number) };
    let gpu = driver::gpu();
    thread::spawn(move || communicator.join(id, rank as u32, size as u32, gpu));
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(handle: usize, state: *mut Code) -> Code {
    alive(handle).map_or_else(
        |code| code,
        |found| {
            unsafe { state.write(found.state.load(SeqCst)) };
            SUCCESS
        },
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    from: usize,
    to: usize,
    count: usize,
    data_type: c_int,
    operation: c_int,
    handle: usize,
    stream: usize,
) -> Code {
    ask_in_stream(handle, stream, (Kind::Sum, data_type, operation), |_, width| [(from, count * width), (to, count * width)])
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    from: usize,
    to: usize,
    count: usize,
    data_type: c_int,
    operation: c_int,
    handle: usize,
    stream: usize,
) -> Code {
    ask_in_stream(handle, stream, (Kind::Scatter, data_type, operation), |ranks, width| {
        [(from, ranks * count * width), (to, count * width)]
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    from: usize,
    to: usize,
    count: usize,
    data_type: c_int,
    handle: usize,
    stream: usize,
) -> Code {
    ask_in_stream(handle, stream, (Kind::Gather, data_type, SUM), |ranks, width| {
        [(from, count * width), (to, ranks * count * width)]
    })
}

/// Puts a collective into a stream. `buffers`: of so many ranks and bytes a value, where its terms are and where its results go, and
/// the bytes of each.
fn ask_in_stream(
    handle: usize,
    stream: usize,
    (kind, data_type, operation): (Kind, c_int, c_int),
    buffers: impl FnOnce(usize, usize) -> [(usize, usize); 2],
) -> Code {
    let found = match ready(handle) {
        Ok(found) => found,
        Err(code) => return code,
    };
    let Some(width) = hub::width(data_type as u32).filter(|_| operation == SUM) else {
        return refuse(INVALID_ARGUMENT, "only sums of uint32, float and bfloat16 are known here");
    };
    let [from, to] = buffers(found.size, width);
    if from.0 == 0 || to.0 == 0 {
        return refuse(INVALID_ARGUMENT, "no memory");
    }
    // The smaller of the two buffers is this rank's part of the other, or they are one, or apart.
    let (part, whole) = if from.1 < to.1 { (from, to) } else { (to, from) };
    let place = whole.0 + if part.1 < whole.1 { found.rank * part.1 } else { 0 };
    let apart = part.0 + part.1 <= whole.0 || whole.0 + whole.1 <= part.0;
    if !apart && part.0 != place {
        return refuse(INVALID_ARGUMENT, "buffers that overlap without being in place");
    }
    if from.1 == 0 {
        return SUCCESS;
    }
    found.state.store(IN_PROGRESS, SeqCst);
    thread::spawn(move || {
        driver::set_current_context(found.context);
        lock(&found.streams).insert(stream);
        let put = found.clone().put(stream, (kind, data_type as u32), from, to);
        let _ =
            found.state.compare_exchange(IN_PROGRESS, if put { SUCCESS } else { INVALID_ARGUMENT }, SeqCst, SeqCst);
        // A GPU goes on by itself.
        thread::sleep(LATE);
        driver::run(stream);
    });
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(handle: usize) -> Code {
    let found = match ready(handle) {
        Ok(found) => found,
        Err(code) => return code,
    };
    found.state.store(IN_PROGRESS, SeqCst);
    thread::spawn(move || {
        driver::set_current_context(found.context);
        let streams = lock(&found.streams).clone();
        streams.into_iter().for_each(driver::run);
        if found.ask(&Frame { kind: Kind::Leave, what: 0, data: Vec::new() }).is_some() {
            found.state.store(SUCCESS, SeqCst);
        }
    });
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(handle: usize) -> Code {
    lock(&ALIVE).remove(&handle).map_or(INVALID_ARGUMENT, |_| SUCCESS)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(handle: usize) -> Code {
    let Some(found) = lock(&ALIVE).remove(&handle) else { return INVALID_ARGUMENT };
    found.aborted.store(true, SeqCst);
    if let Some(hub) = &*lock(&found.hub) {
        let _ = hub.shutdown(std::net::Shutdown::Both);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    let text: &CStr = match code {
        SUCCESS => c"no error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(_handle: *mut c_void) -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

impl Communicator {
    fn join(&self, id: UniqueId, rank: u32, size: u32, gpu: Vec<u8>) {
        let end = id.0.iter().position(|byte| *byte == 0).unwrap_or(id.0.len());
        let connected = SocketAddr::from_abstract_name(&id.0[..end]).and_then(|name| UnixStream::connect_addr(&name));
        let Ok(hub) = connected else { return self.state.store(SYSTEM_ERROR, SeqCst) };
        *lock(&self.hub) = Some(Arc::new(hub));
        if self.ask(&Frame { kind: Kind::Join { rank, size }, what: 0, data: gpu }).is_some() {
            self.state.store(SUCCESS, SeqCst);
        }
    }

    /// When it is the stream's turn, asks with the bytes that are at `from` then; the answer goes to `to`. Until it has come, the
    /// stream waits, and others do not.
    fn put(self: Arc<Self>, stream: usize, (kind, what): (Kind, u32), from: (usize, usize), to: (usize, usize)) -> bool {
        let answer: Mutex<Option<Receiver<Option<Vec<u8>>>>> = Mutex::default();
        queue::put(stream, move || {
            let mut answer = lock(&answer);
            let coming = answer.get_or_insert_with(|| {
                let data = unsafe { std::slice::from_raw_parts(from.0 as *const u8, from.1) }.to_vec();
                let (communicator, (heard, coming)) = (self.clone(), channel());
                thread::spawn(move || heard.send(communicator.ask(&Frame { kind, what, data })));
                coming
            });
            match coming.try_recv() {
                Err(TryRecvError::Empty) => return false,
                Ok(Some(data)) => unsafe { (to.0 as *mut u8).copy_from_nonoverlapping(data.as_ptr(), to.1) },
                // Aborted.
                _ => {}
            }
            true
        })
    }

    /// The hub's answer, when all ranks have asked for the same. None where that cannot be, once the communicator is aborted.
    fn ask(&self, frame: &Frame) -> Option<Vec<u8>> {
        let hub = lock(&self.hub).clone()?;
        let failed = match hub::ask(&hub, frame) {
            Ok((SUCCESS, data)) => return Some(data),
            Ok((code, _)) => code,
            Err(_) => REMOTE_ERROR,
        };
        let is_deaf = std::env::var("LOCKSTEP_EMULATOR_NCCL").is_ok_and(|how| how == "deaf");
        if !(failed == REMOTE_ERROR && is_deaf) {
            self.state.store(failed, SeqCst);
        }
        while !self.aborted.load(SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        None
    }
}
