#!/usr/bin/env bash
# All-reduce of 64 MiB between two hosts, beside Gloo, over links of 1 and 10 Gb/s and one that is as fast as it goes; what a
# link of 10 Gb/s costs AlexNet's step; and how long that step takes over 1 Gb/s where the hosts exchange the factors of the
# linear layers' gradients, and where they exchange the gradients.
#
#     scripts/peers/links.sh [PAIRS]
#
# The hosts are network namespaces of this machine, joined by a veth pair whose ends are shaped by tbf, with a rank of one
# thread in each. PAIRS defaults to 5: every pair is a run of ours and one of torch.distributed's Gloo, in turns. Prints every
# pair, then medians, ratio and spread as rows for BENCHMARKS.md. Needs root, and ip and tc (Debian: iproute2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh

pairs=${1:-5}
bytes=$((64 << 20))
links=(1gbit 10gbit unshaped)
# Samples a rank.
batches=(8 32)

main() {
    for tool in ip tc; do
        command -v $tool >/dev/null || { echo "$tool is not on PATH: install iproute2" >&2; exit 1; }
    done
    [ "$(id -u)" = 0 ] || { echo "network namespaces are made by root: run this as root" >&2; exit 1; }
    cargo build --release --quiet
    scratch=$(mktemp -d)
    hosts=lockstep-links-$$
    trap 'ip netns delete $hosts-0; ip netns delete $hosts-1; rm -rf "$scratch"' EXIT
    join_hosts

    for ((pair = 1; pair <= pairs; pair++)); do
        echo "pair $pair of $pairs" >&2
        for link in "${links[@]}"; do
            shape "$link"
            on_both target/release/trainer bench-comm --transport tcp --json --min-bytes $bytes --max-bytes $bytes \
                >>"$scratch/$link.trainer.jsonl"
            on_both "$PYTHON" scripts/peers/allreduce_gloo.py --min-bytes $bytes --max-bytes $bytes \
                >>"$scratch/$link.gloo.jsonl"
        done
        shape 10gbit
        train_alexnet
        shape 1gbit
        for batch in "${batches[@]}"; do
            for exchange in on off; do
                time_alexnet "$batch" $exchange >>"$scratch/step.$batch.$exchange.jsonl"
            done
        done
    done
    PYTHONPATH=scripts/peers "$PYTHON" scripts/peers/links.py "$scratch" "${links[*]}" "${batches[*]}"
}

# Host h has the address 10.99.0.(h + 1) on its end, eth0.
join_hosts() {
    local host
    ip netns add "$hosts-0"
    ip netns add "$hosts-1"
    ip link add eth0 netns "$hosts-0" type veth peer eth0 netns "$hosts-1"
    for host in 0 1; do
        ip -n "$hosts-$host" address add 10.99.0.$((host + 1))/24 dev eth0
        ip -n "$hosts-$host" link set lo up
        ip -n "$hosts-$host" link set eth0 up
    done
}

# shape RATE: what each host sends from now on; `unshaped` takes the limit away.
shape() {
    local host
    for host in 0 1; do
        tc -n "$hosts-$host" qdisc delete dev eth0 root 2>/dev/null || true
        [ "$1" = unshaped ] || tc -n "$hosts-$host" qdisc add dev eth0 root tbf rate "$1" burst 256kb latency 10ms
    done
}

# on_both COMMAND...: one rank of it in each host. Prints what rank 0 says.
on_both() {
    on_host 1 "$@" >/dev/null &
    on_host 0 "$@"
    wait $!
}

on_host() {
    local rank=$1
    shift
    ip netns exec "$hosts-$rank" env RANK="$rank" WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.99.0.1 \
        MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0 RAYON_NUM_THREADS=1 "$@"
}

train_alexnet() {
    on_both target/release/trainer --quiet --config configs/alexnet.toml --set run.precision=bf16 --set run.steps=10 \
        --set schedule.warmup_epochs=0 --set optimizer.lr=0.001 --set data.format=synthetic --set data.augment='[]' \
        --set data.test=64 --set batch.local=32 --set parallel.transport=tcp --resume none --out "$scratch/alexnet" >&2
    cp "$scratch/alexnet/summary.json" "$scratch/alexnet.$pair.json"
}

# time_alexnet BATCH EXCHANGE: the step in f32, as `bench-step --json` tells it.
time_alexnet() {
    on_both target/release/trainer bench-step --config configs/alexnet.toml --steps 3 --warmup 1 --json \
        --set data.format=synthetic --set batch.local="$1" --set parallel.transport=tcp --set parallel.factor_exchange="$2"
}

main
