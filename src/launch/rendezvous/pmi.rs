//! PMI-1, the protocol between a process and the process manager that started it, as MPICH's Hydra and Intel MPI's speak it:
//! lines of `cmd=NAME key=value ...` over the socket PMI_FD, answered in turn (P. Balaji et al., PMI: A Scalable Parallel
//! Process-Management Interface for Extreme-Scale Systems, EuroMPI 2010; MPICH, src/pmi). Of it, what passes one value
//! to all ranks: init, put, barrier, get, finalize.

use crate::error::{Context, Error, Kind, Result};
use crate::launch::link::Link;
use rustix::io::fcntl_dupfd_cloexec;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// More than any answer has; what is longer is no answer.
const LONGEST_LINE: usize = 8192;
const REMEDY: &str = "set LOCKSTEP_RENDEZVOUS=file:FOLDER, a folder that all hosts share, to meet without it";

/// Rank 0's text, which holds no spaces, on every rank. Collective over all that the process manager at `fd` has started.
pub fn broadcast(fd: i32, rank: usize, text: &str, deadline: Instant) -> Result<String> {
    const KEY: &str = "lockstep-rendezvous";
    let mut pmi = Pmi::init(fd, deadline)?;
    if rank == 0 {
        pmi.put(KEY, text)?;
    }
    pmi.barrier()?;
    let text = pmi.get(KEY)?;
    pmi.finalize()?;
    Ok(text)
}

struct Pmi {
    link: Link,
    /// Names the job's key-value space.
    space: String,
    deadline: Instant,
}

impl Pmi {
    /// Opens the conversation over the inherited descriptor `fd`. Every answer has to come by `deadline`.
    fn init(fd: i32, deadline: Instant) -> Result<Pmi> {
        let what = format!("PMI_FD = {fd}, the socket to the process manager");
        if fd < 0 {
            return Err(Error::usage(format!("{what}: not a descriptor")));
        }
        // SAFETY: the number is borrowed for this one call, which fails if nothing is open under it.
        let own = fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 3).or_kind(
            Kind::Usage,
            format!("{what}, which the launcher's child has to leave open for the trainer; {REMEDY}"),
        )?;
        let mut pmi = Pmi { link: Link::new(0, own), space: String::new(), deadline };
        pmi.ask("init pmi_version=1 pmi_subversion=1", "response_to_init")?;
        pmi.space = pmi.ask("get_my_kvsname", "my_kvsname")?.value("kvsname")?;
        Ok(pmi)
    }

    /// Sets a value that all ranks see after the barrier. Neither may hold spaces.
    fn put(&mut self, key: &str, value: &str) -> Result<()> {
        self.ask(&format!("put kvsname={} key={key} value={value}", self.space), "put_result").map(drop)
    }

    /// Waits for all ranks of the job.
    fn barrier(&mut self) -> Result<()> {
        self.ask("barrier_in", "barrier_out").map(drop)
    }

    fn get(&mut self, key: &str) -> Result<String> {
        self.ask(&format!("get kvsname={} key={key}", self.space), "get_result")?.value("value")
    }

    fn finalize(mut self) -> Result<()> {
        self.ask("finalize", "finalize_ack").map(drop)
    }

    fn ask(&mut self, command: &str, expected: &str) -> Result<Answer> {
        let name = command.split(' ').next().unwrap_or_default();
        let failed = |why: &dyn std::fmt::Display| {
            Error::peer_lost(format!(
                "the process manager did not answer \"{name}\" (PMI): {why}. If not all ranks are there, look for why they \
                 did not start; {REMEDY}"
            ))
        };
        let line = format!("cmd={command}\n");
        self.link.write(line.as_bytes(), self.deadline).map_err(|error| failed(&error))?;
        let answer = Answer(self.read_line().map_err(|error| failed(&error))?);
        let (said, code) = (answer.value("cmd")?, answer.value("rc").unwrap_or_default());
        if said != expected || !matches!(code.as_str(), "" | "0") {
            return Err(failed(&format!("it said \"{}\"", answer.0)));
        }
        Ok(answer)
    }

    fn read_line(&self) -> Result<String, rustix::io::Errno> {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() < LONGEST_LINE {
            self.link.read(&mut byte, self.deadline)?;
            if byte == *b"\n" {
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            line.push(byte[0]);
        }
        Err(rustix::io::Errno::MSGSIZE)
    }
}

struct Answer(String);

impl Answer {
    fn value(&self, key: &str) -> Result<String> {
        let value = self.0.split_whitespace().find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        value.map(str::to_string).ok_or_else(|| {
            Error::peer_lost(format!("the process manager's answer \"{}\" (PMI) does not give `{key}`", self.0))
        })
    }
}
