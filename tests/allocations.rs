//! After the first steps a step allocates nothing: a run of more steps makes no more allocations. Counted over every
//! thread of every rank: compute, communication, data workers, watch.

#[allow(dead_code)]
#[path = "emulator/mod.rs"]
mod emulator;
#[allow(dead_code)]
#[path = "common/mpirun.rs"]
mod mpirun;

use lockstep::config;
use lockstep::launch::spawn;
use lockstep::launch::world::{Launcher, World};
use lockstep::train::{self, Options, Resume};
use mpirun::Mpirun;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Every kind of layer, several micro-batches a rank, an epoch's end with a short step every eight.
const CONFIG: &str = r#"
[run]
name = "allocations"
steps = 1
[data]
format = "shapes"
train = 250
test = 8
sampler = "balanced"
augment = ["random_crop", "horizontal_flip", "normalize"]
[batch]
global = 32
micro = 4
[model]
input = [32, 32, 3]
layers = [
    { type = "conv2d", filters = 8, kernel = 3, stride = 4, padding = "same", activation = "relu" },
    { type = "lrn" },
    { type = "conv2d", name = "thin", filters = 8, kernel = 3, groups = 8, padding = "same" },
    { type = "batch_norm", name = "left", activation = "relu" },
    { type = "conv2d", name = "right", filters = 8, kernel = 1, from = "thin" },
    { type = "add", name = "sum", from = ["left", "right"] },
    { type = "concat", from = ["sum", "left"] },
    { type = "max_pool", name = "max", size = 2 },
    { type = "avg_pool", size = 2 },
    { type = "tanh" },
    { type = "global_max_pool", name = "largest", from = "max" },
    { type = "global_avg_pool", name = "mean", from = "tanh_10" },
    { type = "concat", from = ["largest", "mean"] },
    { type = "sigmoid" },
    { type = "relu" },
    { type = "flatten" },
    { type = "dropout", rate = 0.1 },
    { type = "linear", units = 10 },
]
[optimizer]
type = "adam"
lr = 0.001
clip_norm = 1.0
clip_value = 1.0
l1 = 1e-6
[parallel]
bucket_mib = 0.0005
[log]
every_steps = 1000000
[eval]
every_steps = 1000000
[checkpoint]
every_steps = 1000000
"#;

#[test]
fn a_step_allocates_nothing() {
    for sets in ["parallel.transport=shm", "parallel.transport=tcp", "parallel.transport=shm run.precision=bf16"] {
        check((CONFIG, 500), sets, || Command::new(std::env::current_exe().unwrap()));
    }
}

/// Batches that are sent, or a set that lies there; passes that are recorded, or not.
#[test]
fn a_step_on_a_gpu_allocates_nothing() {
    let Some(variables) = emulator::variables() else { return };
    let (before, layers) = CONFIG.split_once("layers = [").unwrap();
    let (_, behind) = layers.split_once("    { type = \"flatten\" }").unwrap();
    let config = format!("{before}layers = [\n    {{ type = \"flatten\" }}{behind}")
        .replace("shapes", "synthetic")
        .replace("input = [32, 32, 3]", "input = [6, 6, 3]");
    for sets in ["data.resident=off run.cuda_graphs=false", "data.resident=on"] {
        check((&config, 200), &format!("run.device=cuda parallel.allow_shared_gpu=true batch.global=8 {sets}"), || {
            let mut program = Command::new(std::env::current_exe().unwrap());
            program.envs(variables.iter().map(|(name, value)| (name, value)));
            program
        });
    }
}

/// Lockstep's own: MPI has another allocator.
#[test]
fn a_step_over_mpi_allocates_nothing() {
    let Some(mpirun) = Mpirun::of_this_build() else { return };
    let native = "parallel.transport=mpi parallel.algorithm=native parallel.reduce_dtype=bf16";
    for sets in ["parallel.transport=mpi", native] {
        check((CONFIG, 500), sets, || {
            let mut launcher = mpirun.command(2);
            launcher.arg(std::env::current_exe().unwrap());
            launcher
        });
    }
}

/// A run of so many steps against one of a hundred.
fn check((config, many): (&str, usize), sets: &str, launcher: impl Fn() -> Command) {
    let few = 100;
    let [before, after] =
        [few, many].map(|steps| allocations(config, launcher(), &format!("{sets} run.steps={steps}")));
    for (rank, (before, after)) in before.into_iter().zip(after).enumerate() {
        // One an epoch would be 50 more, on a GPU one a step 100. The others are left to what a thread does when it first
        // blocks or is late, and to the words about a slow rank, which are said every ten seconds.
        let more = after.saturating_sub(before);
        assert!(more < 40, "{sets}, rank {rank}: {few} steps {before} allocations, {many} steps {after}");
    }
}

/// Allocations of each of two ranks in a run with these settings.
fn allocations(config: &str, mut launcher: Command, sets: &str) -> [usize; 2] {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.toml"), config).unwrap();
    let status = launcher
        .args(["--exact", "program", "--nocapture"])
        .env("ALLOCATIONS_FOLDER", folder.path())
        .env("ALLOCATIONS_SETS", sets)
        .status()
        .unwrap();
    assert!(status.success());
    [0, 1].map(|rank| fs::read_to_string(folder.path().join(rank.to_string())).unwrap().parse().unwrap())
}

/// The program under test; a test of its own only in name.
#[test]
fn program() {
    let Some(folder) = std::env::var_os("ALLOCATIONS_FOLDER").map(PathBuf::from) else { return };
    let world = World::from_env(|name| std::env::var(name).ok()).unwrap();
    if world.launcher == Launcher::None {
        let args: Vec<OsString> = std::env::args_os().skip(1).collect();
        std::process::exit(spawn::launch(&std::env::current_exe().unwrap(), &args, 2, None).unwrap().into());
    }
    train(&folder);
    fs::write(folder.join(world.rank.to_string()), ALLOCATIONS.load(Relaxed).to_string()).unwrap();
    std::process::exit(0);
}

fn train(folder: &Path) {
    let sets: Vec<String> = std::env::var("ALLOCATIONS_SETS").unwrap().split(' ').map(str::to_owned).collect();
    let config = config::load(&folder.join("config.toml"), &sets).unwrap();
    let out = Some(folder.join("run"));
    let options = Options { resume: Resume::Never, out, verbosity: 0, inject: Vec::new() };
    train::run(&config, &options).unwrap();
}
