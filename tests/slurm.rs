//! A real Slurm, which scripts/slurm-here.sh starts for each test on this machine: jobs that train, that are requeued,
//! preempted, cancelled and run out of time. Skipped where Slurm or root is missing.

#[path = "common/wait.rs"]
mod wait;

use serde_json::Value as Json;
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use wait::until;

const TRAINER: &str = env!("CARGO_BIN_EXE_trainer");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/train.sbatch");
/// For anything that a job does, in a minute's time limit too.
const WATCHDOG: Duration = Duration::from_secs(180);
/// In scripts/train.sbatch.
const CONFIG: &str = "configs/quickstart.toml";

/// No end that comes by itself, until a test knows how many steps a job has done.
const ENDLESS: u64 = 1_000_000;
/// Steps from there to the end.
const MORE: u64 = 20;

#[test]
fn a_job_that_is_requeued_preempted_and_signalled_ends_with_the_weights_of_an_undisturbed_run() {
    let Some(cluster) = Cluster::start(1) else { return };
    cluster.has_run(MORE);
    let job = cluster.submit(&[SCRIPT, "--resume", "none", "--set", "checkpoint.every_steps=10"], "");

    job.begins_anew();
    job.trains();
    cluster.run("scontrol", &["requeue", &job.id]);
    job.is_queued_again(1, "SIGTERM");

    job.goes_on();
    job.trains();
    // Needs all CPUs, at once, and is more urgent.
    let other = cluster.submit(&["--partition=urgent", "--ntasks=4", "--wrap=true"], "");
    other.ends("COMPLETED", "0:0");
    job.is_queued_again(2, "SIGTERM");

    job.goes_on();
    job.trains();
    cluster.run("scancel", &["--signal=USR1", &job.id]);
    job.is_queued_again(3, "SIGUSR1");

    job.finishes(3, &["--set", "checkpoint.every_steps=10"]);
}

#[test]
fn a_job_whose_script_knows_its_end_saves_just_in_time() {
    let Some(cluster) = Cluster::start(1) else { return };
    let args = ["slurm", "--ntasks-per-node", "4", "--time", "1", "--signal-lead", "0", "--config", CONFIG];
    let script = cluster.run("trainer", &args);
    let job = cluster.submit(&[], &script);
    job.is_queued_again(1, "the job's time limit");
    job.finishes(1, &[]);
}

#[test]
fn a_job_that_slurm_tells_of_its_end_saves() {
    let Some(cluster) = Cluster::start(1) else { return };
    let job = cluster.submit(&["--time=2", "--signal=USR1@80", SCRIPT], "");
    job.is_queued_again(1, "SIGUSR1");
    job.finishes(1, &[]);
}

#[test]
fn a_job_that_is_cancelled_or_fails_is_not_queued_again() {
    let Some(cluster) = Cluster::start(1) else { return };
    let job = cluster.submit(&[SCRIPT, "--set", "optimizer.rl=0.1"], "");
    job.ends("FAILED", "2:0");
    assert!(job.log().contains("optimizer.rl"), "{}", job.log());

    let job = cluster.submit(&[SCRIPT, "--set", "checkpoint.every_steps=10"], "");
    job.trains();
    cluster.run("scancel", &[&job.id]);
    job.ends("CANCELLED", "0:15");
    assert_eq!(job.field("Restarts"), "0");
    until("the ranks' last word", || job.log().contains("stopped by SIGTERM after step ").then_some(()));
}

#[test]
fn ranks_of_srun_on_one_and_two_nodes_train_as_those_of_the_launcher() {
    let Some(cluster) = Cluster::start(2) else { return };
    cluster.configure(MORE);
    let train = |nodes: &str, out: &str| {
        let srun = ["--nodes", nodes, "--ntasks", "4", "trainer", "--config", CONFIG, "--out", out];
        cluster.run("srun", &srun);
        cluster.summary(out)["weights_digest"].clone()
    };
    let expected = cluster.undisturbed(&[]);
    assert_eq!(train("1", "one"), expected);
    assert_eq!(train("2", "two"), expected);
}

