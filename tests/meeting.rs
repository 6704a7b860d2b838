//! Ranks of several processes find each other, in every way there is, and say what is wrong where they cannot.

#[allow(dead_code)]
mod common;
#[path = "common/hosts.rs"]
mod hosts;
#[allow(dead_code)]
#[path = "common/shells.rs"]
mod shells;

use hosts::Hosts;
use shells::{Shells, free_port};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

fn all_well(ranks: &[(String, i32)]) {
    for (rank, (output, code)) in ranks.iter().enumerate() {
        assert_eq!(*code, 0, "rank {rank}: {output}");
    }
    let first = &ranks[0].0;
    for words in ["debug: rank 0 of ", "; they meet ", "debug: rank 0 on ", " waits for ", "peers at "] {
        assert!(first.contains(words), "{first}");
    }
}

#[test]
fn a_shared_folder_is_enough_and_stays_empty() {
    let (shells, shared) = (Shells::new(3), tempfile::tempdir().unwrap());
    // What a run that was killed has left.
    let stale = shared.path().join("lockstep-3-ranks.rendezvous");
    fs::write(&stale, format!("lockstep;2;0123456789abcdef;gone;127.0.0.1:{}\n", free_port())).unwrap();
    let ranks = shells.run(|_, command| {
        command.env_remove("MASTER_ADDR").env_remove("MASTER_PORT");
        command.env("LOCKSTEP_RENDEZVOUS", format!("file:{}", shared.path().display()));
    });
    all_well(&ranks);
    assert!(ranks[1].0.contains("met rank 0 at "), "{}", ranks[1].0);
    assert_eq!(fs::read_dir(shared.path()).unwrap().count(), 0);
}

/// Two nodes of Slurm, whose first is called by a name that this machine has for itself.
#[test]
fn a_slurm_step_needs_nothing_but_its_own_variables() {
    let shells = Shells::new(2);
    let job = format!("{}", std::process::id());
    let ranks = shells.run(|rank, command| {
        for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            command.env_remove(name);
        }
        let rank = rank.to_string();
        for (name, value) in [
            ("SLURM_PROCID", rank.as_str()),
            ("SLURM_NODEID", &rank),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NTASKS", "2"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "1(x2)"),
            ("SLURM_STEP_NODELIST", "localhost,node[07-08]"),
            ("SLURM_JOB_ID", &job),
            ("SLURM_STEP_ID", "0"),
        ] {
            command.env(name, value);
        }
    });
    all_well(&ranks);
}

/// MPICH's process manager passes the address on. The two hosts are names of this machine.
#[test]
fn hydra_needs_nothing_but_its_process_manager() {
    let Some(mpirun) =
        ["/usr/bin/mpirun.mpich", "/usr/bin/mpiexec.hydra"].into_iter().find(|file| Path::new(file).exists())
    else {
        return eprintln!("skipped: no MPICH (apt-get install mpich)");
    };
    let shells = Shells::new(4);
    let mut command = Command::new(mpirun);
    command.env_clear().current_dir(shells.machine(0)).env("PATH", "/usr/bin:/bin").env("RAYON_NUM_THREADS", "1");
    command.args(["-np", "4", "-ppn", "2", "-launcher", "fork", "-hosts", "localhost,127.0.0.1"]);
    command.arg(env!("CARGO_BIN_EXE_trainer")).args(["--config", "run.toml", "-v", "--set", "batch.global=8"]);
    let mut launched = common::Launched::start(&mut command);
    let code = launched.wait();
    let output = launched.output();
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("waits for 3 peers at ") && output.contains("(PMI)"), "{output}");
}

#[test]
fn an_interface_that_does_not_exist_is_refused_with_those_that_do() {
    let ranks = Shells::new(2).run(|_, command| {
        command.args(["--set", "parallel.interface=nope0"]);
    });
    for (output, code) in ranks {
        assert_eq!(code, 2, "{output}");
        assert!(output.contains("[parallel] interface = \"nope0\"") && output.contains("lo (127.0.0.1)"), "{output}");
    }
}

#[test]
fn an_interface_by_its_network_carries_meeting_and_data() {
    let ranks = Shells::new(2).run(|_, command| {
        command.args(["--set", "parallel.interface=127.0.0.0/8", "--set", "parallel.transport=tcp"]);
    });
    all_well(&ranks);
    assert!(ranks[0].0.contains("; data go over lo (127.0.0.1)"), "{}", ranks[0].0);
}

