//! Runs whose gradients NCCL sums against those whose transport does, and what follows when a rank or NCCL is missing. Where there
//! are fewer GPUs than ranks, these share them.

use crate::emulator;
use crate::runs::{program, summary};
use crate::training::Runs;
use assert_cmd::Command;
use lockstep::comm::{connect, nccl::Nccl};
use lockstep::config::raw::{Parallel, TransportChoice};
use lockstep::device::cuda::nccl::DataType;
use lockstep::error::Error;
use lockstep::launch::{rendezvous::Control, watch::Health};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Far beyond what any part of a test takes on a slow machine.
const WATCHDOG: Duration = Duration::from_secs(120);

const NCCL: &[&str] = &["run.device=cuda", "parallel.transport=nccl", "parallel.bucket_mib=0.002"];

/// Of two ranks there is one order to add in; of four the emulator has the transports'.
#[test]
fn sums_by_nccl_are_those_of_the_transports() {
    let Some(runs) = Runs::new() else { return };
    for (ranks, more) in [(2, &[][..]), (2, &["optimizer.clip_norm=0.5"]), (4, &["run.precision=bf16"])] {
        let train = |name: &str, transport: &[&str]| {
            let out = format!("{name}-{ranks}-{}", more.concat().replace('.', ""));
            (runs.train(&out, ranks, &[transport, more].concat())["weights_digest"].clone(), out)
        };
        let (digest, by_nccl) = train("nccl", NCCL);
        let (staged, by_shm) = train("shm", &["run.device=cuda", "parallel.transport=shm"]);
        if ranks == 2 || emulator::is_emulated() {
            assert_eq!(digest, staged, "{ranks} ranks, {more:?}");
        }
        let (tensor, difference) = runs.difference(&by_nccl, &by_shm);
        assert!(difference < 1e-2, "{ranks} ranks, {more:?}: {tensor} differs by {difference:e}");
    }
}

#[test]
fn sums_in_bf16_are_near_those_in_f32_and_the_same_each_time() {
    let Some(runs) = Runs::new() else { return };
    let rounded = [NCCL, &["parallel.reduce_dtype=bf16"]].concat();
    let [exact, once, again] =
        [("exact", NCCL), ("once", &rounded), ("again", &rounded)].map(|(out, settings)| runs.train(out, 2, settings));
    assert_eq!(once["weights_digest"], again["weights_digest"]);
    assert_ne!(once["weights_digest"], exact["weights_digest"]);
    let loss = |summary: &Value| summary["test_loss"].as_f64().unwrap();
    assert!((loss(&once) - loss(&exact)).abs() < 0.02 * loss(&exact), "{once} and {exact}");
}

/// Whether NCCL notices it or not, which it does not where GPUs are connected directly.
#[test]
fn a_killed_rank_is_named() {
    let Some(runs) = Runs::new() else { return };
    for (victim, ranks, hears) in [(1, 2, "deaf"), (2, 3, "well"), (0, 2, "deaf")] {
        let out = format!("killed-{victim}-{ranks}-{hears}");
        let settings = [NCCL, &["run.steps=1000000", "batch.micro=2", "batch.global=12"]].concat();
        let mut run = runs.command(&out, ranks, &settings);
        run.env("LOCKSTEP_EMULATOR_NCCL", hears).args(["--inject", &format!("kill:rank={victim}@step=3")]);
        let output = run.assert().code(4).get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(&format!("rank {victim} (pid ")) && said.contains(" was lost "), "{said}");
        assert!(!said.contains("did not stop by itself"), "{said}");
    }
}

/// Two ranks in one process, of which one never comes to a sum.
#[test]
fn a_sum_ends_when_a_rank_is_lost() {
    const INSIDE: &str = "LOCKSTEP_TEST_INSIDE";
    let Some(variables) = emulator::is_emulated().then(emulator::variables).flatten() else { return };
    if std::env::var_os(INSIDE).is_none() {
        let mut own = Command::new(std::env::current_exe().unwrap());
        own.args(["--exact", "nccl::a_sum_ends_when_a_rank_is_lost", "--nocapture"]).env(INSIDE, "1");
        own.envs(variables).env("NCCL_MULTI_RANK_GPU_ENABLE", "1").env("LOCKSTEP_EMULATOR_NCCL", "deaf");
        return drop(own.timeout(WATCHDOG).assert().success());
    }
    let gpu = emulator::gpu().unwrap();
    let [first, second] = Control::local(2).unwrap().try_into().ok().unwrap();
    let join = |control: Control, health: &Arc<Health>| {
        let mut comm = connect(&Parallel::over(TransportChoice::Shm), control, health.clone()).unwrap();
        Nccl::connect(&gpu, &mut *comm, health).unwrap()
    };
    let healths = [0, 1].map(|_| Health::new(WATCHDOG));
    let [here, there] = thread::scope(|scope| {
        let there = scope.spawn(|| join(second, &healths[1]));
        [join(first, &healths[0]), there.join().unwrap()]
    });

    let (memory, stream) = (gpu.allocate(4096).unwrap(), gpu.stream().unwrap());
    // SAFETY: the memory is used by this stream alone, which is waited for.
    let sum = || unsafe { here.all_reduce(memory.slice_mut(0..4096), DataType::Float32, &stream) };
    sum().unwrap();
    healths[0].fail(Error::peer_lost("rank 1 is gone"));
    stream.wait().unwrap();
    assert_eq!(sum().unwrap_err().to_string(), "rank 1 is gone");
    drop((here, there));
}

