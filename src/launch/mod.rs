//! Who am I among the ranks (`world`), starting ranks (`spawn`), finding each other (`rendezvous`), watching each other
//! (`watch`), the cores of each (`cores`, `numa`), the wish to stop (`signals`), and the batch job around it all (`job`).

pub mod cores;
pub mod job;
pub mod lifeline;
pub mod link;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod numa;
pub mod rendezvous;
pub mod restart;
pub mod signals;
pub mod spawn;
pub mod verdict;
pub mod watch;
pub mod world;

pub use lifeline::report;
pub use world::World;
