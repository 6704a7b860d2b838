//! Memory that the ranks of one host share: anonymous files (memfd) that exist only as long as someone maps them, so
//! nothing is left behind however the ranks end.

use crate::error::{Context, Error, Kind, Result};
use crate::launch::rendezvous::Control;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fstat, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One rank's shared memory, mapped here for reading and writing.
pub struct Mapping {
    address: usize,
    bytes: usize,
}

impl Mapping {
    pub fn address(&self) -> usize {
        self.address
    }

    fn new(fd: BorrowedFd<'_>, bytes: usize) -> rustix::io::Result<Mapping> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Page tables are filled now rather than by faults inside the first collective.
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0)? };
        Ok(Mapping { address: address as usize, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and whoever uses the memory holds the mapping.
        let _ = unsafe { munmap(self.address as *mut _, self.bytes) };
    }
}

/// Every rank makes `bytes` of zeroed memory and maps everyone's; by rank. Collective.
pub fn share(control: &mut Control, name: &str, bytes: usize) -> Result<Vec<Arc<Mapping>>> {
    let what = format!("{bytes} bytes of shared memory ({name})");
    let bytes = bytes.max(1).next_multiple_of(rustix::param::page_size());
    let mine = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).or_kind(Kind::Device, &what)?;
    // Reserved now: a page that cannot be had later would end the process with SIGBUS.
    fallocate(&mine, FallocateFlags::empty(), 0, bytes as u64).or_kind(Kind::Device, &what)?;
    fcntl_add_seals(&mine, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).or_kind(Kind::Device, &what)?;

    let fds = control.exchange_fds(mine.as_fd())?;
    let map = |(rank, fd): (usize, OwnedFd)| {
        let found = fstat(&fd).or_kind(Kind::Device, &what)?.st_size as usize;
        if found != bytes {
            return Err(Error::internal(format!("{name}: rank {rank} shares {found} bytes, this rank {bytes}")));
        }
        Mapping::new(fd.as_fd(), bytes).map(Arc::new).or_kind(Kind::Device, format!("mapping {what} of rank {rank}"))
    };
    fds.into_iter().enumerate().map(map).collect()
}
