//! Under a real mpirun: a build without the feature `mpi`, which goes by the launcher's variables, and one with it, whose
//! ranks talk through MPI. $MPIRUN names the mpirun to use; without it, one that fits the build is looked for.

#[allow(dead_code)] // Of what tests share, this one needs a part.
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/exact.rs"]
mod exact;
#[path = "../common/mpirun.rs"]
mod mpirun;
mod rounded;
#[path = "../common/runs.rs"]
mod runs;

use common::{Launched, WATCHDOG, alive, send, until};
use exact::{Operation, Where};
use lockstep::comm::{self, Communicator, mpi_library};
use lockstep::config::raw::{Algorithm, Parallel, ReduceDtype, TransportChoice};
use lockstep::error::Kind;
use lockstep::launch::watch::Health;
use lockstep::launch::world::World;
use lockstep::train::join;
use mpirun::{Mpirun, skip};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const CONFIG: &str = r#"
[run]
name = "mpi"
steps = 6
[data]
format = "shapes"
train = 400
test = 40
[batch]
global = 24
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 4
kernel = 3
stride = 2
activation = "relu"
[[model.layers]]
type = "batch_norm"
[[model.layers]]
type = "global_avg_pool"
[[model.layers]]
type = "linear"
units = 10
[optimizer]
type = "sgd"
lr = 0.1
momentum = 0.9
[parallel]
bucket_mib = 0.001
[log]
every_steps = 1
"#;

#[test]
fn runs_under_mpirun_have_the_bits_of_those_through_shared_memory() {
    let folder = tempfile::tempdir().unwrap();
    let shm = folder.path().join("shm");
    runs::trainer(CONFIG, &shm, 4, &["parallel.transport=\"shm\""]).assert().success();
    let expected = runs::summary(&shm)["weights_digest"].clone();
    let transports: &[&str] = if mpi_library().is_some() { &["auto", "tcp", "mpi"] } else { &["auto", "tcp"] };
    for (number, mpirun) in Mpirun::all().iter().enumerate() {
        for transport in transports {
            let out = folder.path().join(format!("{number}-{transport}"));
            let mut run = train(mpirun, 4, &out, &[&format!("parallel.transport={transport:?}")]);
            assert_eq!(run.wait(), 0, "{transport}: {}", run.output());
            assert_eq!(runs::summary(&out)["weights_digest"], expected, "{transport}");
        }
    }
}

/// Each rank has a parent of its own, so that is not how they find each other.
#[test]
fn ranks_in_shells_of_their_own_meet() {
    for mpirun in Mpirun::all() {
        let mut command = mpirun.command(3);
        command.args(["sh", "-c", "\"$@\"; exit $?", "sh", env!("CARGO_BIN_EXE_trainer")]);
        command.args(["bench-comm", "--max-bytes", "8"]);
        let mut run = Launched::start(&mut command);
        assert_eq!(run.wait(), 0, "{}: {}", mpirun.program, run.output());
        assert!(run.output().contains(", 3 ranks"), "{}", run.output());
    }
}

/// The commands themselves, in a folder where those experiments are small ones.
#[test]
fn the_commands_of_readme_train() {
    let readme = include_str!("../../README.md");
    let commands: Vec<&str> = readme.lines().map(str::trim_start).filter(|line| line.starts_with("mpirun ")).collect();
    assert!(commands.len() >= 3, "{commands:?}");
    for mpirun in Mpirun::all() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("configs")).unwrap();
        let pictures = ["data", "generate", "DIR", "--images", "60", "--classes", "3", "--size", "32x32"];
        runs::program().current_dir(folder.path()).args(pictures).assert().success();
        let of_pictures =
            CONFIG.replace("format = \"shapes\"\ntrain = 400\ntest = 40", "format = \"images\"\nvalidation = 0.1");
        for (name, config) in [("alexnet", &*of_pictures), ("fashion-mnist", CONFIG), ("quickstart", CONFIG)] {
            fs::write(folder.path().join(format!("configs/{name}.toml")), config).unwrap();
        }
        let path = mpirun.path_with(&folder.path().join("bin"), env!("CARGO_BIN_EXE_trainer"));
        for command in &commands {
            let mut shell = mpirun.prepared(Command::new("sh"));
            let mut run = Launched::start(shell.args(["-c", command]).env("PATH", &path).current_dir(folder.path()));
            assert_eq!(run.wait(), 0, "{command}: {}", run.output());
            let steps = runs::summary(&folder.path().join("runs/mpi"))["steps"].as_u64();
            assert_eq!(steps, Some(6), "{command}: {}", run.output());
            fs::remove_dir_all(folder.path().join("runs")).unwrap();
        }
    }
}

