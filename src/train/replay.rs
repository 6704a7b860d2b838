//! A pass of a step on a GPU as CUDA graphs. What a pass puts into the compute stream is the same at each step, so the host has to
//! say it once: the first time it is put there call by call, so that all is loaded and chosen, the second time it is recorded,
//! and from then on a handful of graphs are launched.
//!
//! The graphs are cut where others wait for the stream: behind them the host records the events of which it or another stream
//! takes notice.
//!
//! ```text
//! | forward, loss | backward of bucket 0 | of bucket 1 |
//!            loss is known     bucket 0 is written    bucket 1 is written
//! ```
//!
//! What differs from step to step lies in memory that the graphs read: images, labels, the number of the first sample, the
//! learning rate. A pass of another number of samples is another pass.

use crate::device::cuda::{Capture, Gpu, Graph, Stream};
use crate::error::Result;

/// The passes of a step.
pub struct Replay {
    gpu: Gpu,
    passes: Vec<(Key, Option<Recorded>)>,
}

/// What makes a pass another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its number among the rank's micro-batches.
    pub micro: usize,
    /// Samples in it, and in the step of all ranks.
    pub batch: usize,
    pub step_count: usize,
}

/// What the host does behind a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The loss is found.
    Judged,
    /// So many more buckets are written.
    Written(usize),
    /// The pass is over.
    End,
}

/// The graphs of a pass, with what follows each; none where nothing was put into the stream before it.
pub struct Recorded {
    gpu: Gpu,
    graphs: Vec<(Option<Graph>, Cut)>,
}

/// Beyond this number of unlike passes no more are recorded: graphs take memory.
const MOST_PASSES: usize = 64;

/// How a pass is put into the stream.
pub enum Turn<'a> {
    Call(Tape<'a>),
    Launch(&'a Recorded),
}

impl Replay {
    pub fn new(gpu: &Gpu) -> Replay {
        Replay { gpu: gpu.clone(), passes: Vec::with_capacity(MOST_PASSES) }
    }

    pub fn turn(&mut self, key: Key) -> Result<Turn<'_>> {
        let Some(found) = self.passes.iter().position(|(of, _)| *of == key) else {
            if self.passes.len() < MOST_PASSES {
                self.passes.push((key, None));
            }
            return Ok(Turn::Call(Tape::off()));
        };
        match &mut self.passes[found].1 {
            Some(recorded) => Ok(Turn::Launch(recorded)),
            recorded => {
                let recorded = recorded.insert(Recorded { gpu: self.gpu.clone(), graphs: Vec::new() });
                Tape::begin(self.gpu.compute(), &mut recorded.graphs).map(Turn::Call)
            }
        }
    }
}

impl Recorded {
    /// Puts the pass into the stream; behind each graph `then` does what follows.
    ///
    /// # Safety
    /// As for the calls that were recorded.
    pub unsafe fn launch(&self, mut then: impl FnMut(Cut) -> Result<()>) -> Result<()> {
        self.graphs.iter().try_for_each(|(graph, cut)| {
            if let Some(graph) = graph {
                // SAFETY: the caller's promise.
                unsafe { graph.launch(self.gpu.compute()) }?;
            }
            then(*cut)
        })
    }
}

/// Whether a pass that is put into the stream call by call is recorded.
pub struct Tape<'a>(Option<Taping<'a>>);

struct Taping<'a> {
    stream: &'a Stream,
    capture: Capture<'a>,
    recorded: &'a mut Vec<(Option<Graph>, Cut)>,
}

impl<'a> Tape<'a> {
    pub fn off() -> Tape<'a> {
        Tape(None)
    }

    fn begin(stream: &'a Stream, recorded: &'a mut Vec<(Option<Graph>, Cut)>) -> Result<Tape<'a>> {
        let capture = Capture::begin(stream).map_err(|error| error.context(HINT))?;
        Ok(Tape(Some(Taping { stream, capture, recorded })))
    }

    /// What was called since the last cut is in the stream now. Does what follows.
    pub fn cut(&mut self, cut: Cut, then: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(Taping { stream, capture, recorded }) = self.0.take() else { return then() };
        let graph = capture.end().map_err(|error| error.context(HINT))?;
        if let Some(graph) = &graph {
            // SAFETY: whoever put this into the stream has promised for it.
            unsafe { graph.launch(stream) }?;
        }
        recorded.push((graph, cut));
        then()?;
        if cut != Cut::End {
            *self = Tape::begin(stream, recorded)?;
        }
        Ok(())
    }
}

const HINT: &str = "recording a step as CUDA graphs (run.cuda_graphs = false goes without)";
