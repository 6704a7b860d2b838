//! Streams, queues of work for the GPU, and events, marks in them.

use super::gpu::Context;
use crate::device::{Place, Slice, SliceMut};
use crate::error::{Error, Result};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is put into a stream happens in order, after the call has returned. Two streams know of each other only by events.
pub struct Stream {
    handle: CUstream,
    context: Arc<Context>,
}

// SAFETY: the driver's calls on a stream may be made by any thread.
unsafe impl Send for Stream {}
// SAFETY: as above, by several at a time.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream> {
        context.bind()?;
        let mut handle = ptr::null_mut();
        // Without the implicit waits for the default stream, which nothing here uses.
        // SAFETY: the driver writes the handle.
        unsafe { call!(cuStreamCreate(&mut handle, CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }?;
        Ok(Stream { handle, context: context.clone() })
    }

    /// For libraries' calls. The GPU is made this thread's current one, as they want.
    pub fn handle(&self) -> Result<CUstream> {
        self.context.bind()?;
        Ok(self.handle)
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Copies all of `from` to `to`, which is as long, between any two places. At once where one of them is host memory that
    /// is not pinned; else after this has returned.
    ///
    /// # Safety
    /// Until the stream has come past the copy, both stay allocated, nobody writes `from`, and nobody else touches `to`.
    pub unsafe fn copy(&self, from: Slice<'_>, to: SliceMut<'_>) -> Result<()> {
        assert_eq!(from.bytes(), to.bytes(), "a copy between buffers of unlike lengths");
        let (source, target, bytes, stream) = (from.address(), to.address(), from.bytes(), self.handle()?);
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: `bytes` are valid at both addresses, of the places that choose the function; for how long, the caller says.
        unsafe {
            match (from.place(), to.place()) {
                (Place::Host, Place::Host) => {
                    unreachable!("a copy from host memory to host memory is no work for a GPU")
                }
                (Place::Host, Place::Cuda) => {
                    call!(cuMemcpyHtoDAsync_v2(target as u64, source as *const _, bytes, stream))
                }
                (Place::Cuda, Place::Host) => {
                    call!(cuMemcpyDtoHAsync_v2(target as *mut _, source as u64, bytes, stream))
                }
                (Place::Cuda, Place::Cuda) => call!(cuMemcpyDtoDAsync_v2(target as u64, source as u64, bytes, stream)),
            }
        }
    }

    /// `copy`, which is over when this returns; so is all that was in the stream before it.
    pub fn copy_and_wait(&self, from: Slice<'_>, to: SliceMut<'_>) -> Result<()> {
        // SAFETY: the borrows last until the stream has come past the copy.
        unsafe { self.copy(from, to) }?;
        self.wait()
    }

    /// Sets all bytes to 0.
    ///
    /// # Safety
    /// `to` stays allocated, and nobody else touches it, until the stream has come past this.
    pub unsafe fn zero(&self, to: SliceMut<'_>) -> Result<()> {
        assert_eq!(to.place(), Place::Cuda, "a GPU was asked to write memory of the {:?}", to.place());
        let stream = self.handle()?;
        if to.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: as many bytes of device memory; for how long, the caller says.
        unsafe { call!(cuMemsetD8Async(to.address() as u64, 0, to.bytes(), stream)) }
    }

    /// Marks this place of the stream.
    pub fn record(&self, event: &Event) -> Result<()> {
        let stream = self.handle()?;
        // SAFETY: both live; the event belongs to the same GPU.
        unsafe { call!(cuEventRecord(event.handle, stream)) }
    }

    /// What is put into this stream from now on happens after the event; the host does not wait.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        let stream = self.handle()?;
        // SAFETY: as above.
        unsafe { call!(cuStreamWaitEvent(stream, event.handle, 0)) }
    }

    /// The host waits until the stream is empty. A failed kernel ends it with an error.
    pub fn wait(&self) -> Result<()> {
        let stream = self.handle()?;
        // SAFETY: the stream lives.
        unsafe { call!(cuStreamSynchronize(stream)) }
    }

    /// Whether the stream is empty, without waiting: for waits that must also end when a peer is lost.
    pub fn is_done(&self) -> Result<bool> {
        let stream = self.handle()?;
        // SAFETY: the stream lives.
        is_ready("cuStreamQuery", unsafe { cudarc::driver::sys::cuStreamQuery(stream) })
    }

    /// Whether the stream is empty within two seconds: for a rank that ends, when what it has put there may wait for a rank that
    /// does not come. False too where its work has failed.
    pub fn is_soon_done(&self) -> bool {
        let start = Instant::now();
        loop {
            match self.is_done() {
                Ok(false) if start.elapsed() < SOON => std::thread::sleep(PAUSE),
                done => return done.unwrap_or(false),
            }
        }
    }
}

/// Less than a rank that has failed is given for its last words (`launch::watch`).
const SOON: Duration = Duration::from_secs(2);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(1);

impl Drop for Stream {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.context.bind();
        // SAFETY: made by `new` and used by nobody any more; the driver keeps it until its work is done.
        let _ = unsafe { call!(cuStreamDestroy_v2(self.handle)) };
    }
}

/// A place in a stream.
pub struct Event {
    handle: CUevent,
    context: Arc<Context>,
}

// SAFETY: the driver's calls on an event may be made by any thread.
unsafe impl Send for Event {}
// SAFETY: as above, by several at a time.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>, flags: CUevent_flags) -> Result<Event> {
        context.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the driver writes the handle.
        unsafe { call!(cuEventCreate(&mut handle, flags as u32)) }?;
        Ok(Event { handle, context: context.clone() })
    }

    /// The host waits until what was in the stream before the event is done.
    pub fn wait(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the event lives.
        unsafe { call!(cuEventSynchronize(self.handle)) }
    }

    /// Whether that is done, without waiting.
    pub fn is_done(&self) -> Result<bool> {
        self.context.bind()?;
        // SAFETY: the event lives.
        is_ready("cuEventQuery", unsafe { cudarc::driver::sys::cuEventQuery(self.handle) })
    }

    /// From an earlier timer to this one, by the GPU's clock. The host waits until both are done.
    pub fn since(&self, earlier: &Event) -> Result<Duration> {
        self.wait()?;
        Ok(Duration::from_secs_f64(f64::from(self.ms_since(earlier)?) / 1e3))
    }

    /// Milliseconds of the GPU's clock between two timers (`Gpu::timer`) that are both done.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32> {
        self.context.bind()?;
        let mut ms = 0.0;
        // SAFETY: both events live.
        unsafe { call!(cuEventElapsedTime_v2(&mut ms, earlier.handle, self.handle)) }?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // What fails here has failed before, and was said there.
        let _ = self.context.bind();
        // SAFETY: made by `new` and used by nobody any more.
        let _ = unsafe { call!(cuEventDestroy_v2(self.handle)) };
    }
}

fn is_ready(function: &str, code: CUresult) -> Result<bool, Error> {
    match code {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        code => super::call::check(function, code).map(|()| true),
    }
}