/// Ranks whose launcher puts each on a node of its own, without an address.
#[test]
fn ranks_of_several_nodes_meet_through_mpi() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let mut command = mpirun.command(3);
    command.arg("env");
    command.args([
        "OMPI_COMM_WORLD_LOCAL_RANK=0",
        "OMPI_COMM_WORLD_LOCAL_SIZE=1",
        "MPI_LOCALRANKID=0",
        "MPI_LOCALNRANKS=1",
    ]);
    command.args([
        env!("CARGO_BIN_EXE_trainer"),
        "-v",
        "bench-comm",
        "--transport",
        "mpi",
        "--min-bytes",
        "4096",
        "--max-bytes",
        "4096",
    ]);
    let mut run = Launched::start(&mut command);
    assert_eq!(run.wait(), 0, "{}", run.output());
    assert!(run.output().contains("by a broadcast of MPI's"), "{}", run.output());
    assert!(run.output().contains("all_reduce over mpi, 3 ranks"), "{}", run.output());
}

/// Two terms have one order of addition, so here the bits are those of all transports.
#[test]
fn mpis_own_collectives_train_too() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let folder = tempfile::tempdir().unwrap();
    for precision in ["f32", "bf16"] {
        let precision_is = format!("run.precision={precision:?}");
        let shm = folder.path().join(format!("shm-{precision}"));
        runs::trainer(CONFIG, &shm, 2, &[&precision_is]).assert().success();
        let native = folder.path().join(format!("native-{precision}"));
        let settings = [&precision_is, "parallel.transport=\"mpi\"", "parallel.algorithm=\"native\""];
        let mut run = train(&mpirun, 2, &native, &settings);
        assert_eq!(run.wait(), 0, "{precision}: {}", run.output());
        assert_eq!(runs::summary(&native)["weights_digest"], runs::summary(&shm)["weights_digest"], "{precision}");
    }
}

/// The audit of every step finds the same parameters on all ranks, and the loss is that of sums in f32, or nearly.
#[test]
fn gradients_in_bf16_train_too() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let folder = tempfile::tempdir().unwrap();
    let runs = ["f32", "bf16"].map(|dtype| {
        let out = folder.path().join(dtype);
        let dtype_is = format!("parallel.reduce_dtype={dtype:?}");
        let settings = ["transport=\"mpi\"", "algorithm=\"native\"", "audit_every_steps=1"];
        let settings = settings.map(|setting| format!("parallel.{setting}"));
        let settings: Vec<&str> = settings.iter().chain([&dtype_is]).map(String::as_str).collect();
        let mut run = train(&mpirun, 3, &out, &settings);
        assert_eq!(run.wait(), 0, "{dtype}: {}", run.output());
        runs::summary(&out)
    });
    let [wide, narrow] = runs.each_ref().map(|summary| summary["train_loss"].as_f64().unwrap());
    assert!((narrow / wide - 1.0).abs() < 0.01, "{narrow} with gradients in bf16, {wide} in f32");
    assert_ne!(runs[0]["weights_digest"], runs[1]["weights_digest"], "the setting makes a difference");
}

