"""How fast a step is on this GPU, beside PyTorch on the same, in turns."""

import re
import statistics
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "peers"))
import rows  # noqa: E402

from session import FULL, Failed, Skipped, sets  # noqa: E402

# The sets are small enough to be kept in device memory. A low rate keeps the loss of noise finite, and costs the same.
SETTINGS = ["run.device=cuda", "data.format=synthetic", "data.augment=[]", "optimizer.lr=1e-4"]
AUGMENT = (
    '["horizontal_flip", { type = "random_crop", padding = 4 }, { type = "lighting", std = 0.1 }, '
    '{ type = "normalize", mean = [0.485, 0.456, 0.406], std = [0.00392157, 0.00392157, 0.00392157] }]'
)

MFU = "share of the bf16 matrix rate in AlexNet's step"
AUGMENTED = "AlexNet's rate with augmented bytes, beside noise as it is"
MEMORY = "device memory of AlexNet's step, with and without LRN, beside PyTorch's peak"
EXPOSED = "share of a step in which the GPU waits for the host, AlexNet's or the Fashion-MNIST net's"
GROWTH = "device memory taken after the first steps, of the same"


@dataclass
class Cell:
    """One net at one batch: the rates of each program, in pairs."""

    name: str
    config: str
    precision: str
    batch: int
    steps: int
    settings: list
    # Of PyTorch, without compiling.
    modes: tuple
    # The least rate, beside PyTorch's in eager mode, that is asked for; and beside its fastest.
    asked: tuple = ()
    ours: list = field(default_factory=list)
    # By mode: ours and theirs of the same pairs.
    theirs: dict = field(default_factory=dict)
    # Of our last run, of one without CUDA graphs, and of the peer's first eager one.
    bench: dict = field(default_factory=dict)
    single: dict = field(default_factory=dict)
    peer: dict = field(default_factory=dict)


def cells(session):
    """All that is measured, in the order of its worth."""
    alexnet = [alexnet_cell(session, lrn, batch) for batch in session.sizes.batches for lrn in (True, False)]
    fashion = [fashion_cell(session, precision) for precision in ("tf32", "bf16")]
    return [*alexnet[:2], *fashion, *alexnet[2:], fp16_cell(session)]


def goals(cells):
    asked = [(MFU, ">= 40 %"), (AUGMENTED, ">= 0.95"), (MEMORY, "<= 0.8"), (EXPOSED, "< 1 %"), (GROWTH, "0 MiB")]
    of = [zip((beside_eager(cell), beside_best(cell)), cell.asked) for cell in cells]
    return [(goal, f">= {least}") for pairs in of for goal, least in pairs] + asked


def beside_eager(cell):
    return f"{cell.name}, beside PyTorch eager"


def beside_best(cell):
    return f"{cell.name}, beside PyTorch's fastest"


def foremost(cells):
    main, second, *_ = cells
    return [
        ("peaks of this GPU", 25, peaks),
        ("AlexNet call by call", 15, lambda session: call_by_call(session, main)),
        part_of(main, cells),
        ("the host's share of a step", 5, lambda session: beside_the_work(session, main, cells)),
        ("layers of AlexNet", 10, lambda session: by_layer(session, main)),
        part_of(second, cells),
        ("device memory", 5, lambda session: memory(session, [main, second])),
    ]


def seconds(cells):
    main, small = cells[0], of_the_host(cells)[1]
    augment = ("augmented bytes on the device", 15, lambda session: augmented(session, main))
    hosts = ("the host's share of a short step", 15, lambda session: of_a_short_step(session, small, cells))
    return [part_of(cells[2], cells), augment, part_of(small, cells), hosts]


def of_the_host(cells):
    """Where its share is held against the goal: in the main case, and in the shortest step."""
    return [cells[0], cells[3]]


def others(cells):
    return [part_of(cell, cells) for cell in cells[4:]]


def compiled(cells):
    """In the order of worth. Compiling AlexNet takes minutes, so there is one of it before the rest."""

    def part(cell, least_s):
        return (f"{cell.name}, compiled", least_s, lambda session: compare_compiled(session, cell, cells))

    rest = [part(cell, 90) for cell in cells[4:] if cell.asked]
    return [part(cells[0], 90), part(cells[2], 40), part(cells[3], 40), part(cells[1], 90), *rest]


def part_of(cell, cells):
    return (cell.name, 25, lambda session: pairs(session, cell, cells))


