"""Whether a GPU computes what it should: layers, tests, whole runs, and what compute-sanitizer says of the kernels."""

import glob
import math
import platform
import re
import shutil
import sys
from pathlib import Path

from session import Failed, Partly, Skipped

# Relative errors that each precision allows.
BOUNDS = {"f32": 1e-5, "tf32": 1e-3, "bf16": 1e-2, "f16": 1e-2}
# Tests that print a line for each case and direction.
ORACLES = ("oracles::layers_agree_with_pytorch_in_f64", "PyTorch computes in f64 from the same values")
LAYERS = ("layers::layers_agree_with_those_of_the_cpu", "the CPU computes in f32 from the same values")
RESULT = re.compile(r"^(?P<layer>\w+) .* (?P<precision>\w+) +(?P<direction>forward|backward) +(?P<error>\S+)$")

ERRORS = "relative error of every layer, forward and backward, in f32 and TF32, against f64"
ROUNDED = "the same in bf16 and fp16, against the CPU's f32 on the same values"
DIGEST = "two runs on the GPU, with and without CUDA graphs, end with the same weights"
ACCURACY = "quickstart on the GPU, in f32, bf16 and fp16, beside the CPU's accuracy"


def goals(session):
    return [(ERRORS, "1e-5, TF32 1e-3"), (ROUNDED, "1e-2"), (DIGEST, "equal"), (ACCURACY, f"within {session.sizes.accuracy}")]


def foremost():
    return [("layers against PyTorch in f64", 20, lambda session: layers(session, *ORACLES))]


def whole_runs():
    return [("quickstart on CPU and GPU", 20, quickstart)]


def of_the_cpu():
    return [("layers against the CPU's", 20, lambda session: layers(session, *LAYERS))]


def tests_of_all():
    return [("tests of the GPU", 20, tests)]


def slow():
    return [
        ("Fashion-MNIST", 60, fashion_mnist),
        ("compute-sanitizer, memcheck", 40, lambda session: sanitizer(session, "memcheck", ["step::", "augment::", "oracles::"])),
        ("compute-sanitizer, racecheck", 40, lambda session: sanitizer(session, "racecheck", ["oracles::"])),
    ]