#[test]
fn interfaces_of_two_kinds_are_named_by_both_ranks() {
    if TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: this machine has no IPv6");
        return;
    }
    for choices in [["::1/128", "127.0.0.1/32"], ["127.0.0.1/32", "::1/128"]] {
        let ranks = Shells::new(2).run(|rank, command| {
            let interface = format!("parallel.interface={}", choices[rank]);
            command.args(["--set", &interface, "--set", "parallel.transport=tcp"]);
        });
        for (rank, (output, code)) in ranks.iter().enumerate() {
            assert_eq!(*code, 2, "rank {rank}: {output}");
            let error = output.lines().find(|line| line.starts_with("error: rank 0 on ")).unwrap_or_default();
            let said = choices.map(|choice| error.contains(&format!(" has {}, ", choice.split_once('/').unwrap().0)));
            assert!(said == [true; 2] && error.contains(", but rank 1 on "), "rank {rank}: {output}");
        }
    }
}

#[test]
fn a_port_in_use_is_told_by_all_ranks_at_once() {
    let shells = Shells::new(3);
    let _stranger = TcpListener::bind(("127.0.0.1", shells.port())).unwrap();
    let begun = Instant::now();
    let ranks = shells.run(|_, _| {});
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
    let port = shells.port();
    for (rank, (output, code)) in ranks.iter().enumerate() {
        assert_eq!(*code, 2, "rank {rank}: {output}");
        let words = match rank {
            0 => format!("cannot listen at port {port}, which MASTER_PORT names"),
            _ => format!("rank {rank} on "),
        };
        assert!(output.contains(&words) && output.contains("MASTER_PORT to"), "rank {rank}: {output}");
        assert_eq!(output.matches("error:").count(), 1, "rank {rank}: {output}");
    }
}

#[test]
fn a_name_that_does_not_resolve_is_told_with_both_ends() {
    let ranks = Shells::new(2).run(|_, command| {
        command.env("MASTER_ADDR", "nohost.invalid").args(["--set", "parallel.timeout=3"]);
    });
    let [(first, first_code), (second, second_code)] = &ranks[..] else { panic!("two ranks") };
    assert_eq!((*first_code, *second_code), (4, 2), "{first}\n{second}");
    assert!(first.contains("ranks [1] of 2 did not come to rank 0 on "), "{first}");
    assert!(second.contains("rank 1 on ") && second.contains("reach rank 0 at nohost.invalid:"), "{second}");
    assert!(second.contains("the name nohost.invalid does not resolve"), "{second}");
}

#[test]
fn open_mpi_on_several_hosts_is_told_the_ways_to_meet() {
    let ranks = Shells::new(2).run(|rank, command| {
        for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            command.env_remove(name);
        }
        command.env("OMPI_COMM_WORLD_RANK", rank.to_string()).env("OMPI_COMM_WORLD_SIZE", "2");
        command.env("OMPI_COMM_WORLD_LOCAL_RANK", "0").env("OMPI_COMM_WORLD_LOCAL_SIZE", "1");
    });
    for (output, code) in ranks {
        assert_eq!(code, 2, "{output}");
        for way in ["LOCKSTEP_RENDEZVOUS=file:", "MASTER_ADDR", "mpirun -x", "--features mpi"] {
            assert!(output.contains(way), "{output}");
        }
    }
}

/// Each host is in two networks; over the first, nothing comes through.
#[test]
fn of_two_networks_the_one_that_is_named_is_used() {
    let Some(hosts) = Hosts::new(2) else { return };
    second_network(&hosts);
    hosts.cut(0, 1);
    let (shells, shared) = (Shells::new(2), tempfile::tempdir().unwrap());
    let run = |choice: Option<&str>| {
        run_on(&hosts, &shells, |_, command| {
            if let Some(choice) = choice {
                command.args(["--set", &format!("parallel.interface={choice}"), "--set", "parallel.timeout=10"]);
            }
            command.env_remove("MASTER_ADDR").env_remove("MASTER_PORT");
            command.env("LOCKSTEP_RENDEZVOUS", format!("file:{}", shared.path().display()));
        })
    };
    // Without a choice, the first address that answers.
    for choice in [Some("eth1"), Some("10.98.0.0/24"), None] {
        let ranks = run(choice);
        all_well(&ranks);
        assert!(ranks[1].0.contains("debug: rank 1 on b (10.98.0.2) met rank 0 at 10.98.0.1:"), "{}", ranks[1].0);
    }
    let ranks = run(Some("eth0"));
    for (output, code) in &ranks {
        assert_eq!(*code, 4, "{output}");
    }
    assert!(ranks[0].0.contains("ranks [1] of 2 did not come to rank 0 on a at 10.99.0.1:"), "{}", ranks[0].0);
    let words = ["rank 1 on b could not reach rank 0 at ", "10.99.0.1:", "timed out"];
    words.iter().for_each(|words| assert!(ranks[1].0.contains(words), "{}", ranks[1].0));
}