def alexnet_cell(session, lrn, batch, precision="bf16", **more):
    config = net(session, session.sizes.alexnet, lrn)
    name = f"AlexNet{'' if lrn else ' without LRN'}, {precision}, batch {batch}"
    settings = [*SETTINGS, f"run.precision={precision}", f"data.train={2 * batch}", "data.test=8", batch_setting(config, batch)]
    more = {"modes": session.sizes.modes, "asked": (1.0, 1.3)} | more
    return Cell(name, config, precision, batch, session.sizes.steps, settings, **more)


def fp16_cell(session):
    """PyTorch scales the loss with the host's help, so that its step cannot be captured."""
    return alexnet_cell(session, True, session.sizes.batches[0], "fp16", modes=("eager",), asked=())


def fashion_cell(session, precision):
    batch = session.sizes.fashion_batch
    config = net(session, session.sizes.fashion)
    settings = [*SETTINGS, f"data.train={100 * batch}", batch_setting(config, batch)]
    settings.append("run.tf32=true" if precision == "tf32" else f"run.precision={precision}")
    name = f"Fashion-MNIST net, {precision}, batch {batch}"
    return Cell(name, config, precision, batch, session.sizes.fashion_steps, settings, session.sizes.modes, (3.0, 1.3))


def batch_setting(config, batch):
    """With the key that the configuration has."""
    key = "local" if "local" in tomllib.loads(Path(config).read_text())["batch"] else "global"
    return f"batch.{key}={batch}"


def net(session, config, lrn=True):
    """The configuration as both sides read it: without these layers, or in a rehearsal with few channels, a file in the
    scratch folder."""
    text = Path(config).read_text()
    path = session.scratch / f"{Path(config).stem}{'' if lrn else '-without-lrn'}.toml"
    if not lrn:
        text = "".join(line for line in text.splitlines(keepends=True) if 'type = "lrn"' not in line)
    if session.rehearsal:
        text = re.sub(r"units = \d{3,}", "units = 8", re.sub(r"filters = \d+", "filters = 4", text))
    path.write_text(text)
    return str(path)


def peaks(session):
    """What the benchmarks are held against: measured by PyTorch, in this run."""
    found = session.ask_peer(120, do="peaks", matrix=session.sizes.matrix, copy_mib=session.sizes.copy_mib)
    session.peaks = found
    session.report.keep("peaks", found)
    size = session.sizes.matrix
    session.report.table(
        "Peaks, measured in this run",
        ["what", "rate"],
        [f"product of bf16 matrices, {size} x {size}, of random values", f"{found['tflop_s']:.1f} TFLOP/s"],
        ["copy on the device, bytes read and written", f"{found['copy_gb_s']:.0f} GB/s"],
        ["copy to the device, from pinned memory", f"{found['to_device_gb_s']:.1f} GB/s"],
        ["copy to the host, to pinned memory", f"{found['to_host_gb_s']:.1f} GB/s"],
        note=f"{found['peer']}, medians.",
    )
    return f"{found['tflop_s']:.0f} TFLOP/s in bf16, {found['copy_gb_s']:.0f} GB/s"


def pairs(session, cell, cells):
    """Ours, and each of PyTorch's ways that needs no compiling, in turns. A way that fails leaves the others be."""
    failures = {}
    try:
        session.ask_peer(60, do="forget")
    except Failed as error:
        failures = dict.fromkeys(cell.modes, str(error))
    for _ in range(session.sizes.pairs):
        rate = ours(session, cell)
        for mode in cell.modes:
            if mode in failures:
                continue
            try:
                pair(session, cell, mode, rate)
            except Failed as error:
                failures[mode] = str(error)
        show(session, cells)
    if failures:
        raise Failed(f"{rows.cell(cell.ours)} samples/s; " + "; ".join(f"{mode}: {error}" for mode, error in failures.items()))
    return words(cell)


def compare_compiled(session, cell, cells):
    """Compiling is in the peer's first, untimed steps; the second way finds much of it done."""
    for mode in session.sizes.compiled_modes:
        session.ask_peer(60, do="forget")
        session.ask_peer(300, **request_of(session, cell, mode))
        for _ in range(session.sizes.pairs):
            pair(session, cell, mode, ours(session, cell))
            show(session, cells)
    return words(cell)


def ours(session, cell):
    cell.bench = session.bench(cell.config, cell.settings, cell.steps, 120, *peak(session))
    cell.ours.append(cell.bench["samples_per_second"])
    return cell.ours[-1]


