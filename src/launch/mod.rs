//! Who am I among the ranks (`world`), starting ranks (`spawn`), finding each other (`rendezvous`), watching each other
//! (`watch`).

pub mod link;
pub mod rendezvous;
pub mod watch;
