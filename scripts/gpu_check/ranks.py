"""Ranks that share this GPU and sum by NCCL, one that is killed, and what is said where a library is missing."""

import json
import os
import signal
import time
from pathlib import Path

from session import Failed, sets

SHARED = ["run.device=cuda", "parallel.allow_shared_gpu=true"]
QUICKSTART = "configs/quickstart.toml"
# By what `bench-comm` calls it.
OPERATIONS = {"all_reduce": "all-reduce", "scatter_gather": "reduce-scatter and all-gather"}
# By the file that stands in the library's place.
PACKAGES = {"libcudnn.so.9": "nvidia-cudnn-cu13", "libnccl.so.2": "nvidia-nccl-cu13"}

SUMS = "two NCCL ranks: values that differ from the exact sum"
SAME = "two NCCL ranks: weights of the same run whose sums the CPU makes"
KILLED = "a killed NCCL rank is named, exit code 4"
NAMED = "without cuDNN or NCCL, the message names the package"


def goals():
    return [(SUMS, "0"), (SAME, "equal"), (KILLED, "within 2 s"), (NAMED, "both")]


def parts():
    return [
        ("sums by NCCL", 30, sums),
        ("two ranks on this GPU", 25, two_ranks),
        ("a killed rank", 20, killed),
        ("without cuDNN or NCCL", 10, without_libraries),
    ]


def sums(session):
    """Sums of integers, in one and in two halves, each value checked against the sum as the CPU makes it."""
    found, failures = [], []
    for operation in OPERATIONS:
        measured, failure = sums_by(session, operation)
        found += measured
        failures += [failure] if failure else []
    session.report.table(
        "Sums by NCCL, two ranks on this GPU",
        ["operation", "bytes", "p50, us", "p99, us", "algbw, GB/s", "busbw, GB/s", "wrong values"],
        *(
            [OPERATIONS[row["operation"]], str(row["bytes"]), f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}"]
            + [f"{row['algbw_gb_s']:.2f}", f"{row['busbw_gb_s']:.2f}", str(row["wrong"])]
            for row in found
        ),
        note="Through one GPU's memory: this shows that sums are right, not how fast GPUs are connected.",
    )
    session.report.keep("nccl", found)
    wrong = sum(row["wrong"] for row in found)
    if found:
        session.report.see(SUMS, f"{wrong} in {len(found)} sizes", None if wrong == 0 and failures else wrong == 0)
    if failures:
        raise Failed("; ".join(failures))
    last = {OPERATIONS[row["operation"]]: row for row in found}
    rates = (f"{what} {row['busbw_gb_s']:.1f} GB/s at {row['bytes']} bytes" for what, row in last.items())
    return f"{len(found)} sizes, all values exact; {'; '.join(rates)}"


def sums_by(session, operation):
    """What was measured of it, and what went wrong with it, if anything did."""
    command = [session.trainer, "-n", "2", "bench-comm", "--transport", "nccl", "--allow-shared-gpu", "--json"]
    command += ["--operation", operation, "--min-bytes", "4096", "--max-bytes", session.sizes.nccl_bytes, "--factor", "16"]
    finished = session.run(command, 60)
    found = [{"operation": operation} | json.loads(line) for line in finished.out.splitlines() if line.startswith("{")]
    if finished.code == 0 and found:
        return found, ""
    ended = "was ended, its time was up" if finished.timed_out else f"ended with code {finished.code}"
    return found, f"bench-comm of {operation} {ended}: {finished.last_words()}"