#[test]
fn the_commands_of_readme_train() {
    let Some(cluster) = Cluster::start(2) else { return };
    cluster.configure(MORE);
    std::os::unix::fs::symlink(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts"), cluster.folder.path().join("scripts"))
        .unwrap();
    let readme = include_str!("../README.md");
    let chapter = readme.split("\n## Slurm\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let commands: Vec<&str> = chapter.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    assert!(commands.len() >= 3, "{commands:?}");
    for command in commands {
        let _ = fs::remove_dir_all(cluster.folder.path().join("runs"));
        let mut shell = cluster.command("sh");
        succeed(shell.args(["-c", command]).env("SBATCH_WAIT", "1"));
        assert_eq!(cluster.summary("runs/slurm")["steps"], MORE, "{command}");
    }
}

#[test]
fn the_script_in_the_repository_is_the_one_that_is_printed() {
    let args = ["slurm", "--ntasks-per-node", "4", "--time", "1:00:00", "--config", CONFIG];
    let printed = succeed(trainer_in(Path::new(env!("CARGO_MANIFEST_DIR"))).args(args));
    assert_eq!(printed, fs::read_to_string(SCRIPT).unwrap());
}

#[test]
fn what_is_said_on_the_command_line_is_in_the_script() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), 1);
    fs::rename(folder.path().join(CONFIG), folder.path().join("it's.toml")).unwrap();
    let given = "slurm --nodes 2 --gpus-per-node 4 --cpus-per-task 6 --time 1-12:30 --signal-lead 300 --partition a,b \
                 --account me@work --set run.seed=3 --config it's.toml";
    let printed = succeed(trainer_in(folder.path()).args(given.split_whitespace()));
    for line in [
        "#SBATCH --job-name=slurm",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4      # ranks of a node",
        "#SBATCH --cpus-per-task=6        # cores of a rank",
        "#SBATCH --gpus-per-node=4        # one for each rank",
        "#SBATCH --time=1-12:30",
        "#SBATCH --partition=a,b",
        "#SBATCH --account=me@work",
        "srun --kill-on-bad-exit=0 trainer --config \"it's.toml\" --set 'run.seed=3' \"$@\"",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "no line {line}\n{printed}");
    }
    assert!(printed.contains("\n#SBATCH --signal=USR1@300 "), "{printed}");
    let lines = |text: &str| text.lines().count();
    assert_eq!(lines(&printed), lines(&fs::read_to_string(SCRIPT).unwrap()));
}

#[test]
fn what_cannot_be_a_job_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    configure(folder.path(), 1);
    for (args, reason) in [
        ("--time 1:2:3:4", "expected minutes, as 90, or hours:minutes:seconds"),
        ("--time 0", "a job needs time"),
        ("--time -1", "--time"),
        ("--time 1", "--time 1 is 60 s, and --signal-lead 90 s"),
        ("--time 5 --nodes 0", "give a number from 1 to 65536"),
        ("--time 5 --nodes 5", "which 5 ranks cannot share equally"),
        ("--time 5 --account=a;b", "a name cannot hold ';'"),
        ("--time 5 -n 2", "give --nodes and --ntasks-per-node"),
        ("--time 5 --set optimizer.rl=1", "optimizer.rl"),
        ("--time 5 --set model.layers.0.kernel=99", "kernel"),
    ] {
        let mut command = trainer_in(folder.path());
        let output = command.args(["slurm", "--config", CONFIG]).args(args.split_whitespace()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args}: {error}");
        assert!(error.contains(reason) && output.stdout.is_empty(), "{args}: {error}");
    }
}

/// A Slurm of nodes with four CPUs each, for as long as this lives: the script stops it when its standard input ends,
/// which even a killed test brings about.
struct Cluster {
    script: Child,
    conf: String,
    /// For the ranks.
    port: String,
    /// Where jobs are submitted.
    folder: TempDir,
}