def peak(session):
    """For `bench-step`, if it could be measured."""
    return ["--peak-tflops", f"{session.peaks['tflop_s']:.3g}"] if session.peaks else []


def pair(session, cell, mode, rate):
    answer = session.ask_peer(120, **request_of(session, cell, mode))
    if answer["parameters"] != cell.bench["parameters"]:
        raise Failed(f"the two sides train different nets: {cell.bench['parameters']} and {answer['parameters']} parameters")
    if mode == "eager" and not cell.peer:
        cell.peer = answer
    mine, theirs = cell.theirs.setdefault(mode, ([], []))
    mine.append(rate)
    theirs.append(answer["samples_per_second"])


def request_of(session, cell, mode):
    request = {"do": "step", "config": cell.config, "mode": mode, "precision": cell.precision, "batch": cell.batch}
    return request | {"steps": cell.steps, "warmup": session.sizes.warmup}


def show(session, cells):
    """The table of all that was measured by now, and what it says of the goals."""
    measured = [cell for cell in cells if cell.ours]
    modes = [mode for mode in (*FULL.modes, *FULL.compiled_modes) if any(mode in cell.theirs for cell in measured)]
    header = ["net", "trainer, samples/s", "step, ms", "TFLOP/s (of the peak)"]
    header += [f"{what}{mode}" for mode in modes for what in ("PyTorch ", "trainer / ")]
    lines = []
    for cell in measured:
        bench = cell.bench
        share = f" ({100 * bench['mfu']:.1f} %)" if "mfu" in bench else ""
        line = [cell.name, rows.cell(cell.ours), f"{bench['step_ms']:.2f}", f"{bench['tflop_s']:.1f}{share}"]
        for mode in modes:
            found = cell.theirs.get(mode)
            line += [rows.cell(found[1]), rows.ratio(*found)] if found else ["", ""]
        lines.append(line)
    peer = next((cell.peer["peer"] for cell in measured if cell.peer), "PyTorch did not run")
    note = f"{peer}, channels_last, autocast where bf16 or fp16, fused SGD; graphed: the step captured by hand as a CUDA graph; "
    note += "compiled: max-autotune; compiled and graphed: that captured by hand. Whole steps with optimizer, noise on the device; "
    note += "medians of the pairs and their range."
    session.report.table("Steps beside PyTorch", header, *lines, note=note)
    session.report.keep("steps", [cell.__dict__ for cell in measured])
    see_goals(session.report, cells)


def see_goals(report, cells):
    main = cells[0]
    if "mfu" in main.bench:
        report.see(MFU, f"{100 * main.bench['mfu']:.1f} %, {main.name}", main.bench["mfu"] >= 0.4)
    for cell in cells:
        if not cell.asked or not cell.theirs:
            continue
        of_eager, of_best = cell.asked
        if "eager" in cell.theirs:
            report.see(beside_eager(cell), rows.ratio(*cell.theirs["eager"]), ratio(*cell.theirs["eager"]) >= of_eager)
        best = max(cell.theirs.values(), key=lambda found: statistics.median(found[1]))
        # Compiled and graphed counts where it was measured; that it was is not asked for.
        enough, open_yet = ratio(*best) >= of_best, not {"eager", "graphed", "compiled"} <= set(cell.theirs)
        report.see(beside_best(cell), f"{rows.ratio(*best)} of {', '.join(cell.theirs)}", None if enough and open_yet else enough)


def ratio(ours, theirs):
    return statistics.median(ours) / statistics.median(theirs)


def words(cell):
    return "; ".join(f"{rows.ratio(*found)} of {mode}" for mode, found in cell.theirs.items())


def call_by_call(session, cell):
    """Without CUDA graphs, so that there are figures if these should fail."""
    cell.single = session.bench(cell.config, [*cell.settings, "run.cuda_graphs=false"], cell.steps, 120, *peak(session))
    session.report.keep(f"call by call, {cell.name}", cell.single)
    return f"{cell.single['samples_per_second']:.0f} samples/s, {cell.single['step_ms']:.2f} ms a step"


def of_a_short_step(session, cell, cells):
    if cell.bench:
        call_by_call(session, cell)
    return beside_the_work(session, cell, cells)


