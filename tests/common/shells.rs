//! Ranks that are started one by one, as from shells on several machines: each sees itself as the only one of its machine,
//! in a folder of its own, and learns who it is from torchrun's variables.

use crate::common::Launched;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const CONFIG: &str = r#"
[run]
name = "shells"
steps = 4
[data]
format = "idx"
path = "data"
[batch]
global = 12
micro = 2
[model]
input = [8, 8, 1]
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "linear"
units = 10
[optimizer]
type = "sgd"
lr = 0.1
"#;

/// So many machines, which are folders with a program, a configuration and data.
pub struct Shells {
    folder: TempDir,
    size: usize,
    port: u16,
}

impl Shells {
    pub fn new(size: usize) -> Shells {
        let shells = Shells { folder: tempfile::tempdir().unwrap(), size, port: free_port() };
        (0..size).for_each(|rank| {
            fs::create_dir_all(shells.machine(rank).join("data")).unwrap();
            fs::write(shells.machine(rank).join("run.toml"), CONFIG).unwrap();
            shells.write_data(rank, 0);
        });
        shells
    }

    pub fn machine(&self, rank: usize) -> PathBuf {
        self.folder.path().join(rank.to_string())
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// 36 samples; `shift` makes other labels of them.
    pub fn write_data(&self, rank: usize, shift: u8) {
        let data = self.machine(rank).join("data");
        for (part, count) in [("train", 36u8), ("t10k", 10)] {
            let number = |number: u8| [0, 0, 0, number];
            let images = [[0, 0, 8, 3], number(count), number(8), number(8)].concat();
            let pixels = (0..u32::from(count) * 64).map(|at| (at * 37 % 251) as u8);
            fs::write(
                data.join(format!("{part}-images-idx3-ubyte")),
                images.into_iter().chain(pixels).collect::<Vec<_>>(),
            )
            .unwrap();
            let labels = [[0, 0, 8, 1], number(count)].concat().into_iter();
            let labels = labels.chain((0..count).map(|at| (at + shift) % 10)).collect::<Vec<_>>();
            fs::write(data.join(format!("{part}-labels-idx1-ubyte")), labels).unwrap();
        }
    }

    /// A rank's command: training there, and meeting at a port of the loopback.
    pub fn command(&self, rank: usize, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().current_dir(self.machine(rank)).args(["--config", "run.toml", "-v"]);
        command.envs([("RANK", rank.to_string()), ("WORLD_SIZE", self.size.to_string())]);
        command.envs([("MASTER_ADDR", "127.0.0.1".to_string()), ("MASTER_PORT", self.port.to_string())]);
        command.env("RAYON_NUM_THREADS", "1");
        command
    }

    /// All ranks; each command may be changed before it starts. What each said, and its exit code.
    pub fn run(&self, change: impl Fn(usize, &mut Command)) -> Vec<(String, i32)> {
        let start = |rank: usize| {
            let mut command = self.command(rank, Path::new(env!("CARGO_BIN_EXE_trainer")));
            change(rank, &mut command);
            Launched::start(&mut command)
        };
        let mut ranks: Vec<Launched> = (0..self.size).map(start).collect();
        ranks
            .iter_mut()
            .map(|rank| {
                let code = rank.wait();
                (rank.output(), code)
            })
            .collect()
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
