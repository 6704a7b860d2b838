"""Runs our AlexNet step and PyTorch's in turns and compares them; called by alexnet.sh.

With one rank: one process of ours against one of PyTorch's, no communication. With more, a pair has four parts: our ranks,
PyTorch's DDP over Gloo, and on both sides as many processes that do not communicate, which shows what communication costs.
Every rank has one thread. Both sides count images a second over the same steps after a warm-up, on noise: ours through its
data queue, PyTorch's from memory.
"""

import argparse
import json
import os
import subprocess
import sys

import rows

TRAINER = "target/release/trainer"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/alexnet.toml")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="samples a rank")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--apart", action=argparse.BooleanOptionalAction, default=True, help="also without communication")
    args = parser.parse_args()
    args.apart &= args.ranks > 1

    parts = {"trainer": ours, "PyTorch": theirs}
    if args.apart:
        parts |= {"trainer apart": ours_apart, "PyTorch apart": theirs_apart}
    rates, parameters = {name: [] for name in parts}, set()
    for pair in range(1, args.pairs + 1):
        for name, run in parts.items():
            results = run(args)
            rates[name].append(sum(result["samples_per_second"] for result in results))
            parameters.update(result["parameters"] for result in results)
        print(f"pair {pair}: " + ", ".join(f"{name} {rates[name][-1]:.1f} images/s" for name in parts), flush=True)
    assert len(parameters) == 1, f"the two sides train different nets: {parameters}"
    report(args, rates)


def ours(args):
    return finish(start_ours(args, args.ranks))


def ours_apart(args):
    return finish(*[start_ours(args, 1) for _ in range(args.ranks)])


def theirs(args):
    return finish(start_theirs(args))


def theirs_apart(args):
    return finish(start_theirs(args, "--apart"))


def start_ours(args, ranks):
    command = [TRAINER, "-n", str(ranks), "bench-step", "--json", "--config", args.config]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    sets = ["data.format=synthetic", "data.augment=[]", f"batch.local={args.batch}"]
    if args.precision != "f32":
        sets.append(f"run.precision={args.precision}")
    command += [word for key in sets for word in ("--set", key)]
    return start(command, RAYON_NUM_THREADS="1")


def start_theirs(args, *more):
    command = [sys.executable, "scripts/peers/alexnet_ddp.py", "--config", args.config, "-n", str(args.ranks)]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    return start([*command, "--batch", str(args.batch), "--precision", args.precision, *more])


def start(command, **variables):
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | variables)


def finish(*processes):
    """What each has printed."""
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode != 0:
            sys.exit(f"failed: {' '.join(process.args)}")
    return [json.loads(output) for output in outputs]


def report(args, rates):
    ours, theirs = rates["trainer"], rates["PyTorch"]
    header = ["date", "commit", "hardware", "config", "type", "batch a rank", "ranks", "trainer, images/s", "PyTorch", "ratio"]
    row = [*rows.provenance(), args.config, args.precision, str(args.batch), str(args.ranks)]
    row += [rows.cell(ours, 1), rows.cell(theirs, 1), rows.ratio(ours, theirs)]
    if args.apart:
        header += ["trainer / apart", "PyTorch / apart"]
        row += [rows.ratio(ours, rates["trainer apart"]), rows.ratio(theirs, rates["PyTorch apart"])]
    rows.show(header, row)


if __name__ == "__main__":
    main()
