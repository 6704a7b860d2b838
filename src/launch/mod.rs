//! Who am I among the ranks (`world`), starting ranks (`spawn`), finding each other (`rendezvous`), watching each other
//! (`watch`), the cores of each (`cores`), and the wish to stop (`signals`).

pub mod cores;
pub mod lifeline;
pub mod link;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod rendezvous;
pub mod signals;
pub mod spawn;
pub mod verdict;
pub mod watch;
pub mod world;

pub use lifeline::report;
pub use world::World;