impl Cluster {
    /// None, with a line that says why, where there can be no Slurm.
    fn start(nodes: usize) -> Option<Cluster> {
        let found =
            |program: &str| Command::new(program).arg("-V").output().is_ok_and(|output| output.status.success());
        if !rustix::process::getuid().is_root() || !["slurmctld", "slurmd", "munged"].into_iter().all(found) {
            eprintln!("skipped: a Slurm of its own needs root and the packages slurm-wlm and munge");
            return None;
        }
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/slurm-here.sh"));
        command.args(["--nodes", &nodes.to_string(), "sh", "-c", "echo $SLURM_CONF; exec cat"]);
        let mut script = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut conf = String::new();
        BufReader::new(script.stdout.take().unwrap()).read_line(&mut conf).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let cluster = Cluster { script, conf: conf.trim().into(), port, folder: tempfile::tempdir().unwrap() };
        assert!(!cluster.conf.is_empty(), "Slurm did not start; its reason is above");
        cluster.configure(ENDLESS);
        Some(cluster)
    }

    /// A client of this Slurm, or `trainer`, where jobs are submitted. The nodes are one machine and have no names of their
    /// own, so the ranks are told where to meet.
    fn command(&self, program: &str) -> Command {
        let mut folders = vec![Path::new(TRAINER).parent().unwrap().to_path_buf()];
        folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        let path = std::env::join_paths(folders).unwrap();
        let mut command = Command::new(program);
        command.current_dir(&self.folder).env("SLURM_CONF", &self.conf).env("PATH", path);
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &self.port);
        command
    }

    fn run(&self, program: &str, args: &[&str]) -> String {
        succeed(self.command(program).args(args))
    }

    /// Submits what `args` name, or else the script.
    fn submit(&self, args: &[&str], script: &str) -> Job<'_> {
        let mut command = self.command("sbatch");
        // As from within another job, whose variables are handed on.
        command.envs([("SLURM_RESTART_COUNT", "5"), ("SLURM_JOB_START_TIME", "1"), ("SLURM_JOB_END_TIME", "1")]);
        let mut sbatch =
            command.arg("--parsable").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        sbatch.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let output = sbatch.wait_with_output().unwrap();
        assert!(output.status.success());
        Job { cluster: self, id: String::from_utf8(output.stdout).unwrap().trim().into() }
    }

    fn configure(&self, steps: u64) {
        configure(self.folder.path(), steps);
    }

    /// Leaves a run of so many steps where jobs will train.
    fn has_run(&self, steps: u64) {
        self.configure(steps);
        self.run("trainer", &["--config", CONFIG]);
        self.configure(ENDLESS);
    }

    /// The digest of a run without Slurm.
    fn undisturbed(&self, args: &[&str]) -> Json {
        let mut command = self.command("trainer");
        succeed(command.args(["-n", "2", "--config", CONFIG, "--out", "undisturbed"]).args(args));
        self.summary("undisturbed")["weights_digest"].clone()
    }

    fn summary(&self, out: &str) -> Json {
        let path = self.folder.path().join(out).join("summary.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}

struct Job<'a> {
    cluster: &'a Cluster,
    id: String,
}

impl Job<'_> {
    /// Waits until the checkpoints of an earlier run are out of the way.
    fn begins_anew(&self) {
        let moved = self.cluster.folder.path().join("runs/slurm/checkpoints.1");
        until("the earlier checkpoints to be moved", || moved.exists().then_some(()));
        until("the job to have noted that it has", || {
            moved.with_file_name("checkpoints/job.json").exists().then_some(())
        });
    }

    /// Waits until steps are being done.
    fn trains(&self) {
        let steps = self.newest_checkpoint();
        until("a later checkpoint", || (self.newest_checkpoint() > steps + 10).then_some(()));
    }

    /// Waits until the job is in the queue again, with everything saved, for this reason.
    fn is_queued_again(&self, restarts: u64, reason: &str) {
        until("the job to be requeued", || {
            assert!(!["FAILED", "TIMEOUT"].contains(&&*self.field("JobState")), "{}", self.log());
            (self.field("JobState") == "PENDING" && self.field("Restarts") == restarts.to_string()).then_some(())
        });
        let log = self.log();
        let words = format!("stopped by {reason} after step {}; everything is saved", self.newest_checkpoint());
        let said = log.lines().filter(|line| line.starts_with(&words) && line.ends_with("goes on from there"));
        assert_eq!(said.count(), 1, "no line, or several: {words}\n{log}");
    }

    /// Soon, and with time enough. Slurm waits two minutes before it starts a requeued job, so that nothing of the old one is
    /// taken for the new one's, which it tells apart by whole seconds; here some will do.
    fn goes_on(&self) {
        std::thread::sleep(Duration::from_secs(4));
        until("the job to start again", || {
            if self.field("Reason") == "BeginTime" {
                let job = format!("JobId={}", self.id);
                self.cluster.run("scontrol", &["update", &job, "StartTime=now", "TimeLimit=30"]);
            }
            (self.field("JobState") != "PENDING").then_some(())
        });
    }

    /// Gives the queued job an end, lets it come there, and compares its weights with those of an undisturbed run.
    fn finishes(&self, restarts: u64, args: &[&str]) {
        let steps = self.newest_checkpoint() + MORE;
        self.cluster.configure(steps);
        self.goes_on();
        self.ends("COMPLETED", "0:0");
        let log = self.log();
        assert!(log.contains(&format!("the job was requeued: restart {restarts}\n")), "{log}");
        assert!(log.contains(&format!("(step {})\n", steps - MORE)), "{log}");
        let summary = self.cluster.summary("runs/slurm");
        assert_eq!((&summary["steps"], &summary["job_restarts"]), (&steps.into(), &restarts.into()));
        assert_eq!(summary["weights_digest"], self.cluster.undisturbed(args), "{log}");
        // What was there before was moved aside once, if at all.
        assert!(!self.cluster.folder.path().join("runs/slurm/checkpoints.2").exists(), "{log}");
    }

    fn ends(&self, state: &str, code: &str) {
        until("the job to end", || (self.field("JobState") == state).then_some(()));
        assert_eq!(self.field("ExitCode"), code, "{}", self.log());
    }

    /// As `scontrol show job` has it.
    fn field(&self, name: &str) -> String {
        let shown = self.cluster.run("scontrol", &["--oneliner", "show", "job", &self.id]);
        let fields: HashMap<&str, &str> = shown.split_whitespace().filter_map(|field| field.split_once('=')).collect();
        fields[name].to_owned()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.field("StdOut")).unwrap_or_default()
    }

    /// Its step; 0 without one.
    fn newest_checkpoint(&self) -> u64 {
        let files =
            fs::read_dir(self.cluster.folder.path().join("runs/slurm/checkpoints")).into_iter().flatten().flatten();
        let names = files.map(|file| PathBuf::from(file.file_name()));
        let steps = names.filter_map(|name| name.file_stem()?.to_str()?.strip_prefix("step-")?.parse().ok());
        steps.max().unwrap_or(0)
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let shown = self.cluster.run("scontrol", &["show", "job", &self.id]);
            eprintln!("{shown}\nthe job said:\n{}", self.log());
        }
    }
}

/// The experiment: 48 samples a step in micro-batches, so that any number of ranks ends with the same weights.
fn configure(folder: &Path, steps: u64) {
    let text = format!(
        r#"
[run]
name = "slurm"
steps = {steps}
[data]
format = "shapes"
train = 960
test = 64
[batch]
global = 48
micro = 6
[model]
input = [32, 32, 3]
[[model.layers]]
type = "conv2d"
filters = 4
kernel = 3
stride = 4
activation = "relu"
[[model.layers]]
type = "global_avg_pool"
[[model.layers]]
type = "linear"
units = 10
[loss]
type = "softmax_cross_entropy"
[optimizer]
type = "sgd"
lr = 0.01
momentum = 0.9
[checkpoint]
every_epochs = 100000
[eval]
every_epochs = 100000
"#
    );
    fs::create_dir_all(folder.join("configs")).unwrap();
    fs::write(folder.join(CONFIG), text).unwrap();
}

/// Called by its name alone, as found on the PATH.
fn trainer_in(folder: &Path) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(TRAINER);
    command.arg0("trainer").current_dir(folder);
    command
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}: {error}", output.status);
    String::from_utf8(output.stdout).unwrap()
}
