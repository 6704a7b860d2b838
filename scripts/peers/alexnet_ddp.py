"""AlexNet's training step in PyTorch: DistributedDataParallel over Gloo, or processes that do not communicate.

    python scripts/peers/alexnet_ddp.py --config configs/alexnet.toml --batch 32 --precision bf16

Net, loss and optimizer are read from the TOML. Nothing but the step is timed: each rank has one batch of noise in memory,
activations are channels_last, the optimizer is the fused one, ranks are pinned to cores, and the first steps are a warm-up.
bf16 is autocast. Rank 0 prints one line of JSON.
"""

import argparse
import json
import math
import os
import time
import tomllib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_net import build, pin, sgd, start_ranks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("-n", "--ranks", type=int, default=2, help="processes of one thread")
    parser.add_argument("--apart", action="store_true", help="the processes do not communicate")
    parser.add_argument("--batch", type=int, default=32, help="samples a rank")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    args = parser.parse_args()
    start_ranks(train, args.ranks, args)


def train(rank, args, barrier):
    pin(rank, args.ranks)
    config = tomllib.loads(args.config.read_text())
    torch.manual_seed(config["run"].get("seed", 0))
    net = build(config["model"]).to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in net.parameters())
    optimizer = sgd(net, config["optimizer"])
    alone = args.apart or args.ranks == 1
    if not alone:
        dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    loss_of = nn.CrossEntropyLoss()

    height, width, channels = config["model"]["input"]
    images = torch.randn(args.batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(args.batch)
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            barrier.wait()
            start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of(net(images), labels)
        loss.backward()
        optimizer.step()
    barrier.wait()
    seconds = time.perf_counter() - start

    if rank == 0:
        assert math.isfinite(loss.item()), "the peer's loss is not finite: the comparison would be void"
        result = {
            "peer": f"PyTorch {torch.__version__}" + ("" if alone else " DDP, Gloo"),
            "ranks": args.ranks,
            "local_batch": args.batch,
            "precision": args.precision,
            "parameters": parameters,
            "steps": args.steps,
            "samples_per_second": args.batch * args.ranks * args.steps / seconds,
        }
        print(json.dumps(result), flush=True)
    barrier.wait()
    # Gloo's threads can abort while the interpreter takes itself apart; the work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
