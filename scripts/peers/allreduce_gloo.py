"""torch.distributed's Gloo all_reduce as `trainer bench-comm` measures its own: in place, f32, fresh index-dependent data
in every iteration, filled and checked outside of the timing, the time of an iteration being the slowest rank's.
One JSON object a size.

    python allreduce_gloo.py -n 2 --min-bytes 1024 --max-bytes 67108864 --factor 16

Starts its ranks, or is one of them where torchrun's variables say so.
"""

import argparse
import json
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def main():
    parser = argparse.ArgumentParser(description="All-reduce over Gloo, one JSON object a size.")
    parser.add_argument("-n", type=int, default=2, help="ranks")
    parser.add_argument("--min-bytes", type=int, default=8)
    parser.add_argument("--max-bytes", type=int, default=256 << 20)
    parser.add_argument("--factor", type=int, default=2)
    options = parser.parse_args()
    if "RANK" in os.environ:
        options.n = int(os.environ["WORLD_SIZE"])
        return run(int(os.environ["RANK"]), options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    mp.spawn(run, args=(options,), nprocs=options.n)


def run(rank, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=options.n)
    size = options.min_bytes
    while size <= options.max_bytes:
        row = measure(rank, options.n, size)
        if rank == 0:
            print(json.dumps(row), flush=True)
        size *= options.factor
    dist.destroy_process_group()


def measure(rank, ranks, size):
    index = torch.arange(size // 4, dtype=torch.int32) * 7
    iterations = min(max((1 << 30) // size, 10), 2000)
    warmup = iterations // 10
    seconds, wrong = [], 0
    for iteration in range(warmup + iterations):
        values = [((index + r * 131 + iteration * 29) % 1024).float() for r in range(ranks)]
        data, expected = values[rank].clone(), sum(values)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if iteration >= warmup:
            seconds.append(time.perf_counter() - start)
        wrong += int((data != expected).sum())
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    wrong = torch.tensor(wrong)
    dist.all_reduce(wrong)
    slowest = slowest.sort().values
    p50, p99 = (float(slowest[round((iterations - 1) * q)]) for q in (0.5, 0.99))
    algbw = size / p50 / 1e9
    return {
        "bytes": size,
        "p50_us": p50 * 1e6,
        "p99_us": p99 * 1e6,
        "algbw_gb_s": algbw,
        "busbw_gb_s": algbw * 2 * (ranks - 1) / ranks,
        "wrong": int(wrong),
    }


if __name__ == "__main__":
    main()
