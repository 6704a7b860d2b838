"""Time, programs and the log of one check."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Failed(Exception):
    """What was looked at is not as it should be."""


class Partly(Exception):
    """All is well as far as it came before its time was up."""


class Skipped(Exception):
    """Something that a part needs is not there."""


@dataclass(frozen=True)
class Sizes:
    """How much is done: on a GPU, and where only this script is tried."""

    peer_device: str = "cuda"
    alexnet: str = "configs/alexnet.toml"
    batches: tuple = (512, 1024, 256)
    fashion: str = "configs/fashion-mnist.toml"
    fashion_batch: int = 128
    modes: tuple = ("eager", "graphed")
    compiled_modes: tuple = ("compiled", "compiled and graphed")
    pairs: int = 3
    steps: int = 30
    fashion_steps: int = 300
    warmup: int = 10
    matrix: int = 8192
    copy_mib: int = 2048
    nccl_bytes: int = 16 << 20
    quickstart: tuple = ()
    tests: tuple = ()
    layers_s: int = 75
    tests_s: int = 150
    # The greatest difference of accuracies.
    accuracy: float = 0.01


FULL = Sizes()
REHEARSAL = Sizes(
    peer_device="cpu",
    alexnet="configs/alexnet-cifar10.toml",
    batches=(2,),
    modes=("eager",),
    compiled_modes=(),
    fashion="configs/fashion-mnist-small.toml",
    fashion_batch=2,
    pairs=2,
    steps=2,
    fashion_steps=2,
    warmup=1,
    matrix=64,
    copy_mib=1,
    nccl_bytes=4096,
    quickstart=("run.steps=2", "batch.global=4", "data.train=60", "data.test=4"),
    tests=("step::", "products::"),
    layers_s=60,
    tests_s=60,
    accuracy=1.0,
)


@dataclass
class Finished:
    """A program that has ended, or was ended because its time was up."""

    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool

    def last_words(self):
        lines = [line for line in (self.err or self.out).splitlines() if line.strip()]
        return " / ".join(lines[-3:])[:600]


class Session:
    def __init__(self, args, sizes, report):
        self.sizes, self.report, self.data = sizes, report, args.data
        self.out, self.binaries = args.out.resolve(), args.binaries.resolve()
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.trainer, self.tests = self.binaries / "trainer", self.binaries / "gpu-tests"
        self.rehearsal = args.rehearse
        self.end = time.monotonic() + 60 * args.minutes
        self.logged = open(self.out / "gpu-check.log", "w")
        # The trainer looks for CUDA's libraries beside the python3 on the path, which is to be the one that has PyTorch.
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        self.variables = {"CARGO_BIN_EXE_trainer": str(self.trainer), "PATH": path}
        self.peer = None
        self.peaks = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end_peer()
        self.logged.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def left(self):
        """Seconds."""
        return self.end - time.monotonic()

    def say(self, text):
        print(f"gpu-check: {text}", file=sys.stderr, flush=True)
        self.log(text)

    def log(self, text):
        print(text, file=self.logged, flush=True)

    def find_gpu(self):
        """The machine's, or for a rehearsal the emulator. Gives what `trainer info` prints."""
        if self.rehearsal:
            self.find_emulator()
        else:
            self.variables["LOCKSTEP_TEST_GPU"] = "1"
        info = self.run([self.trainer, "info"], 60)
        gpus = [" ".join(line.split()) for line in info.out.splitlines() if line.strip().startswith("GPU")]
        if info.code != 0 or not gpus or gpus[0].startswith("GPU none"):
            raise Failed(f"the trainer finds no GPU here: {gpus[0] if gpus else info.last_words()}")
        return info.out

    def find_emulator(self):
        """A test builds it beside this checkout."""
        self.run([self.tests, "faults_are_noticed"], 600)
        folders = (ROOT / "target/tmp").glob("emulator-*")
        emulator = max(folders, key=lambda folder: folder.stat().st_mtime, default=None)
        if emulator is None:
            raise Failed("the emulator was not built: cargo test --test gpu says why")
        self.variables |= {"LOCKSTEP_CUDA_PATH": str(emulator), "XDG_CACHE_HOME": str(emulator / "cache")}

    def run(self, command, limit_s, **variables):
        """Runs a program to its end, but not beyond this limit or that of the whole check."""
        command = [str(word) for word in command]
        self.log(f"\n$ {' '.join(command)}")
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=os.environ | self.variables | variables,
            start_new_session=True,
        )
        timed_out = False
        try:
            out, err = process.communicate(timeout=max(1.0, min(limit_s, self.left() - 5)))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end_group(process)
        if timed_out:
            out, err = process.communicate()
        finished = Finished(process.returncode, out, err, time.monotonic() - start, timed_out)
        self.log(f"{out}\n{err}\nexit code {finished.code} after {finished.seconds:.1f} s{' (its time was up)' * timed_out}")
        return finished

    @contextmanager
    def started(self, command, stderr):
        """A program that runs meanwhile, and is ended if it is still there afterwards."""
        command = [str(word) for word in command]
        self.log(f"\n$ {' '.join(command)}")
        variables = os.environ | self.variables
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT, env=variables, start_new_session=True
        )
        try:
            yield process
        finally:
            end_group(process)

    def train(self, out, config, settings, limit_s, ranks=1):
        """A whole run; its summary."""
        command = [self.trainer, *(["-n", ranks] if ranks > 1 else []), "--quiet", "--config", config]
        command += ["--out", self.scratch / out, "--resume", "none"]
        finished = self.run(command + sets(settings), limit_s)
        if finished.timed_out or finished.code != 0:
            raise Failed(f"the run {out} ended with code {finished.code} after {finished.seconds:.0f} s: {finished.last_words()}")
        return json.loads((self.scratch / out / "summary.json").read_text())

    def bench(self, config, settings, steps, limit_s, *more):
        """The object of `bench-step --json`."""
        command = [self.trainer, "bench-step", "--json", "--config", config, "--steps", steps, "--warmup", self.sizes.warmup]
        finished = self.run(command + sets(settings) + list(more), limit_s)
        if finished.timed_out or finished.code != 0:
            raise Failed(f"bench-step ended with code {finished.code} after {finished.seconds:.0f} s: {finished.last_words()}")
        return json.loads(finished.out)

    def ask_peer(self, limit_s, **request):
        """What scripts/peers/gpu_step.py answers. It is started when it is first asked, and again after a failure to answer."""
        if self.peer is None:
            command = [sys.executable, "scripts/peers/gpu_step.py", "--device", self.sizes.peer_device]
            self.peer = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.logged,
                cwd=ROOT,
                env=os.environ | self.variables,
                start_new_session=True,
            )
        self.log(f"\nto the peer: {request}")
        try:
            self.peer.stdin.write(json.dumps(request).encode() + b"\n")
            self.peer.stdin.flush()
            ready, _, _ = select.select([self.peer.stdout], [], [], max(1.0, min(limit_s, self.left() - 5)))
            line = self.peer.stdout.readline() if ready else b""
        except OSError:
            line = b""
        self.log(f"its answer: {line.decode(errors='replace').strip() or 'none'}")
        if not line:
            code = self.end_peer()
            raise Failed(f"PyTorch did not answer within its time, or has ended (code {code}); the log has its words")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"PyTorch: {answer['error'][:300]}")
        return answer

    def end_peer(self):
        """Its exit code."""
        if self.peer is None:
            return None
        peer, self.peer = self.peer, None
        end_group(peer)
        return peer.returncode


def sets(settings):
    return [word for setting in settings for word in ("--set", setting)]


def end_group(process):
    """Ends a program with all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