/// The other rank's GPU waits for it by itself, and its host does not see how long.
#[test]
fn a_slow_rank_is_named() {
    let Some(runs) = Runs::new() else { return };
    for (slow, form) in [(1, "replicated"), (0, "sharded")] {
        let form = format!("parallel.nccl_update={form}");
        let mut run = runs.command(&format!("slow-{slow}"), 2, &[NCCL, &[&form]].concat());
        run.env("LOCKSTEP_EMULATOR_STREAMS", "busy").args(["--inject", &format!("delay:rank={slow}:300ms")]);
        let output = run.assert().success().get_output().clone();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(&format!("waiting for the slowest rank (rank {slow})")), "{said}");
        let summary = summary(&runs.out(&format!("slow-{slow}")));
        assert_eq!(summary["slowest_rank"], slow, "{summary}");
    }
}

/// Its GPU waits for the one that is stopped, which sends no word, and whose links do not end.
#[test]
fn a_rank_that_ends_with_an_error_does_not_wait_for_one_that_is_stopped() {
    let Some(runs) = Runs::new().filter(|_| emulator::is_emulated()) else { return };
    for form in ["replicated", "sharded"] {
        let form = format!("parallel.nccl_update={form}");
        let mut run = runs.command(&form, 2, &[NCCL, &[&form]].concat());
        run.env("LOCKSTEP_EMULATOR_FAILS", "lrn_forward").args(["--inject", "stop:rank=1@step=1"]);
        let output = run.timeout(WATCHDOG).assert().code(6).get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("noticed in step 1: ") && said.contains("CUDA_ERROR_LAUNCH_FAILED"), "{said}");
    }
}

#[test]
fn without_nccl_its_package_is_named_and_auto_does_without() {
    let Some(variables) = emulator::is_emulated().then(emulator::variables).flatten() else { return };
    let Some(runs) = Runs::new() else { return };
    // All of the emulator but NCCL, in whose place is a file that is none.
    let libraries = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&variables[0].1).unwrap().map(Result::unwrap) {
        symlink(entry.path(), libraries.path().join(entry.file_name())).unwrap();
    }
    fs::remove_file(libraries.path().join("libnccl.so.2")).unwrap();
    fs::write(libraries.path().join("libnccl.so.2"), "none").unwrap();
    let run = |out: &str, settings: &[&str]| {
        let mut run = runs.command(out, 2, settings);
        let output =
            run.env("LOCKSTEP_CUDA_PATH", libraries.path()).env("LOCKSTEP_EMULATOR_GPUS", "2").output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run("asked", NCCL);
    assert_eq!(code, Some(6), "{said}");
    assert_eq!(said.matches("NCCL cannot be loaded: ").count(), 1, "{said}");
    assert!(said.contains("It comes with pip's nvidia-nccl-cu13 or"), "{said}");
    let auto = ["run.device=cuda", "run.steps=1", "parallel.allow_shared_gpu=false"];
    let (code, said) = run("auto", &auto);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.matches("gradients go through host memory, since NCCL cannot be loaded: ").count(), 1, "{said}");
}

#[test]
fn bench_comm_measures_nccl_also_where_ranks_share_a_gpu() {
    let Some(variables) = emulator::variables() else { return };
    let bench = |more: &[&str], version: &str| {
        let mut bench = program();
        bench
            .args(["-n", "2", "bench-comm", "--transport", "nccl", "--min-bytes", "4096", "--max-bytes", "4096"])
            .args(more);
        bench.envs(variables.iter().map(|(name, value)| (name, value))).env("LOCKSTEP_EMULATOR_NCCL_VERSION", version);
        let output = bench.output().unwrap();
        let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), out, err)
    };
    for (version, operation) in [("22902", "all_reduce"), ("23007", "scatter_gather")] {
        let (code, out, err) = bench(&["--operation", operation, "--allow-shared-gpu", "--json"], version);
        assert_eq!(code, Some(0), "{err}");
        let row: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&row["bytes"], &row["wrong"]), (&4096.into(), &0.into()), "{row}");
    }
    let (code, _, err) = bench(&["--operation", "reduce_update", "--allow-shared-gpu"], "22902");
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("over nccl all_reduce and scatter_gather are measured"), "{err}");
}
