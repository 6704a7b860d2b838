#!/usr/bin/env bash
# All-reduce beside Open MPI and Gloo: the same sizes, data and way of measuring, run in turns.
#
#     scripts/peers/allreduce.sh [RANKS [ROUNDS [OPERATION]]]
#
# RANKS defaults to 2, ROUNDS to 3. Every round runs ours over shared memory, ours over TCP, MPI_Allreduce and
# torch.distributed's Gloo. Prints the medians over rounds, what a plain loop over the same shared memory reaches, and the
# ratios. With `reduce_update` as OPERATION, the default being `all_reduce`: AlexNet's 62,378,344 gradients are reduced and
# its parameters updated by SGD with momentum, ours in one pass over shared memory, Open MPI's by MPI_Allreduce and then a
# pass on every rank. Needs mpicc and mpirun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh

ranks=${1:-2}
rounds=${2:-3}
operation=${3:-all_reduce}
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

case $operation in
    # 8 B, then 1 KiB to 64 MiB.
    all_reduce) ranges=("8 8 2" "1024 67108864 16") transports=(shm tcp) ;;
    reduce_update) ranges=("249513376 249513376 2") transports=(shm) ;;
    *) echo "OPERATION is $operation; give all_reduce or reduce_update" >&2; exit 2 ;;
esac
for ((round = 1; round <= rounds; round++)); do
    echo "round $round of $rounds" >&2
    for range in "${ranges[@]}"; do
        read -r min max factor <<<"$range"
        sizes=(--min-bytes "$min" --max-bytes "$max" --factor "$factor")
        for transport in "${transports[@]}"; do
            target/release/trainer -n "$ranks" bench-comm --operation "$operation" --transport "$transport" --json \
                "${sizes[@]}" "${pin[@]}" >>"$scratch/$transport.jsonl"
        done
        "${mpi[@]}" "$scratch/allreduce" "$operation" "$min" "$max" "$factor" >>"$scratch/mpi.jsonl"
        [ "$operation" = all_reduce ] || continue
        "$PYTHON" scripts/peers/allreduce_gloo.py -n "$ranks" "${sizes[@]}" >>"$scratch/gloo.jsonl"
    done
done

echo "$ranks ranks, $rounds rounds, $(nproc) cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)," \
    "commit $(git rev-parse --short HEAD), $(date -I), $(mpirun --version | head -1)"
"$PYTHON" - "$scratch" <<'END'
import json, os, statistics, sys
from collections import defaultdict

names = [name for name in ["shm", "tcp", "mpi", "gloo"] if os.path.exists(f"{sys.argv[1]}/{name}.jsonl")]
rows = {name: defaultdict(list) for name in names}
for name in names:
    for line in open(f"{sys.argv[1]}/{name}.jsonl"):
        # The launcher puts the rank in front of what a rank prints.
        row = json.loads(line[line.index("{"):])
        rows[name][row["bytes"]].append(row)

def median(name, size, column):
    return statistics.median(row[column] for row in rows[name][size])

def spread(name, size):
    times = sorted(row["p50_us"] / 1e3 for row in rows[name][size])
    return f"{statistics.median(times):.1f} ms ({times[0]:.1f} to {times[-1]:.1f})"

if "gloo" not in names:
    for size in sorted(rows["shm"]):
        loop = [size / row["ceiling_gb_s"] / 1e6 for row in rows["shm"][size]]
        ours, loop, mpi = median("shm", size, "p50_us"), 1e3 * statistics.median(loop), median("mpi", size, "p50_us")
        wrong = sum(row["wrong"] for name in names for row in rows[name][size])
        print(f"{size // 4} parameters, reduced and updated by SGD with momentum: one pass {spread('shm', size)}, "
              f"plain loop {loop / 1e3:.1f} ms, MPI_Allreduce and a pass {spread('mpi', size)}")
        print(f"one pass / loop {ours / loop:.2f}, MPI / one pass {mpi / ours:.2f}, memory of a rank "
              f"{median('shm', size, 'busbw_gb_s'):.2f} GB/s, {wrong} wrong")
    sys.exit()

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
