//! Streams and events.
//!
//! What is put into a stream runs as late as its order allows: when the host waits for it, or when work of another stream does
//! for which the host waits. A stream that should have waited for another thus finds what the other has not done yet, and a
//! host that should have waited finds nothing. With `LOCKSTEP_EMULATOR_STREAMS=eager` all work runs at once instead. With
//! `mixed` any stream may run a bit of what its order allows whenever something is put into any: that shows where one
//! overtakes another for which it should have waited. With `busy` a thread runs whatever may run, as a GPU does: then times are
//! as there.
//!
//! Work that needs another process, as NCCL's does, stays where it is and is tried again while that has not come: its stream waits, and
//! the others go on.
//!
//! While a stream is captured, what is put into it goes into a graph instead (graphs.rs).
//!
//! A GPU is lost when a kernel fails. Here the thread that launched it is told at its next wait, and may go on.

use crate::{
    CAPTURED_EVENT, Code, Driver, INVALID_HANDLE, INVALID_VALUE, NOT_READY, Object, SUCCESS, driver, give, in_context,
    require,
};
use std::collections::VecDeque;
use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

/// What a step of a stream does; `NOT_READY` where it cannot be done yet. In a graph it does it again and again.
pub type Work = Arc<dyn Fn() -> Result<(), Code> + Send + Sync>;

pub struct Stream {
    steps: VecDeque<Step>,
    /// How many were put in, and how many of them are done.
    put: u64,
    done: u64,
    /// The capture that it takes part in.
    pub capture: Option<usize>,
}

#[derive(Clone)]
pub enum Step {
    Work(Work, ThreadId),
    Record(Arc<Mark>),
    Wait(Arc<Mark>),
}

/// A place in a stream, recorded once.
pub struct Mark {
    pub stream: usize,
    /// The capture in which it was recorded: it is a place in that graph, then.
    pub capture: Option<usize>,
    passed: AtomicBool,
    at: OnceLock<Instant>,
}

pub struct Event {
    timed: bool,
    /// Where it was recorded last.
    mark: Option<Arc<Mark>>,
}

/// Between two attempts at work that waits for another process.
const PAUSE: Duration = Duration::from_millis(1);

/// Work runs one piece at a time, whichever thread waits for it.
static RUNNING: Mutex<()> = Mutex::new(());

impl Stream {
    pub const fn new() -> Stream {
        Stream { steps: VecDeque::new(), put: 0, done: 0, capture: None }
    }

    /// The stream that has to go on before this one does.
    fn waits_for(&self) -> Option<usize> {
        match self.steps.front() {
            Some(Step::Wait(mark)) if !mark.passed.load(Relaxed) => Some(mark.stream),
            _ => None,
        }
    }
}

impl Driver {
    /// The default stream, 0, is always there.
    pub fn stream(&mut self, handle: usize) -> Result<&mut Stream, Code> {
        match self.objects.get_mut(&handle) {
            Some(Object::Stream(stream)) => Ok(stream),
            _ if handle == 0 => Ok(&mut self.default_stream),
            _ => Err(INVALID_HANDLE),
        }
    }

    fn event(&mut self, handle: usize) -> Result<&mut Event, Code> {
        match self.objects.get_mut(&handle) {
            Some(Object::Event(event)) => Ok(event),
            _ => Err(INVALID_HANDLE),
        }
    }

    fn put(&mut self, handle: usize, step: Step) -> Result<(), Code> {
        let stream = self.stream(handle)?;
        if let Some(capture) = stream.capture {
            return self.put_into_graph(capture, handle, step);
        }
        stream.steps.push_back(step);
        stream.put += 1;
        Ok(())
    }

    /// The first step of a stream, or of that for which it has to wait.
    fn next_for(&mut self, stream: usize) -> Option<(usize, Step)> {
        match self.stream(stream).ok()?.waits_for() {
            Some(other) => self.next_for(other),
            None => self.next_of(stream),
        }
    }

    /// The first step of a stream that does not have to wait.
    fn next_of(&mut self, handle: usize) -> Option<(usize, Step)> {
        let stream = self.stream(handle).ok()?;
        if stream.waits_for().is_some() {
            return None;
        }
        stream.steps.pop_front().map(|step| (handle, step))
    }
}

/// Puts work into a stream, on behalf of a call that has checked its arguments.
pub fn put(stream: usize, work: Work) -> Code {
    let code = in_context(|driver| driver.put(stream, Step::Work(work, thread::current().id())));
    after_call(stream, code)
}