def two_ranks(session):
    """The order of two terms matters to no bit, so whoever sums ends with the same weights."""
    settings = [*SHARED, "data.workers=4", "run.epochs=1", *session.sizes.quickstart]
    ways = {
        "NCCL": ["parallel.transport=nccl"],
        "NCCL, each rank updating its share": ["parallel.transport=nccl", "parallel.nccl_update=sharded"],
        "the CPU, through host memory": ["parallel.transport=shm"],
    }
    runs = {
        name: session.train(f"two-ranks-{number}", QUICKSTART, settings + way, 60, ranks=2)
        for number, (name, way) in enumerate(ways.items())
    }
    session.report.table(
        "Two ranks on this GPU, configs/quickstart.toml",
        ["gradients are summed by", "samples/s", "train loss", "weights"],
        *(
            [name, f"{run['samples_per_second']:.0f}", f"{run['train_loss']:.4f}", run["weights_digest"][:12]]
            for name, run in runs.items()
        ),
    )
    session.report.keep("two_ranks", runs)
    same = len({run["weights_digest"] for run in runs.values()}) == 1
    session.report.see(SAME, "equal" if same else "not equal", same)
    if not same:
        raise Failed("the weights differ by the way of the sums")
    return "NCCL, with all of the update or a share of it on each rank, and the CPU's sums give the same weights_digest"


def killed(session):
    """From SIGKILL to the line that names the rank, as the user's terminal would get it."""
    out, said = session.scratch / "killed", session.scratch / "killed.err"
    settings = [*SHARED, "parallel.transport=nccl", *session.sizes.quickstart]
    settings += ["run.epochs=100000", "run.steps=1000000", "log.every_steps=1"]
    command = [session.trainer, "-n", "2", "--config", QUICKSTART, "--out", out, "--resume", "none", *sets(settings)]
    with open(said, "w") as stderr, session.started(command, stderr) as run:
        metrics = out / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, run, 60)
        victim = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[-1])
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        named = f"(pid {victim})"
        wait_until(lambda: named in said.read_text() and "was lost" in said.read_text(), run, 30)
        named_s = time.monotonic() - start
        code = run.wait(timeout=30)
        over_s = time.monotonic() - start
    session.log(said.read_text())
    seen = f"named after {named_s:.2f} s, over after {over_s:.2f} s with exit code {code}"
    session.report.see(KILLED, seen, named_s <= 2.0 and code == 4)
    session.report.keep("killed", {"named_s": named_s, "over_s": over_s, "code": code})
    if code != 4:
        raise Failed(f"it ended with code {code}: {said.read_text()[-300:]}")
    return seen


def wait_until(is_so, run, limit_s):
    """Looks again and again while the program runs, and once more when it has ended."""
    end = time.monotonic() + limit_s
    while not is_so():
        if run.poll() is not None and not is_so():
            raise Failed(f"the run ended with code {run.returncode} before")
        if time.monotonic() > end:
            raise Failed(f"nothing after {limit_s} s")
        time.sleep(0.01)


def without_libraries(session):
    """A file that is no library stands in the place of each in turn."""
    said = {file: words_without(session, file) for file in PACKAGES}
    session.report.text("Without a library", "\n".join(said.values()))
    named = [file for file, package in PACKAGES.items() if package in said[file]]
    session.report.see(NAMED, f"{len(named)} of {len(PACKAGES)}", len(named) == len(PACKAGES))
    if len(named) < len(PACKAGES):
        raise Failed(f"not said: {', '.join(package for file, package in PACKAGES.items() if file not in named)}")
    return "both packages are named, with exit code 6"


def words_without(session, file):
    folder = session.scratch / f"without-{file}"
    folder.mkdir()
    (folder / file).write_text("no library")
    # Where the user has named folders, the other libraries are still to be found as the trainer finds them there.
    given = session.variables.get("LOCKSTEP_CUDA_PATH") or os.environ.get("LOCKSTEP_CUDA_PATH", "")
    named = [Path(name).absolute() / lib for name in given.split(":") if name for lib in ("lib64", "lib", "")]
    for other in (other for place in named if place.is_dir() for other in place.iterdir()):
        if other.is_file() and not (folder / other.name).exists():
            (folder / other.name).symlink_to(other)
    settings = [*SHARED, "parallel.transport=nccl", "run.steps=1", *session.sizes.quickstart]
    command = [session.trainer, "-n", "2", "--config", QUICKSTART, "--out", session.scratch / f"run-{file}", "--resume", "none"]
    finished = session.run(command + sets(settings), 60, LOCKSTEP_CUDA_PATH=str(folder))
    if finished.code != 6:
        raise Failed(f"without {file} it ended with code {finished.code}: {finished.last_words()}")
    error = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return "\n".join(error).replace(str(folder), "DIR")
