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

find_bench='
import json, sys
built = [json.loads(line) for line in sys.stdin]
print(next(b["executable"] for b in built if b.get("executable") and b["target"]["name"] == "input"))'
bench=$(cargo build --release --bench input --message-format json 2>/dev/null | "$PYTHON" -c "$find_bench")
results=$(mktemp)
trap 'rm -f "$results"' EXIT

for ((pair = 1; pair <= pairs; pair++)); do
    read -r rate _ cpu_rate _ < <(taskset -c 0 "$bench" "$folder" $side "$seconds")
    peer=$("$PYTHON" scripts/peers/input_pil.py "$folder" $side "$seconds")
    echo "{\"ours\": [$rate, $cpu_rate], \"peer\": $peer}" >>"$results"
    echo "pair $pair: trainer $rate images/s, $cpu_rate a second of CPU time; $peer"
done

"$PYTHON" - "$results" "$folder" <<'END'
import datetime, json, os, statistics, subprocess, sys

pairs = [json.loads(line) for line in open(sys.argv[1])]
measures = [(0, "images_per_second"), (1, "images_per_cpu_second")]


def cell(values):
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


cpu = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
images = os.path.basename(os.path.normpath(sys.argv[2]))
print("\n| date | commit | hardware | images | measured in | trainer | peer | ratio |")
print("| --- | --- | --- | --- | --- | --- | --- | --- |")
for place, key in measures:
    ours = [pair["ours"][place] for pair in pairs]
    peer = [pair["peer"][key] for pair in pairs]
    ratios = [a / b for a, b in zip(ours, peer)]
    cells = [
        datetime.date.today().isoformat(),
        commit,
        f"{cpu}, {os.cpu_count()} cores",
        images,
        key.replace("_", " "),
        cell(ours),
        f"{cell(peer)} {pairs[0]['peer']['peer']}",
        f"{statistics.median(ours) / statistics.median(peer):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
    ]
    print("| " + " | ".join(cells) + " |")
END
