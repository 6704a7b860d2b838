//! The one error type. Its kind decides the exit code; its text says what, where, and what to do next.

use serde::{Deserialize, Serialize};
use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a run ends early. The numbers are the process's exit codes and part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A bug or an operating-system failure that no other kind names.
    Internal = 1,
    /// Bad usage or configuration.
    Usage = 2,
    /// The data cannot be read or is not what the configuration says.
    Data = 3,
    /// A peer was lost or stalled past the time-out.
    PeerLost = 4,
    /// The loss is not finite.
    NonFinite = 5,
    /// Out of memory, or a device failed: also where the ranks' copies of the parameters are no longer equal.
    Device = 6,
    /// Stopped by a signal, or ahead of the job's time limit, after a checkpoint: run again to go on.
    Stopped = 75,
}

/// An error with the chain of what was being done when it arose, outermost first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Error {
    kind: Kind,
    message: String,
    said_by_rank_0: bool,
    lacking: bool,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), said_by_rank_0: false, lacking: false }
    }
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Kind::Data, message)
    }
    pub fn peer_lost(message: impl Into<String>) -> Self {
        Self::new(Kind::PeerLost, message)
    }
    pub fn device(message: impl Into<String>) -> Self {
        Self::new(Kind::Device, message)
    }
    /// Of kind `Device`, but no device has failed: a library, a GPU or memory is lacking, and will be at the next start.
    pub fn lacking(message: impl Into<String>) -> Self {
        Error { lacking: true, ..Self::device(message) }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }
    /// All ranks have this error, and rank 0 tells it to the user: here it decides the exit code alone.
    pub fn said_by_rank_0(self) -> Self {
        Error { said_by_rank_0: true, ..self }
    }
    pub fn is_said_by_rank_0(&self) -> bool {
        self.said_by_rank_0
    }
    /// Whether something is lacking, and would be at the next start.
    pub fn is_lacking(&self) -> bool {
        self.lacking
    }
    pub fn exit_code(&self) -> u8 {
        self.kind as u8
    }
    /// Puts what was being done in front: `reading x.bin: unexpected end of file`.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Turns any error into ours, naming its kind and what was being done.
pub trait Context<T> {
    fn or_kind(self, kind: Kind, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn or_kind(self, kind: Kind, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::new(kind, format!("{what}: {error}")))
    }
}
