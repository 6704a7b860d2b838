#!/usr/bin/env bash
# All-reduce beside Open MPI and Gloo: the same sizes, data and way of measuring, run in turns.
#
#     scripts/peers/allreduce.sh [RANKS [ROUNDS]]
#
# RANKS defaults to 2, ROUNDS to 3. Every round runs ours over shared memory, ours over TCP, MPI_Allreduce and
# torch.distributed's Gloo. Prints the medians over rounds, what a plain loop over the same shared memory reaches, and the
# ratios. Needs mpicc and mpirun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh

ranks=${1:-2}
rounds=${2:-3}
for tool in mpicc mpirun; do
    command -v $tool >/dev/null || { echo "$tool is not on PATH: install Open MPI (Debian: libopenmpi-dev)" >&2; exit 1; }
done

cargo build --release --quiet
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mpicc -O3 -march=native -o "$scratch/allreduce" scripts/peers/allreduce.c

mpi=(mpirun -np "$ranks")
[ "$(id -u)" -eq 0 ] && mpi+=(--allow-run-as-root)
pin=()
if [ "$ranks" -le "$(nproc)" ]; then pin=(--pin); else mpi+=(--oversubscribe); fi

# 8 B, then 1 KiB to 64 MiB.
for ((round = 1; round <= rounds; round++)); do
    echo "round $round of $rounds" >&2
    for range in "8 8 2" "1024 67108864 16"; do
        read -r min max factor <<<"$range"
        sizes=(--min-bytes "$min" --max-bytes "$max" --factor "$factor")
        for transport in shm tcp; do
            target/release/trainer -n "$ranks" bench-comm --transport $transport --json "${sizes[@]}" "${pin[@]}" \
                >>"$scratch/$transport.jsonl"
        done
        "${mpi[@]}" "$scratch/allreduce" "$min" "$max" "$factor" >>"$scratch/mpi.jsonl"
        "$PYTHON" scripts/peers/allreduce_gloo.py -n "$ranks" "${sizes[@]}" >>"$scratch/gloo.jsonl"
    done
done

echo "$ranks ranks, $rounds rounds, $(nproc) cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)," \
    "commit $(git rev-parse --short HEAD), $(date -I), $(mpirun --version | head -1)"
"$PYTHON" - "$scratch" <<'END'
import json, statistics, sys
from collections import defaultdict

names = ["shm", "tcp", "mpi", "gloo"]
rows = {name: defaultdict(list) for name in names}
for name in names:
    for line in open(f"{sys.argv[1]}/{name}.jsonl"):
        # The launcher puts the rank in front of what a rank prints.
        row = json.loads(line[line.index("{"):])
        rows[name][row["bytes"]].append(row)

def median(name, size, column):
    return statistics.median(row[column] for row in rows[name][size])

print("algbw in GB/s; p50 in us")
head = ["bytes", "shm p50", "mpi p50", "gloo p50", "shm", "tcp", "mpi", "gloo", "loop", "shm/mpi", "shm/gloo", "shm/loop", "#wrong"]
print("".join(f"{column:>10}" for column in head))
for size in sorted(rows["shm"]):
    p50 = [median(name, size, "p50_us") for name in ("shm", "mpi", "gloo")]
    shm, tcp, mpi, gloo = (median(name, size, "algbw_gb_s") for name in names)
    loop = median("shm", size, "ceiling_gb_s")
    wrong = sum(row["wrong"] for name in names for row in rows[name][size])
    cells = [f"{us:.2f}" for us in p50] + [f"{rate:.3f}" for rate in (shm, tcp, mpi, gloo, loop)]
    cells += [f"{shm / other:.2f}" for other in (mpi, gloo, loop)]
    print(f"{size:>10}" + "".join(f"{cell:>10}" for cell in cells) + f"{wrong:>10}")
END