def environment(session, info):
    """What the results belong to; `info` is the trainer's view of it."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    try:
        gpu = session.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 30).out.strip()
    except FileNotFoundError:
        gpu = "there is no nvidia-smi"
    commit = (session.binaries / "commit").read_text().strip()
    session.report.text("trainer info", info)
    session.report.table(
        "Machine",
        ["what", "found"],
        ["GPU, driver, memory, power limit, clock", gpu],
        ["commit", commit],
        ["Python", platform.python_version()],
    )
    session.report.keep("machine", {"gpu": gpu, "commit": commit, "info": info})


def layers(session, test, reference):
    """The greatest error of each layer by precision and direction; also of a run that was ended."""
    finished = session.run([session.tests, "--exact", test, "--nocapture"], session.sizes.layers_s)
    worst, cases = {}, 0
    for line in finished.out.splitlines():
        if not (match := RESULT.match(line.strip())):
            continue
        cases += 1
        key = (match["layer"], match["precision"], match["direction"])
        # Greater than any error is one that is not a number.
        worst[key] = max(worst.get(key, 0.0), float(match["error"]), key=lambda error: (math.isnan(error), error))
    columns = [(p, d) for p in BOUNDS for d in ("forward", "backward") if any(key[1:] == (p, d) for key in worst)]
    session.report.table(
        f"Greatest relative errors of layers, {test.split('::')[0]}",
        ["layer", *(f"{precision} {direction}" for precision, direction in columns)],
        ["allowed", *(f"{BOUNDS[precision]:.0e}" for precision, _ in columns)],
        *(
            [layer, *(f"{worst[layer, *column]:.1e}" if (layer, *column) in worst else "" for column in columns)]
            for layer in dict.fromkeys(key[0] for key in worst)
        ),
        note=f"Norm of the difference over the norm of what {reference}.",
    )
    session.report.keep(f"errors of {test}", [[*key, error] for key, error in worst.items()])
    wrong = [f"{' '.join(key)} {error:.1e}" for key, error in worst.items() if not error < BOUNDS[key[1]]]
    goal, precisions = (ERRORS, ("f32", "tf32")) if test == ORACLES[0] else (ROUNDED, ("bf16", "f16"))
    if of_goal := [key for key in worst if key[1] in precisions]:
        closest = max(of_goal, key=lambda key: worst[key] / BOUNDS[key[1]])
        right = all(worst[key] < BOUNDS[key[1]] for key in of_goal)
        seen = f"nearest to its bound: {' '.join(closest)} {worst[closest]:.1e}"
        session.report.see(goal, seen, None if right and finished.timed_out else right)
    if wrong:
        raise Failed(f"{len(wrong)} of {len(worst)} errors are above what is allowed: {', '.join(wrong[:8])}")
    if finished.timed_out:
        raise Partly(f"right as far as it came: {cases} results in {finished.seconds:.0f} s")
    if finished.code != 0:
        raise Failed(f"after {cases} results: {words_of_failures(finished)}")
    return f"{cases} results, all within what is allowed"


def tests(session):
    """All other tests of tests/gpu; among them 1, 2 and 4 ranks on this GPU, and checkpoints that go on on the other device."""
    only = list(session.sizes.tests)
    without = [word for test, _ in (LAYERS, ORACLES) for word in ("--skip", test)]
    finished = session.run([session.tests, *without, "--test-threads", "4", *only], session.sizes.tests_s)
    outcomes = dict(re.findall(r"^test (\S+) \.\.\. (ok|FAILED|ignored)", finished.out, re.MULTILINE))
    session.report.table("Tests of the GPU", ["test", "outcome"], *([name, outcome] for name, outcome in sorted(outcomes.items())))
    session.report.keep("tests", outcomes)
    failed = [name for name, outcome in outcomes.items() if outcome == "FAILED"]
    if failed:
        raise Failed(f"{', '.join(failed)}: {words_of_failures(finished)}")
    if finished.timed_out:
        raise Partly(f"{len(outcomes)} passed in {finished.seconds:.0f} s, the others did not come to their end")
    if finished.code != 0:
        raise Failed(f"{len(outcomes)} passed, then it ended with code {finished.code}: {finished.last_words()}")
    return f"{len(outcomes)} passed"


def words_of_failures(finished):
    """The first line of each panic."""
    panics = re.findall(r"panicked at [^\n]*\n([^\n]*)", finished.err + finished.out)
    return "; ".join(panic[:300] for panic in panics[:4]) or finished.last_words()


def quickstart(session):
    """The same accuracy on both, and the same weights each time."""
    settings = ["data.workers=4", *session.sizes.quickstart]
    runs = {
        name: session.train(f"quickstart-{name}", "configs/quickstart.toml", settings + keys.split(), 120)
        for name, keys in {
            "cuda, call by call": "run.device=cuda run.cuda_graphs=false",
            "cuda": "run.device=cuda",
            "cuda again": "run.device=cuda",
            "cpu": "run.device=cpu",
            "cuda bf16": "run.device=cuda run.precision=bf16",
            "cuda fp16": "run.device=cuda run.precision=fp16",
        }.items()
    }
    accuracy = {name: run["test_accuracy"] for name, run in runs.items()}
    session.report.table(
        "configs/quickstart.toml",
        ["run", "test accuracy", "test loss", "samples/s", "wall s", "weights"],
        *(
            [name, f"{run['test_accuracy']:.4f}", f"{run['test_loss']:.4f}", f"{run['samples_per_second']:.0f}"]
            + [f"{run['wall_seconds']:.1f}", run["weights_digest"][:12]]
            for name, run in runs.items()
        ),
    )
    session.report.keep("quickstart", runs)
    same = len({runs[name]["weights_digest"] for name in ("cuda, call by call", "cuda", "cuda again")}) == 1
    session.report.see(DIGEST, "equal" if same else "not equal", same)
    gaps = {name: abs(accuracy[name] - accuracy["cpu"]) for name in ("cuda", "cuda bf16", "cuda fp16")}
    worst = max(gaps, key=gaps.get)
    session.report.see(ACCURACY, f"{gaps[worst]:.4f} ({worst})", gaps[worst] <= session.sizes.accuracy)
    if not same:
        raise Failed("runs on the GPU that should be the same end with different weights")
    if gaps[worst] > session.sizes.accuracy:
        raise Failed(f"the accuracy is {accuracy[worst]:.4f} ({worst}) and {accuracy['cpu']:.4f} on the CPU")
    return f"accuracy {accuracy['cuda']:.4f}, on the CPU {accuracy['cpu']:.4f}; three runs have the same weights_digest"


def fashion_mnist(session):
    """Held against the accuracy on the CPU that BENCHMARKS.md has."""
    folder = session.data and session.data / "fashion-mnist"
    if not folder or not folder.is_dir():
        raise Skipped("give its folder: --data DIR, with DIR/fashion-mnist/train-images-idx3-ubyte.gz and the others")
    settings = [f'data.path="{folder.resolve()}"', "data.workers=4", "run.device=cuda"]
    run = session.train("fashion-mnist", "configs/fashion-mnist-small.toml", settings, 120)
    session.report.keep("fashion_mnist", run)
    expected = 0.9293
    if abs(run["test_accuracy"] - expected) > session.sizes.accuracy:
        raise Failed(f"the accuracy is {run['test_accuracy']:.4f}, on the CPU it was {expected}")
    return f"accuracy {run['test_accuracy']:.4f}, on the CPU {expected}; {run['wall_seconds']:.0f} s"


def sanitizer(session, tool, tests):
    """As many of these tests as come to an end in the time that there is."""
    program = find_sanitizer()
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", session.tests, "--test-threads", "1"]
    finished = session.run([*command, "--nocapture", *tests], 90)
    text = finished.out + finished.err
    if "Device not supported" in text or "not supported on this device" in text:
        raise Skipped(f"{program} does not work here: Device not supported")
    errors = re.findall(r"^========= (?:Invalid|Error|Race|Uninitialized|Barrier)[^\n]*", text, re.MULTILINE)
    results = sum(1 for line in finished.out.splitlines() if RESULT.match(line.strip()) or re.match(r"test \S+ \.\.\. ok", line))
    if errors:
        raise Failed(f"{len(errors)} errors, the first: {errors[0][10:]}")
    if not finished.timed_out and finished.code != 0:
        raise Failed(f"it ended with code {finished.code}: {finished.last_words()}")
    if finished.timed_out:
        raise Partly(f"no error in {results} results, as many as {finished.seconds:.0f} s allow")
    return f"no error in {results} results"


def find_sanitizer():
    places = [*map(Path, glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))]
    places += [path for folder in sys.path for path in Path(folder).glob("nvidia/**/compute-sanitizer") if path.is_file()]
    found = shutil.which("compute-sanitizer") or next(iter(places), None)
    if found is None:
        raise Skipped("there is no compute-sanitizer on the PATH, below /usr/local/cuda or in site-packages")
    return found
