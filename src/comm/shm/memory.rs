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
    let mine = create(name, bytes)?;
    let fds = control.exchange_fds(mine.as_fd())?;
    fds.iter().enumerate().map(|(rank, fd)| map(fd, name, bytes, rank).map(Arc::new)).collect()
}

/// Rank 0 makes `bytes` of zeroed memory, which all ranks map. Collective.
pub fn share_one(control: &mut Control, name: &str, bytes: usize) -> Result<Mapping> {
    // The others have something to exchange, too: files of no use, gone when this function returns.
    let mine = create(name, if control.rank() == 0 { bytes } else { 0 })?;
    let fds = control.exchange_fds(mine.as_fd())?;
    map(&fds[0], name, bytes, 0)
}

fn create(name: &str, bytes: usize) -> Result<OwnedFd> {
    let what = describe(name, bytes);
    let mine = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).or_kind(Kind::Device, &what)?;
    // Reserved now: a page that cannot be had later would end the process with SIGBUS.
    fallocate(&mine, FallocateFlags::empty(), 0, whole_pages(bytes) as u64).or_kind(Kind::Device, &what)?;
    fcntl_add_seals(&mine, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).or_kind(Kind::Device, &what)?;
    Ok(mine)
}

/// Maps what `rank` has created.
fn map(fd: &OwnedFd, name: &str, bytes: usize, rank: usize) -> Result<Mapping> {
    let what = describe(name, bytes);
    let (found, bytes) = (fstat(fd).or_kind(Kind::Device, &what)?.st_size as usize, whole_pages(bytes));
    if found != bytes {
        return Err(Error::internal(format!("{name}: rank {rank} shares {found} bytes, this rank asks for {bytes}")));
    }
    Mapping::new(fd.as_fd(), bytes).or_kind(Kind::Device, format!("mapping {what} of rank {rank}"))
}

fn describe(name: &str, bytes: usize) -> String {
    format!("{bytes} bytes of shared memory ({name})")
}

fn whole_pages(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(rustix::param::page_size())
}