#[test]
fn every_operation_is_exact_over_mpi() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    for (algorithm, worlds) in [("ring", [2, 3, 5]), ("native", [2, 3, 5]), ("native in bf16", [2, 3, 4])] {
        for ranks in worlds {
            let mut command = mpirun.command(ranks);
            command.arg(std::env::current_exe().unwrap()).args(["--exact", "rank", "--nocapture"]);
            let mut run = Launched::start(command.env(ALGORITHM, algorithm));
            assert_eq!(run.wait(), 0, "{algorithm}, {ranks} ranks: {}", run.output());
            assert_eq!(run.output().matches("all is exact").count(), ranks, "{}", run.output());
        }
    }
}

/// A rank of the test above; a test of its own only in name.
#[test]
fn rank() {
    let Some(parallel) = parallel() else { return };
    join(&parallel, 0, |_, mut comm| {
        let comm = &mut *comm;
        match parallel.reduce_dtype {
            ReduceDtype::F32 => exact::check_all(comm),
            ReduceDtype::Bf16 => rounded::check_all(comm),
        }
        // More pieces than are under way at once; none of these is about gradients.
        let arena = comm.allocate(0).unwrap();
        for operation in [Operation::AllReduce, Operation::AllGather, Operation::Broadcast { root: 1 }] {
            exact::check(comm, &arena, operation, Where::Heap, 700_001, exact::integer);
        }
        check_received(comm, 700_001);
        if parallel.algorithm == Algorithm::Ring {
            exact::check_order(comm);
        }
        println!("all is exact");
        Ok(())
    })
    .unwrap();
}

/// Of replicated memory a rank alone on its host gets what is not its chunk, each value once.
fn check_received(comm: &dyn Communicator, len: usize) {
    let mut times = vec![0; len];
    comm.received(len, &mut |range| times[range].iter_mut().for_each(|times| *times += 1));
    times[comm::chunk(len, comm.size(), comm.rank())].iter_mut().for_each(|times| *times += 1);
    assert!(times.iter().all(|times| *times == 1));
}

const ALGORITHM: &str = "MPI_TEST_ALGORITHM";

/// What a rank of these tests is to connect with; nothing in other processes.
fn parallel() -> Option<Parallel> {
    let (algorithm, reduce_dtype) = match std::env::var(ALGORITHM).ok()?.as_str() {
        "native" => (Algorithm::Native, ReduceDtype::F32),
        "native in bf16" => (Algorithm::Native, ReduceDtype::Bf16),
        _ => (Algorithm::Ring, ReduceDtype::F32),
    };
    let timeout = WATCHDOG.as_secs_f64();
    Some(Parallel { algorithm, reduce_dtype, timeout, ..Parallel::over(TransportChoice::Mpi) })
}

#[test]
fn a_rank_that_makes_no_communicator_is_not_waited_for_for_ever() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let mut command = mpirun.command(2);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "one_connects", "--nocapture"]);
    let mut run = Launched::start(command.env(ALGORITHM, "native"));
    run.wait();
    assert!(run.output().contains("it gave up"), "{}", run.output());
}

/// A rank of the test above; a test of its own only in name.
#[test]
fn one_connects() {
    let Some(parallel) = parallel() else { return };
    let world = World::detect().unwrap();
    let (mut control, _watched) = world.connect(&parallel).unwrap();
    if world.rank == 1 {
        // Ends when rank 0 does.
        control.broadcast(&[]).unwrap_err();
        return;
    }
    let connected = comm::connect(&parallel, control, Health::new(Duration::from_secs(2)));
    let error = connected.err().expect("rank 1 does not connect");
    assert_eq!(error.kind(), Kind::PeerLost, "{error}");
    assert!(error.to_string().contains("waiting for the other ranks to make a communicator of MPI's"), "{error}");
    println!("it gave up");
}

