//! Graphs: what was put into captured streams, and runs again at each launch.
//!
//! A launch runs the stream in which the capture began, and of the others what it waits for, as late as it may. What a capture
//! forbids (waiting on the host, memory that comes or goes, copies of what is not pinned, an end that some stream has not come
//! back to) makes it invalid. All are refused where
//! `LOCKSTEP_EMULATOR_REFUSES=capture`.

use crate::streams::{self, Mark, Step};
use crate::{Code, Driver, INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, Object, give, in_context, require};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ffi::{c_int, c_ulonglong};
use std::sync::Arc;
use std::thread::{self, ThreadId};

/// CUresults of captures.
pub const UNSUPPORTED: Code = 900;
pub const INVALIDATED: Code = 901;
pub const UNJOINED: Code = 904;
pub const ISOLATION: Code = 905;
pub const WRONG_THREAD: Code = 908;

/// A capture under way.
pub struct Capture {
    /// Where it began.
    origin: usize,
    by: ThreadId,
    valid: bool,
    steps: Vec<(usize, Step)>,
}

/// Steps with their streams, in the order in which they were put.
pub struct Graph {
    origin: usize,
    steps: Vec<(usize, Step)>,
}

impl Driver {
    pub fn put_into_graph(&mut self, capture: usize, stream: usize, step: Step) -> Result<(), Code> {
        let capture = self.captures.get_mut(&capture).expect("a stream's capture is under way");
        require(capture.valid, INVALIDATED)?;
        capture.steps.push((stream, step));
        Ok(())
    }

    /// A stream is about to wait for a mark: it takes part in the mark's capture from now on.
    pub fn meet(&mut self, stream: usize, mark: &Mark) -> Result<(), Code> {
        match (self.stream(stream)?.capture, mark.capture) {
            (None, None) => Ok(()),
            (None, Some(capture)) if self.captures.contains_key(&capture) => {
                self.stream(stream)?.capture = Some(capture);
                Ok(())
            }
            (Some(of), Some(capture)) if of == capture => Ok(()),
            // Nothing of a graph can wait for what is outside.
            (Some(capture), _) => self.invalidate(capture).and(Err(ISOLATION)),
            (None, Some(_)) => Err(INVALID_VALUE),
        }
    }

    /// Something happened that a capture forbids.
    pub fn invalidate(&mut self, capture: usize) -> Result<(), Code> {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.valid = false;
        }
        Err(UNSUPPORTED)
    }

    /// For calls that the thread of a capture may not make.
    pub fn outside_captures(&mut self) -> Result<(), Code> {
        let own =
            self.captures.iter().find(|(_, capture)| capture.by == thread::current().id()).map(|(number, _)| *number);
        own.map_or(Ok(()), |capture| self.invalidate(capture))
    }

    fn end_capture(&mut self, stream: usize) -> Result<Graph, Code> {
        let number = self.stream(stream)?.capture.ok_or(INVALID_VALUE)?;
        let capture = &self.captures[&number];
        require(capture.by == thread::current().id(), WRONG_THREAD)?;
        require(capture.origin == stream, INVALID_VALUE)?;
        let capture = self.captures.remove(&number).expect("it is under way");
        self.default_stream.capture.take_if(|of| *of == number);
        for object in self.objects.values_mut() {
            if let Object::Stream(stream) = object {
                stream.capture.take_if(|of| *of == number);
            }
        }
        require(capture.valid, INVALIDATED)?;
        let graph = Graph { origin: stream, steps: capture.steps };
        require(graph.is_joined(), UNJOINED)?;
        Ok(graph)
    }
}

impl Graph {
    /// Whether the end of each stream is waited for, in the end by the origin.
    fn is_joined(&self) -> bool {
        let mut joined = HashSet::from([self.origin]);
        let streams: HashSet<usize> = self.steps.iter().map(|(stream, _)| *stream).collect();
        loop {
            let is_waited_for = |stream: &usize| {
                let last = self.steps.iter().rev().find(|(of, _)| of == stream);
                let Some((_, Step::Record(end))) = last else { return false };
                let waits = |(of, step): &(usize, Step)| match step {
                    Step::Wait(mark) => joined.contains(of) && Arc::ptr_eq(mark, end),
                    _ => false,
                };
                self.steps.iter().any(waits)
            };
            let more: Vec<usize> =
                streams.iter().filter(|stream| !joined.contains(stream) && is_waited_for(stream)).copied().collect();
            if more.is_empty() {
                return streams.is_subset(&joined);
            }
            joined.extend(more);
        }
    }

