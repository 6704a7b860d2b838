//! Under a real mpirun: a build without the feature `mpi`, which goes by the launcher's variables, and one with it, whose
//! ranks talk through MPI. $MPIRUN names the mpirun to use; without it, one that fits the build is looked for.

#[allow(dead_code)] // Of what tests share, this one needs a part.
mod common;
#[path = "common/exact.rs"]
mod exact;
#[path = "common/runs.rs"]
mod runs;

use common::{Launched, WATCHDOG, alive, send, until};
use exact::{Operation, Where};
use lockstep::comm::{self, mpi_library};
use lockstep::config::raw::{Algorithm, Parallel, TransportChoice};
use lockstep::error::Kind;
use lockstep::launch::watch::Health;
use lockstep::launch::world::World;
use lockstep::train;
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
    let Some(mpirun) = Mpirun::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let shm = folder.path().join("shm");
    runs::trainer(CONFIG, &shm, 4, &["parallel.transport=\"shm\""]).assert().success();
    let expected = runs::summary(&shm)["weights_digest"].clone();
    let transports: &[&str] = if mpi_library().is_some() { &["auto", "tcp", "mpi"] } else { &["auto", "tcp"] };
    for transport in transports {
        let out = folder.path().join(transport);
        let mut run = mpirun.train(4, &out, &[&format!("parallel.transport={transport:?}")]);
        assert_eq!(run.wait(), 0, "{transport}: {}", run.output());
        assert_eq!(runs::summary(&out)["weights_digest"], expected, "{transport}");
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

/// Whose sums may have another order.
#[test]
fn mpis_own_collectives_train_too() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let folder = tempfile::tempdir().unwrap();
    let settings = ["parallel.transport=\"mpi\"", "parallel.algorithm=\"native\""];
    let mut run = mpirun.train(3, &folder.path().join("native"), &settings);
    assert_eq!(run.wait(), 0, "{}", run.output());
}

#[test]
fn every_operation_is_exact_over_mpi() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    for algorithm in ["ring", "native"] {
        for ranks in [2, 3, 5] {
            let mut command = mpirun.command(ranks);
            command.arg(std::env::current_exe().unwrap()).args(["--exact", "rank", "--nocapture"]);
            let mut run = Launched::start(command.env("MPI_TEST_ALGORITHM", algorithm));
            assert_eq!(run.wait(), 0, "{algorithm}, {ranks} ranks: {}", run.output());
            assert_eq!(run.output().matches("all is exact").count(), ranks, "{}", run.output());
        }
    }
}

/// A rank of the test above; a test of its own only in name.
#[test]
fn rank() {
    let Some(algorithm) = algorithm() else { return };
    let parallel = Parallel { algorithm, timeout: WATCHDOG.as_secs_f64(), ..Parallel::over(TransportChoice::Mpi) };
    train::join(&parallel, 0, |_, mut comm| {
        exact::check_all(&mut *comm);
        // More pieces than are under way at once.
        let arena = comm.allocate(0).unwrap();
        for operation in [Operation::AllReduce, Operation::Broadcast { root: 1 }] {
            exact::check(&mut *comm, &arena, operation, Where::Heap, 700_001, exact::integer);
        }
        if algorithm == Algorithm::Ring {
            exact::check_order(&mut *comm);
        }
        println!("all is exact");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_rank_that_makes_no_communicator_is_not_waited_for_for_ever() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let mut command = mpirun.command(2);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "one_connects", "--nocapture"]);
    let mut run = Launched::start(command.env("MPI_TEST_ALGORITHM", "native"));
    run.wait();
    assert!(run.output().contains("it gave up"), "{}", run.output());
}

/// A rank of the test above; a test of its own only in name.
#[test]
fn one_connects() {
    let Some(algorithm) = algorithm() else { return };
    let parallel = Parallel { algorithm, ..Parallel::over(TransportChoice::Mpi) };
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

fn algorithm() -> Option<Algorithm> {
    let name = std::env::var("MPI_TEST_ALGORITHM").ok()?;
    Some(if name == "native" { Algorithm::Native } else { Algorithm::Ring })
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
    for (arguments, remedy) in
        [(&["--transport", "mpi"][..], remedy), (&["--algorithm", "native"][..], "it goes with transport = \"mpi\"")]
    {
        let output = runs::program().args(["-n", "2", "bench-comm"]).args(arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(remedy) && error.lines().count() == 1, "{error}");
    }
}

/// An mpirun, and the arguments without which it refuses what tests do.
struct Mpirun {
    program: String,
    arguments: &'static [&'static str],
}

impl Mpirun {
    /// One that fits this build; any fits a build without the feature.
    fn find() -> Option<Mpirun> {
        let library = mpi_library();
        let named = std::env::var("MPIRUN").ok();
        let names = named.as_deref().map_or(vec!["mpirun", "mpirun.openmpi", "mpirun.mpich"], |named| vec![named]);
        let found = names.iter().find_map(|name| {
            let version = Command::new(name).arg("--version").output().ok()?;
            let version = String::from_utf8_lossy(&version.stdout).into_owned();
            // The second where it is called by another name than mpirun.
            let open_mpi = version.contains("Open MPI") || version.contains("OpenRTE");
            let fits = library.as_ref().is_none_or(|library| library.contains("Open MPI") == open_mpi);
            let arguments: &[&str] = if open_mpi { &["--oversubscribe"] } else { &[] };
            fits.then(|| Mpirun { program: name.to_string(), arguments })
        });
        if found.is_none() {
            skip(&format!("no mpirun{}", library.map_or(String::new(), |library| format!(" of {library}"))));
        }
        found
    }

    fn of_this_build() -> Option<Mpirun> {
        match mpi_library() {
            Some(_) => Mpirun::find(),
            None => {
                skip("built without MPI");
                None
            }
        }
    }

    fn command(&self, ranks: usize) -> Command {
        let mut command = Command::new(&self.program);
        // Open MPI refuses to serve root, who may be all there is in a container.
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command.args(self.arguments).args(["-np", &ranks.to_string()]);
        command
    }

    /// Trains with `CONFIG`.
    fn train(&self, ranks: usize, out: &Path, settings: &[&str]) -> Launched {
        let config = out.with_extension("toml");
        fs::write(&config, CONFIG).unwrap();
        let mut command = self.command(ranks);
        command.arg(env!("CARGO_BIN_EXE_trainer")).arg("--config").arg(config).arg("--out").arg(out);
        for setting in settings {
            command.args(["--set", setting]);
        }
        Launched::start(&mut command)
    }
}

fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