/// mpirun does not see the death, as under an MPICH that leaves peers running: a shell stands between it and each rank.
#[test]
fn after_a_death_all_ranks_end_by_themselves() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    for algorithm in ["ring", "native"] {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.toml");
        fs::write(&config, CONFIG).unwrap();
        let mut command = mpirun.command(3);
        command.args(["sh", "-c", KEEPS_THE_CODE]).arg(folder.path()).arg(env!("CARGO_BIN_EXE_trainer"));
        command.arg("--config").arg(&config).arg("--out").arg(folder.path().join("out"));
        command.args(["--set", "run.steps=1000000"]);
        command.args(["--set", "parallel.transport=\"mpi\"", "--set"]);
        command.arg(format!("parallel.algorithm={algorithm:?}"));
        let mut run = Launched::start(&mut command);
        run.expect(|output| output.contains("step 3/"));
        let pids = [0, 1, 2].map(|rank| read(folder.path(), "pid", rank).unwrap());
        let killed = Instant::now();
        send(pids[1], Signal::KILL);
        until("the others to end", || pids.iter().all(|pid| !alive(*pid)).then_some(()));
        let took = killed.elapsed();
        assert!(took < Duration::from_secs(10), "the others took {took:?}, which is 2 s where nothing else runs");
        run.wait();
        let codes = [0, 1, 2].map(|rank| read(folder.path(), "code", rank));
        assert_eq!(codes, [Some(4), Some(128 + 9), Some(4)], "{}", run.output());
        let lost = format!("rank 1 (pid {} on host ", pids[1]);
        assert!(run.output().contains(&lost), "{}", run.output());
    }
}

/// `sh -c THIS FOLDER PROGRAM ...`, for three ranks. No shell ends before all have written, for mpirun takes the first for a
/// failure and ends the rest.
const KEEPS_THE_CODE: &str = r#"
rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}
"$@" &
echo $! > "$0/pid.$rank"
wait $!
echo $? > "$0/code.$rank"
until [ -e "$0/code.0" ] && [ -e "$0/code.1" ] && [ -e "$0/code.2" ]; do sleep 0.1; done
"#;

fn read(folder: &Path, what: &str, rank: usize) -> Option<i32> {
    fs::read_to_string(folder.join(format!("{what}.{rank}"))).ok()?.trim().parse().ok()
}

/// MVAPICH's variables without MVAPICH stand for the mpirun of another MPI: this one finds itself alone.
#[test]
fn a_rank_that_mpi_takes_for_a_world_of_its_own_is_refused() {
    let Some(library) = mpi_library() else { return skip("built without MPI") };
    let mut rank = Command::new(env!("CARGO_BIN_EXE_trainer"));
    for (name, value) in [("RANK", "1"), ("SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "4")] {
        rank.env(format!("MV2_COMM_WORLD_{name}"), value);
    }
    let output = rank.args(["bench-comm", "--max-bytes", "8"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    let said =
        format!("MVAPICH started this process as rank 1 of 4, but MPI ({library}) sees rank 0 of 1: use the mpirun of");
    assert!(error.contains(&said), "{error}");
}

#[test]
fn transport_mpi_without_mpi_says_what_to_do() {
    let remedy = match mpi_library() {
        Some(_) => "start them with `mpirun -np N trainer ...`",
        None => "build it with `cargo build --release --features mpi`",
    };
    for (arguments, remedy) in [
        ("--transport mpi", remedy),
        ("--algorithm native", "it goes with transport = \"mpi\""),
        ("--reduce-dtype bf16", "with transport = \"mpi\" and algorithm = \"native\""),
    ] {
        let output = runs::program().args(["-n", "2", "bench-comm"]).args(arguments.split(' ')).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(remedy) && error.lines().count() == 1, "{error}");
    }
}

/// Trains with `CONFIG`.
fn train(mpirun: &Mpirun, ranks: usize, out: &Path, settings: &[&str]) -> Launched {
    let config = out.with_extension("toml");
    fs::write(&config, CONFIG).unwrap();
    let mut command = mpirun.command(ranks);
    command.arg(env!("CARGO_BIN_EXE_trainer")).arg("--config").arg(config).arg("--out").arg(out);
    for setting in settings {
        command.args(["--set", setting]);
    }
    Launched::start(&mut command)
}