def beside_the_work(session, cell, cells):
    """What the host costs a step, with CUDA graphs and without, and what it takes of device memory."""
    if not cell.bench:
        raise Skipped("the step was not measured")
    ways = {"call by call": cell.single, "as CUDA graphs": cell.bench}
    session.report.table(
        f"Host and memory, {cell.name}",
        ["launched", "samples/s", "step, ms", "of it waiting for the host, ms", "device memory, MiB", "taken in the steps, MiB"],
        *(
            [way, f"{bench['samples_per_second']:.0f}", f"{bench['step_ms']:.2f}", f"{bench['exposed_ms']:.3f}"]
            + [f"{bench['device_memory_mib']:.0f}", f"{bench['device_memory_growth_mib']:.0f}"]
            for way, bench in ways.items()
            if bench
        ),
        note=f"Launching its layers one by one takes the host {cell.bench['launch_ms']:.2f} ms a step.",
    )
    share, growth = cell.bench["exposed_ms"] / cell.bench["step_ms"], cell.bench["device_memory_growth_mib"]
    found = session.report.figures.get("host", {}) | {cell.name: (share, growth)}
    session.report.keep("host", found)
    see_host(session.report, found, len(found) < len(of_the_host(cells)))
    return f"the GPU waits {100 * share:.2f} % of a step for the host, {growth:.0f} MiB are taken in the steps"


def see_host(report, found, open_yet):
    """The worst of what was found by now."""
    shares, growths = ({name: figures[at] for name, figures in found.items()} for at in (0, 1))
    waits, grows = max(shares, key=shares.get), max(growths, key=growths.get)
    little, none = shares[waits] < 0.01, growths[grows] == 0
    report.see(EXPOSED, f"{100 * shares[waits]:.2f} %, {waits}", None if little and open_yet else little)
    report.see(GROWTH, f"{growths[grows]:.0f} MiB, {grows}", None if none and open_yet else none)


def memory(session, cells):
    measured = [cell for cell in cells if cell.bench and "allocated_mib" in cell.peer]
    if not measured:
        raise Skipped("no step was measured on both sides of a GPU")
    figures = {cell.name: (cell.bench["device_memory_mib"], cell.peer["allocated_mib"], cell.peer["reserved_mib"]) for cell in measured}
    session.report.table(
        "Device memory of a step",
        ["net", "trainer, MiB", "PyTorch allocated, MiB", "PyTorch reserved, MiB", "trainer / allocated", "trainer / reserved"],
        *(
            [name, f"{mine:.0f}", f"{allocated:.0f}", f"{reserved:.0f}", f"{mine / allocated:.2f}", f"{mine / reserved:.2f}"]
            for name, (mine, allocated, reserved) in figures.items()
        ),
        note="The trainer's: all that was taken since it had its GPU, the set on the device and the libraries' own memory with it. "
        "PyTorch's: the peaks of its allocator in eager mode.",
    )
    shares = {name: mine / allocated for name, (mine, allocated, _) in figures.items()}
    seen = "; ".join(f"{name}: {share:.2f}" for name, share in shares.items())
    session.report.see(MEMORY, seen, max(shares.values()) <= 0.8)
    return f"of what PyTorch allocates, {seen}"


def by_layer(session, cell):
    """The trainer's own table."""
    command = [session.trainer, "bench-step", "--config", cell.config, "--steps", cell.steps, "--warmup", session.sizes.warmup]
    finished = session.run(command + peak(session) + sets(cell.settings), 90)
    if finished.timed_out or finished.code != 0:
        raise Failed(f"bench-step ended with code {finished.code}: {finished.last_words()}")
    session.report.text(f"Layers of {cell.name}", finished.out)
    return next(line for line in finished.out.splitlines() if "samples/s over" in line)


def augmented(session, cell):
    """The same net on bytes that are cropped, mirrored, lit and normalised in the step, against noise that is not."""
    settings = [f"data.augment={AUGMENT}" if key == "data.augment=[]" else key for key in cell.settings]
    same = Cell(f"{cell.name}, augmented", cell.config, cell.precision, cell.batch, cell.steps, settings, ())
    plain, rates = [], []
    for _ in range(session.sizes.pairs):
        plain.append(ours(session, cell))
        rates.append(ours(session, same))
    session.report.table(
        "Augmented bytes on the device",
        ["net", "noise as it is, samples/s", "augmented, samples/s", "augmented / as it is"],
        [cell.name, rows.cell(plain), rows.cell(rates), rows.ratio(rates, plain)],
    )
    session.report.keep("augmented", {"plain": plain, "augmented": rates})
    session.report.see(AUGMENTED, rows.ratio(rates, plain), ratio(rates, plain) >= 0.95)
    return f"{ratio(rates, plain):.3f} of the rate without"
