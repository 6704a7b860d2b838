//! A launcher under test. Every wait has a deadline.

mod wait;

pub use wait::until;

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Far beyond what any part of a test takes on a slow machine.
pub const WATCHDOG: Duration = Duration::from_secs(120);

/// A launcher, as a test sees it. Dropped, it is killed, and its ranks with it.
pub struct Launched {
    child: Child,
    output: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Launched {
    pub fn start(command: &mut Command) -> Launched {
        let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let readers =
            vec![read_lines(child.stdout.take().unwrap(), &output), read_lines(child.stderr.take().unwrap(), &output)];
        Launched { child, output, readers }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn expect(&self, found: impl Fn(&str) -> bool) {
        until("a line of output", || found(&self.output.lock().unwrap()).then_some(()));
    }

    /// The exit code, with all output read.
    pub fn wait(&mut self) -> i32 {
        let status = until("the launcher to end", || self.child.try_wait().unwrap());
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        status.code().unwrap_or(-1)
    }

    pub fn output(&self) -> String {
        self.output.lock().unwrap().clone()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the program said:\n{}", self.output());
        }
    }
}

fn read_lines(from: impl Read + Send + 'static, output: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let output = output.clone();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(|line| line.ok()) {
            *output.lock().unwrap() += &format!("{line}\n");
        }
    })
}

/// Only for processes that the test has started.
pub fn send(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Whether the process runs; one that is dead and not reaped does not.
pub fn alive(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state.as_str(), "Z" | "X"))
}

/// State and parent of a process.
pub fn stat(pid: i32) -> Option<(String, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    Some((fields.next()?.to_string(), fields.next()?.parse().ok()?))
}

/// The processes that one has started.
pub fn children(parent: i32) -> Vec<i32> {
    let processes =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.filter(|pid| stat(*pid).is_some_and(|(_, other)| other == parent)).collect()
}