/// MASTER_ADDR is in the first network, the interface in the second.
#[test]
fn ranks_meet_over_one_network_and_exchange_data_over_the_other() {
    /// Of the net's 650 parameters each host sends one half of the gradients and one of the new values, 4 bytes each.
    const DATA: u64 = STEPS * 650 * 4;
    const STEPS: u64 = 1000;
    let Some(hosts) = Hosts::new(2) else { return };
    second_network(&hosts);
    let shells = Shells::new(2);
    let run = |interfaces: [&str; 2]| {
        run_on(&hosts, &shells, |rank, command| {
            command.envs([("MASTER_ADDR", hosts::address(0)), ("MASTER_PORT", hosts::PORT.to_string())]);
            command.args(["--set", &format!("run.steps={STEPS}"), "--set", "parallel.factor_exchange=off"]);
            command.args(["--set", &format!("parallel.interface={}", interfaces[rank])]);
        })
    };
    let sent = || ["eth0", "eth1"].map(|interface| [0, 1].map(|host| sent_bytes(&hosts, host, interface)));
    let [before_0, before_1] = sent();
    let ranks = run(["eth1", "10.98.0.0/24"]);
    let [after_0, after_1] = sent();
    all_well(&ranks);
    assert!(ranks[0].0.contains("peers at 10.99.0.1:29500; data go over eth1 (10.98.0.1)"), "{}", ranks[0].0);
    assert!(ranks[1].0.contains("debug: rank 1 on b (10.99.0.2) met rank 0 at 10.99.0.1:29500"), "{}", ranks[1].0);
    for host in [0, 1] {
        let (meeting, data) = (after_0[host] - before_0[host], after_1[host] - before_1[host]);
        assert!(data > DATA && meeting < DATA / 2, "host {host}: {meeting} bytes to meet, {data} of data");
    }

    // They meet, but rank 1's choice leads nowhere; both know at once.
    for (rank, (output, code)) in run(["eth1", "lo"]).iter().enumerate() {
        assert_eq!(*code, 4, "rank {rank}: {output}");
        let words = "rank 1 on b and rank 0 on a cannot connect: from 127.0.0.1 to 10.98.0.1:";
        assert!(output.contains(words), "rank {rank}: {output}");
        assert!(output.contains("name it with [parallel] interface"), "rank {rank}: {output}");
    }
}

/// Each rank in a host of its own; its command may be changed before it starts.
fn run_on(hosts: &Hosts, shells: &Shells, change: impl Fn(usize, &mut Command)) -> Vec<(String, i32)> {
    shells.run(|rank, command| {
        let mut inside = hosts.command(rank, env!("CARGO_BIN_EXE_trainer"));
        inside.args(command.get_args()).args(["--resume", "none"]).current_dir(shells.machine(rank));
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        change(rank, &mut inside);
        *command = inside;
    })
}

fn sent_bytes(hosts: &Hosts, host: usize, interface: &str) -> u64 {
    let file = format!("/sys/class/net/{interface}/statistics/tx_bytes");
    let output = hosts.command(host, "/bin/cat").arg(file).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// A cable between the two hosts, beside the switch.
fn second_network(hosts: &Hosts) {
    let (a, b) = (hosts.namespace(0), hosts.namespace(1));
    let ip =
        |arguments: &[&str]| assert!(Command::new("ip").args(arguments).status().unwrap().success(), "{arguments:?}");
    ip(&["link", "add", "eth1", "netns", &a, "type", "veth", "peer", "eth1", "netns", &b]);
    for (host, address) in [(&a, "10.98.0.1/24"), (&b, "10.98.0.2/24")] {
        ip(&["-n", host, "address", "add", address, "dev", "eth1"]);
        ip(&["-n", host, "link", "set", "eth1", "up"]);
    }
}
