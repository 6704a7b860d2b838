#!/usr/bin/env bash
# Training speed beside PyTorch: the same net, batch and optimizer, 2 ranks of one core, run in turns.
#
#     scripts/peers/train.sh [CONFIG [DATA [PAIRS]]]
#
# CONFIG defaults to configs/fashion-mnist.toml, DATA to its `[data] path`, PAIRS to 5. Every pair is one run of ours and
# one of PyTorch's DistributedDataParallel over Gloo, 300 steps each. Prints every run, then the medians, their ratio and
# the spread as a row for BENCHMARKS.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh

config=${1:-configs/fashion-mnist.toml}
data=${2:-$("$PYTHON" -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["data"]["path"])' "$config")}
pairs=${3:-5}
steps=300
ranks=2

cargo build --release --quiet
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for ((pair = 1; pair <= pairs; pair++)); do
    target/release/trainer -n $ranks --config "$config" --set data.path="$data" --set run.steps=$steps \
        --set schedule.warmup_epochs=0 --resume none --out "$scratch/$pair" >"$scratch/$pair.log" 2>&1 || { cat "$scratch/$pair.log" >&2; exit 1; }
    "$PYTHON" scripts/peers/fashion_mnist_ddp.py -n $ranks --config "$config" --data "$data" --steps $steps \
        >"$scratch/$pair.peer.json"
    echo "pair $pair: $("$PYTHON" - "$scratch" "$pair" <<'END'
import json, sys
folder, pair = sys.argv[1:]
ours, peer = json.load(open(f"{folder}/{pair}/summary.json")), json.load(open(f"{folder}/{pair}.peer.json"))
print(f"trainer {ours['samples_per_second']:.0f} samples/s, {peer['peer']} {peer['samples_per_second']:.0f}")
END
)"
done

PYTHONPATH=scripts/peers "$PYTHON" - "$scratch" "$pairs" "$config" <<'END'
import json, statistics, sys
import rows

folder, pairs, config = sys.argv[1], int(sys.argv[2]), sys.argv[3]
ours = [json.load(open(f"{folder}/{pair}/summary.json")) for pair in range(1, pairs + 1)]
peer = [json.load(open(f"{folder}/{pair}.peer.json")) for pair in range(1, pairs + 1)]
assert {run["parameters"] for run in ours} == {run["parameters"] for run in peer}, "the two sides train different nets"

rates = [[run["samples_per_second"] for run in runs] for runs in (ours, peer)]
exposed = 100 * statistics.median(run["exposed_communication"] for run in ours)
rows.show(
    ["date", "commit", "hardware", "config", "trainer, samples/s", "peer, samples/s", "ratio", "exposed communication"],
    [*rows.provenance(), config, rows.cell(rates[0]), f"{rows.cell(rates[1])} {peer[0]['peer']}", rows.ratio(*rates), f"{exposed:.1f} %"],
)
END
