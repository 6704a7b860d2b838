#!/usr/bin/env bash
# Single layers beside PyTorch: benches/kernels.rs and kernels.py in turns, on one thread.
#
#     scripts/peers/kernels.sh [PAIRS [NAME...]]
#
# PAIRS defaults to 5, NAME (the beginning of a layer's name) to all. Prints for each layer, batch and product the medians
# of both sides and PyTorch's time over ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh

pairs=${1:-5}
shift || true
cargo bench --quiet --bench kernels --no-run
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for ((pair = 1; pair <= pairs; pair++)); do
    cargo bench --quiet --bench kernels -- "$@" >"$scratch/$pair.ours"
    "$PYTHON" scripts/peers/kernels.py "$@" >"$scratch/$pair.peer"
done

"$PYTHON" - "$scratch" "$pairs" <<'END'
import statistics, sys

folder, pairs = sys.argv[1], int(sys.argv[2])


def read(side):
    """(layer, batch, product) -> the milliseconds of all pairs"""
    times = {}
    for pair in range(1, pairs + 1):
        for line in open(f"{folder}/{pair}.{side}").readlines()[1:]:
            layer, batch, product, ms = line.split()[:4]
            times.setdefault((layer, batch, product), []).append(float(ms))
    return times


ours, peer = read("ours"), read("peer")
print("| layer | batch | product | ms | PyTorch, ms | ratio |")
print("| --- | --- | --- | --- | --- | --- |")
for key in [key for key in ours if key in peer]:
    mine, theirs = statistics.median(ours[key]), statistics.median(peer[key])
    print(f"| {' | '.join(key)} | {mine:.3f} | {theirs:.3f} | {theirs / mine:.2f} |")
END
