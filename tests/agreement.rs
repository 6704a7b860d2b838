//! Ranks that do not agree: one has another configuration, other data or another program. Nothing is trained, rank 0 says once
//! what is different and where, the others say where that is to be read, and all end with exit code 2.

#[allow(dead_code)]
mod common;
#[allow(dead_code)]
#[path = "common/shells.rs"]
mod shells;

use shells::Shells;
use std::fs;
use std::io::Write;
use std::process::Command;

/// Rank 0 names what is different, the others say in one line that it does.
#[track_caller]
fn assert_refused(ranks: &[(String, i32)], rows: &[&str]) {
    for (rank, (output, code)) in ranks.iter().enumerate() {
        assert_eq!(*code, 2, "rank {rank}: {output}");
        let error = "error: the ranks do not agree, and nothing was trained";
        let expected = match rank {
            0 => format!("{error}:"),
            _ => format!("{error}; rank 0 on {} shows what differs", host()),
        };
        let said: Vec<&str> = output.lines().filter(|line| line.contains("do not agree")).collect();
        assert_eq!(said, [expected], "rank {rank}: {output}");
        assert_eq!(output.contains("| what "), rank == 0, "rank {rank}: {output}");
    }
    let (output, _) = &ranks[0];
    // The frame of a row is of no interest here, nor is how wide its columns are.
    let words = |text: &str| text.replace('|', " ").split_whitespace().collect::<Vec<_>>().join(" ");
    let said = words(output);
    rows.iter().for_each(|row| assert!(said.contains(&words(row)), "`{row}` is not in\n{output}"));
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[test]
fn another_configuration_on_one_rank_is_named_by_its_keys() {
    let host = host();
    for odd in [2, 0] {
        let shells = Shells::new(3);
        let refused = shells.run(|rank, command| {
            if rank == odd {
                command.args(["--set", "optimizer.lr=0.5", "--set", "run.seed=7"]);
            }
        });
        let rows = [
            format!("configuration: optimizer.lr | {odd} ({host}) | 0.5 | 0.1"),
            format!("configuration: run.seed | {odd} ({host}) | 7 | 0"),
        ];
        assert_refused(&refused, &rows.each_ref().map(String::as_str));
        assert!(!shells.machine(0).join("runs").join("shells").join("summary.json").exists());
    }
}

/// Before any rank looks for a GPU, which all do together.
#[test]
fn a_gpu_that_one_rank_wants_is_named() {
    let refused = Shells::new(2).run(|rank, command| {
        if rank == 1 {
            command.args(["--set", "run.device=cuda"]);
        }
    });
    assert_refused(&refused, &["configuration: run.device | 1 (", "| \"cuda\" | \"auto\""]);
}

#[test]
fn a_transport_that_one_rank_does_not_want_is_named_before_they_connect() {
    let refused = Shells::new(2).run(|rank, command| {
        if rank == 1 {
            command.args(["--set", "parallel.transport=tcp"]);
        }
    });
    assert_refused(&refused, &["configuration: parallel.transport | 1 (", "| \"tcp\" | \"auto\""]);
}

/// torchrun shows what all its ranks say; it has a variable that ranks by hand do not need.
#[test]
fn under_torchrun_rank_0_alone_says_it() {
    let refused = Shells::new(2).run(|rank, command| {
        command.env("TORCHELASTIC_RUN_ID", "none").args(["--set", &format!("run.seed={rank}")]);
    });
    assert!(refused[0].1 == 2 && refused[0].0.contains("error: the ranks do not agree"), "{refused:?}");
    assert!(refused[1].1 == 2 && !refused[1].0.contains("do not agree"), "{refused:?}");
}

#[test]
fn other_data_on_one_rank_are_named() {
    let shells = Shells::new(3);
    shells.write_data(1, 1);
    assert_refused(&shells.run(|_, _| {}), &["training set: fingerprint | 1 ("]);
}

#[test]
fn another_program_on_one_rank_is_named() {
    let shells = Shells::new(3);
    let other = shells.machine(1).join("trainer");
    fs::copy(env!("CARGO_BIN_EXE_trainer"), &other).unwrap();
    fs::OpenOptions::new().append(true).open(&other).unwrap().write_all(b"built later").unwrap();
    let refused = shells.run(|rank, command| {
        if rank == 1 {
            let mut built_later = shells.command(rank, &other);
            std::mem::swap(command, &mut built_later);
        }
    });
    assert_refused(&refused, &["program: build | 1 ("]);
    assert!(!refused[0].0.contains("program: version"), "{}", refused[0].0);
}

#[test]
fn ranks_of_trainer_n_and_those_by_hand_agree_and_end_with_the_same_weights() {
    let shells = Shells::new(3);
    let ranks = shells.run(|_, _| {});
    assert!(ranks.iter().all(|(_, code)| *code == 0), "{ranks:?}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.env_clear().current_dir(shells.machine(1)).args(["-n", "3", "--config", "run.toml", "--out", "again"]);
    assert!(command.output().unwrap().status.success());
    let digest = |summary: &str, rank: usize| {
        let text = fs::read_to_string(shells.machine(rank).join(summary)).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["weights_digest"].clone()
    };
    assert_eq!(digest("runs/shells/summary.json", 0), digest("again/summary.json", 1));
}

#[test]
fn ranks_by_hand_say_each_why_they_stop_before_the_end() {
    let stopped = Shells::new(2).run(|_, command| {
        command.args(["--inject", "term:rank=0@step=2", "--set", "run.steps=1000"]);
    });
    for (rank, (output, code)) in stopped.iter().enumerate() {
        assert_eq!(*code, 75, "rank {rank}: {output}");
        let said = |line: &&str| line.starts_with("stopped by SIGTERM ") && line.ends_with(" goes on from there");
        assert_eq!(output.lines().filter(said).count(), 1, "rank {rank}: {output}");
    }
}