    fn run(&self) -> Result<(), Code> {
        let mut streams: BTreeMap<usize, VecDeque<&Step>> = BTreeMap::new();
        self.steps.iter().for_each(|(stream, step)| streams.entry(*stream).or_default().push_back(step));
        run_until(&mut streams, &mut HashSet::new(), self.origin, None)
    }
}

/// Runs a stream of a graph until it has passed a mark, or to its end.
fn run_until(
    streams: &mut BTreeMap<usize, VecDeque<&Step>>,
    passed: &mut HashSet<*const Mark>,
    stream: usize,
    mark: Option<*const Mark>,
) -> Result<(), Code> {
    while mark.is_none_or(|mark| !passed.contains(&mark)) {
        let Some(step) = streams.get_mut(&stream).and_then(VecDeque::pop_front) else { return Ok(()) };
        match step {
            Step::Work(work, _) => work()?,
            Step::Record(mark) => drop(passed.insert(Arc::as_ptr(mark))),
            Step::Wait(mark) => run_until(streams, passed, mark.stream, Some(Arc::as_ptr(mark)))?,
        }
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: usize, mode: c_int) -> Code {
    /// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, the one that is emulated.
    const THREAD_LOCAL: c_int = 1;
    let refused = std::env::var("LOCKSTEP_EMULATOR_REFUSES").is_ok_and(|what| what == "capture");
    in_context(|driver| {
        require(!refused, NOT_SUPPORTED)?;
        require(stream != 0 && mode == THREAD_LOCAL, INVALID_VALUE)?;
        require(driver.stream(stream)?.capture.is_none(), INVALID_VALUE)?;
        driver.next_handle += 0x10;
        let number = driver.next_handle;
        let capture = Capture { origin: stream, by: thread::current().id(), valid: true, steps: Vec::new() };
        driver.captures.insert(number, capture);
        driver.stream(stream)?.capture = Some(number);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> Code {
    in_context(|driver| {
        unsafe { give(graph, 0) }?;
        let captured = driver.end_capture(stream)?;
        unsafe { give(graph, driver.add(Object::Graph(Arc::new(captured)))) }
    })
}

/// Their number only, as long as nobody asks for more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: usize, nodes: *mut usize, count: *mut usize) -> Code {
    in_context(|driver| {
        let Some(Object::Graph(graph)) = driver.objects.get(&graph) else { return Err(INVALID_HANDLE) };
        require(nodes.is_null(), INVALID_VALUE)?;
        let work = graph.steps.iter().filter(|(_, step)| matches!(step, Step::Work(..)));
        unsafe { give(count, work.count()) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: c_ulonglong) -> Code {
    in_context(|driver| {
        let Some(Object::Graph(graph)) = driver.objects.get(&graph) else { return Err(INVALID_HANDLE) };
        require(flags == 0, INVALID_VALUE)?;
        let graph = graph.clone();
        unsafe { give(executable, driver.add(Object::Executable(graph))) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: usize, stream: usize) -> Code {
    let mut found = None;
    let code = in_context(|driver| {
        let Some(Object::Executable(graph)) = driver.objects.get(&executable) else { return Err(INVALID_HANDLE) };
        found = Some(graph.clone());
        Ok(())
    });
    match found {
        Some(graph) => streams::put(stream, Arc::new(move || graph.run())),
        None => code,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: usize) -> Code {
    remove(graph, |object| matches!(object, Object::Graph(_)))
}

/// What was launched before goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: usize) -> Code {
    remove(executable, |object| matches!(object, Object::Executable(_)))
}

fn remove(handle: usize, is: impl Fn(&Object) -> bool) -> Code {
    let mut removed = None;
    let code = in_context(|driver| {
        require(driver.objects.get(&handle).is_some_and(is), INVALID_HANDLE)?;
        removed = driver.objects.remove(&handle);
        Ok(())
    });
    // What its steps hold is freed when the driver may be asked again.
    drop(removed);
    code
}