/// What every call does that put something into a stream.
fn after_call(stream: usize, code: Code) -> Code {
    static ORDER: OnceLock<String> = OnceLock::new();
    let order = ORDER.get_or_init(|| std::env::var("LOCKSTEP_EMULATOR_STREAMS").unwrap_or_default());
    match &**order {
        _ if code != SUCCESS => {}
        "eager" => while run_one(stream) == Ran::Step {},
        "mixed" => run_some(),
        "busy" => run_by_itself(),
        _ => {}
    }
    code
}

/// For a call on a stream, or on an event recorded there, that may not be while it is captured.
fn not_captured(driver: &mut Driver, stream: usize) -> Result<(), Code> {
    match driver.stream(stream)?.capture {
        Some(capture) => driver.invalidate(capture),
        None => Ok(()),
    }
}

/// Runs what is in a stream now.
pub fn run_all(stream: usize) {
    let Ok(put) = driver().stream(stream).map(|stream| stream.put) else { return };
    run_until(stream, |driver| driver.stream(stream).is_ok_and(|stream| stream.done >= put));
}

/// Runs what is in any stream now.
pub fn run_everything() {
    all_streams().into_iter().for_each(run_all);
}

/// Runs a few steps of one stream, both as chance has it, that need no other stream.
fn run_some() {
    static CHANCE: AtomicU64 = AtomicU64::new(1);
    let chance = CHANCE.fetch_add(1, Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let chance = (chance ^ (chance >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 32;
    let streams = all_streams();
    let stream = streams[chance as usize % streams.len()];
    let steps = chance / streams.len() as u64 % 16;
    let _ = (0..steps).try_for_each(|_| (run_next(|driver| driver.next_of(stream)) == Ran::Step).then_some(()));
}

/// From now on.
fn run_by_itself() {
    static STARTED: Once = Once::new();
    let work = || {
        loop {
            let ran = |stream| run_next(|driver| driver.next_of(stream)) == Ran::Step;
            if all_streams().into_iter().filter(|&stream| ran(stream)).count() == 0 {
                thread::sleep(PAUSE);
            }
        }
    };
    STARTED.call_once(|| drop(thread::spawn(work)));
}

fn all_streams() -> Vec<usize> {
    let is_stream = |(_, object): &(&usize, &Object)| matches!(object, Object::Stream(_));
    driver().objects.iter().filter(is_stream).map(|(handle, _)| *handle).chain([0]).collect()
}

fn run_until(stream: usize, over: impl Fn(&mut Driver) -> bool) {
    while !over(&mut driver()) {
        match run_one(stream) {
            Ran::Step => {}
            Ran::NotYet => thread::sleep(PAUSE),
            Ran::Nothing => return,
        }
    }
}

/// What became of an attempt to run a step.
#[derive(PartialEq)]
enum Ran {
    Step,
    /// It waits for another process.
    NotYet,
    /// There is none.
    Nothing,
}

/// Runs one step of a stream, or of that for which it has to wait.
fn run_one(stream: usize) -> Ran {
    run_next(|driver| driver.next_for(stream))
}

/// Runs the step that is taken out of a stream, if there is one.
fn run_next(take: impl FnOnce(&mut Driver) -> Option<(usize, Step)>) -> Ran {
    let _alone = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((of, step)) = take(&mut driver()) else { return Ran::Nothing };
    match step {
        Step::Work(work, by) => match work() {
            Ok(()) => {}
            Err(NOT_READY) => {
                if let Ok(stream) = driver().stream(of) {
                    stream.steps.push_front(Step::Work(work, by));
                }
                return Ran::NotYet;
            }
            Err(code) => driver().failed.push((by, code)),
        },
        Step::Record(mark) => {
            mark.at.get_or_init(Instant::now);
            mark.passed.store(true, Relaxed);
        }
        Step::Wait(_) => {}
    }
    if let Ok(stream) = driver().stream(of) {
        stream.done += 1;
    }
    Ran::Step
}

/// How work of this thread has failed since it last asked.
fn failure() -> Code {
    let (failed, own) = (&mut driver().failed, thread::current().id());
    let first = failed.iter().position(|(by, _)| *by == own);
    first.map_or(SUCCESS, |first| failed.remove(first).1)
}

/// For the emulators of other libraries: calls `work` with `data` whenever it is the stream's turn, and `free` when it will not be
/// any more. `work` gives a CUresult, and is called again where that says that it is not ready.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emulator_put(
    stream: usize,
    work: unsafe extern "C" fn(*mut c_void) -> Code,
    data: *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
) -> Code {
    struct Data(usize, unsafe extern "C" fn(*mut c_void));
    impl Drop for Data {
        fn drop(&mut self) {
            unsafe { (self.1)(self.0 as *mut c_void) };
        }
    }
    let data = Data(data as usize, free);
    let call = move || match unsafe { work((&data).0 as *mut c_void) } {
        SUCCESS => Ok(()),
        code => Err(code),
    };
    put(stream, Arc::new(call))
}

/// As above: runs what is in the stream now, as if somebody waited for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emulator_run(stream: usize) {
    run_all(stream);
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut usize, flags: c_uint) -> Code {
    in_context(|driver| {
        require(flags <= 1, INVALID_VALUE)?;
        unsafe { give(stream, driver.add(Object::Stream(Stream::new()))) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: usize) -> Code {
    run_all(stream);
    in_context(|driver| {
        require(stream != 0, INVALID_HANDLE)?;
        driver.stream(stream)?;
        driver.objects.remove(&stream);
        Ok(())
    })
}

/// Whoever asks again and again gets a step further each time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: usize) -> Code {
    let code = in_context(|driver| not_captured(driver, stream));
    if code != SUCCESS {
        return code;
    }
    run_one(stream);
    match (failure(), driver().stream(stream).is_ok_and(|stream| stream.steps.is_empty())) {
        (SUCCESS, true) => SUCCESS,
        (SUCCESS, false) => NOT_READY,
        (failure, _) => failure,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: usize) -> Code {
    let code = in_context(|driver| not_captured(driver, stream));
    if code != SUCCESS {
        return code;
    }
    run_all(stream);
    failure()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSynchronize() -> Code {
    let code = in_context(|_| Ok(()));
    if code != SUCCESS {
        return code;
    }
    run_everything();
    failure()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, flags: c_uint) -> Code {
    let code = in_context(|driver| {
        require(flags <= 1, INVALID_VALUE)?;
        // An event that was never recorded is no reason to wait.
        let Some(mark) = driver.event(event)?.mark.clone() else { return driver.stream(stream).map(drop) };
        driver.meet(stream, &mark)?;
        driver.put(stream, Step::Wait(mark))
    });
    after_call(stream, code)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> Code {
    /// CU_EVENT_DISABLE_TIMING
    const UNTIMED: c_uint = 2;
    in_context(|driver| {
        require(flags <= 3, INVALID_VALUE)?;
        unsafe { give(event, driver.add(Object::Event(Event { timed: flags & UNTIMED == 0, mark: None }))) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: usize) -> Code {
    in_context(|driver| {
        driver.event(event)?;
        driver.objects.remove(&event);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: usize, stream: usize) -> Code {
    let code = in_context(|driver| {
        driver.event(event)?;
        let capture = driver.stream(stream)?.capture;
        let mark = Arc::new(Mark { stream, capture, passed: AtomicBool::new(false), at: OnceLock::new() });
        driver.put(stream, Step::Record(mark.clone()))?;
        driver.event(event)?.mark = Some(mark);
        Ok(())
    });
    after_call(stream, code)
}

/// As `cuStreamQuery`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: usize) -> Code {
    on_mark(event, |mark| {
        if !mark.passed.load(Relaxed) {
            run_one(mark.stream);
        }
        if mark.passed.load(Relaxed) { SUCCESS } else { NOT_READY }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: usize) -> Code {
    on_mark(event, |mark| {
        run_until(mark.stream, |_| mark.passed.load(Relaxed));
        SUCCESS
    })
}

/// What `wait` says of the place where the event was recorded last, if what ran meanwhile did not fail.
fn on_mark(event: usize, wait: impl FnOnce(&Mark) -> Code) -> Code {
    let mut mark = None;
    let code = in_context(|driver| {
        mark = driver.event(event)?.mark.clone();
        match mark.as_ref().and_then(|mark| mark.capture) {
            Some(capture) => driver.invalidate(capture).and(Err(CAPTURED_EVENT)),
            None => Ok(()),
        }
    });
    if code != SUCCESS {
        return code;
    }
    let waited = mark.map_or(SUCCESS, |mark| wait(&mark));
    match failure() {
        SUCCESS => waited,
        failure => failure,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(ms: *mut f32, start: usize, end: usize) -> Code {
    in_context(|driver| {
        let mut time = |event| {
            let Event { timed, mark } = driver.event(event)?;
            let mark = mark.as_ref().filter(|_| *timed).ok_or(INVALID_HANDLE)?;
            mark.at.get().copied().ok_or(NOT_READY)
        };
        let (start, end) = (time(start)?, time(end)?);
        unsafe { give(ms, end.saturating_duration_since(start).as_secs_f32() * 1e3) }
    })
}
