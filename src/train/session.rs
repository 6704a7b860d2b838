//! One rank's run: everything that the configuration describes, built and brought to where the run stands, and then the
//! loop over steps until one of `[run]`'s ends comes.

use super::checkpoint::{self, State};
use super::eval::Evaluator;
use super::gradient::{Gradient, Sums};
use super::learner::{Done, Learner, Step};
use super::resume::{self, Progress};
use super::update::{Updater, export_params};
use super::{Options, RankContext};
use crate::comm::Communicator;
use crate::config::plan::{Plan, Ranks, Samples};
use crate::config::raw::{self, Config};
use crate::data::augment::Augmenter;
use crate::data::partition::Batching;
use crate::data::queue::{DataQueue, Loader, Position};
use crate::data::{self, Dataset};
use crate::device::{Place, SliceMut};
use crate::error::{Error, Kind, Result};
use crate::launch::watch::Phase;
use crate::model::loss::Loss;
use crate::model::net::{self, Net};
use crate::model::spec::NetSpec;
use crate::optim::schedule::Schedule;
use crate::report::budget::{Category, Clock, Merged};
use crate::report::{self, Ending, Report, Set, StoppedBy};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct Session<'a> {
    config: &'a Config,
    context: &'a RankContext,
    plan: Plan,
    directory: PathBuf,
    learner: Learner,
    evaluator: Evaluator,
    queue: DataQueue,
    progress: Progress,
    clock: Clock,
    /// Rank 0's.
    report: Option<Report>,
    deadline: Option<Instant>,
}
