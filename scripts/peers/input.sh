#!/usr/bin/env bash
# Reading, decoding, cropping and augmenting photographs on one core, beside PIL and torchvision in a DataLoader's worker.
#
#     scripts/peers/input.sh FOLDER [PAIRS [SECONDS]]
#
# FOLDER holds JPEGs as `format = "images"` takes them, PAIRS defaults to 5, SECONDS of each run to 5. Prints every pair, then
# the medians, their ratio and the spread as a row for BENCHMARKS.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh

folder=${1:?give a folder of images}
pairs=${2:-5}
seconds=${3:-5}
side=224

bench=$(cargo bench --bench input --no-run --message-format json 2>/dev/null |
    "$PYTHON" -c 'import json, sys; print([e for e in (json.loads(line).get("executable") for line in sys.stdin) if e][-1])')
results=$(mktemp)
trap 'rm -f "$results"' EXIT

for ((pair = 1; pair <= pairs; pair++)); do
    ours=$(taskset -c 0 "$bench" "$folder" $side "$seconds" | cut -d ' ' -f 1)
    peer=$("$PYTHON" scripts/peers/input_pil.py "$folder" $side "$seconds")
    echo "{\"ours\": $ours, \"peer\": $peer}" >>"$results"
    echo "pair $pair: trainer $ours images/s, $peer"
done

"$PYTHON" - "$results" "$folder" <<'END'
import datetime, json, os, statistics, subprocess, sys

pairs = [json.loads(line) for line in open(sys.argv[1])]
ours = [pair["ours"] for pair in pairs]
peer = [pair["peer"]["images_per_second"] for pair in pairs]


def cell(values):
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


ratios = [a / b for a, b in zip(ours, peer)]
cpu = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
cells = [
    datetime.date.today().isoformat(),
    commit,
    f"{cpu}, {os.cpu_count()} cores",
    os.path.basename(os.path.normpath(sys.argv[2])),
    cell(ours),
    f"{cell(peer)} {pairs[0]['peer']['peer']}",
    f"{statistics.median(ours) / statistics.median(peer):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
]
print("\n| date | commit | hardware | images | trainer, images/s a core | peer, images/s a core | ratio |")
print("| --- | --- | --- | --- | --- | --- | --- |")
print("| " + " | ".join(cells) + " |")
END
