//! A stretch of a stream's work that is put there again and again in one call.
//!
//! The launch of a kernel costs the host a few microseconds, and that of a graph about as much, however many kernels it holds:
//! a GPU whose kernels are shorter than that no longer waits for the host. What was captured is fixed: kernels, their
//! arguments, copies, and all addresses. What differs from launch to launch has to lie in memory that the graph reads.

use super::gpu::Context;
use super::stream::Stream;
use crate::error::Result;
use cudarc::driver::sys::{CUgraphExec, CUstreamCaptureMode};
use std::mem;
use std::ptr;
use std::sync::Arc;

/// While it lives, what this thread puts into the stream, and into others that wait for an event of it, is not done but kept.
/// The others have to be waited for before the end. Nothing may wait on the host, allocate memory of the GPU, or copy from or to
/// host memory that is not pinned.
pub struct Capture<'a> {
    stream: &'a Stream,
}

impl<'a> Capture<'a> {
    pub fn begin(stream: &'a Stream) -> Result<Capture<'a>> {
        let handle = stream.handle()?;
        // Other threads may do what they like meanwhile.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { call!(cuStreamBeginCapture_v2(handle, mode)) }?;
        Ok(Capture { stream })
    }

    /// None where nothing was put into the stream.
    pub fn end(self) -> Result<Option<Graph>> {
        let (stream, context) = (self.stream.handle()?, self.stream.context().clone());
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        mem::forget(self);
        // SAFETY: the capture that `begin` began in this stream; the driver writes the handles.
        unsafe {
            call!(cuStreamEndCapture(stream, &mut graph))?;
            let mut nodes = 0;
            let made = call!(cuGraphGetNodes(graph, ptr::null_mut(), &mut nodes)).and_then(|()| match nodes {
                0 => Ok(()),
                _ => call!(cuGraphInstantiateWithFlags(&mut executable, graph, 0)),
            });
            call!(cuGraphDestroy(graph))?;
            made?;
        }
        Ok((!executable.is_null()).then_some(Graph { handle: executable, context }))
    }
}

impl Drop for Capture<'_> {
    /// What was captured is forgotten.
    fn drop(&mut self) {
        let (Ok(stream), mut graph) = (self.stream.handle(), ptr::null_mut()) else { return };
        // SAFETY: as above. A capture that has become invalid gives none.
        let _ = unsafe { call!(cuStreamEndCapture(stream, &mut graph)) };
        if !graph.is_null() {
            // SAFETY: just made.
            let _ = unsafe { call!(cuGraphDestroy(graph)) };
        }
    }
}

pub struct Graph {
    handle: CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the driver's calls on a graph may be made by any thread, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts all of it into the stream.
    ///
    /// # Safety
    /// What was promised of each call that was captured holds from now until the stream has come past the graph.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        let stream = stream.handle()?;
        // SAFETY: both live; the rest is the caller's promise.
        unsafe { call!(cuGraphLaunch(self.handle, stream)) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.context.bind();
        // SAFETY: made by `end` and used by nobody any more; the driver keeps it until its work is done.
        let _ = unsafe { call!(cuGraphExecDestroy(self.handle)) };
    }
}
