"""The training loop of one of our configs in PyTorch: DistributedDataParallel over Gloo, f32, one thread a rank.

    python scripts/peers/fashion_mnist_ddp.py --config configs/fashion-mnist.toml --data data/fashion-mnist

Net, batch, loss, optimizer and augmentation are read from the TOML, so the two sides cannot drift apart. Everything that
would hold the peer back without being training is kept out of the timed part: the idx files are read and normalised with
numpy beforehand, every batch lies augmented in memory, activations are channels_last (--nchw for the other layout), the
optimizer is the fused one, ranks are pinned to cores, and the first steps are a warm-up. Rank 0 prints one line of JSON.
"""

import argparse
import gzip
import json
import math
import os
import statistics
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_net import build, pin, sgd, start_ranks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with the idx files (default: [data] path)")
    parser.add_argument("-n", "--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="timed steps")
    parser.add_argument("--warmup", type=int, default=30, help="steps before the timed ones")
    parser.add_argument("--nchw", action="store_true", help="PyTorch's own layout instead of channels_last")
    args = parser.parse_args()

    start_ranks(train, args.ranks, args)


def train(rank, args, barrier):
    pin(rank, args.ranks)
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)

    config = tomllib.loads(args.config.read_text())
    layout = torch.contiguous_format if args.nchw else torch.channels_last
    torch.manual_seed(config["run"].get("seed", 0))
    net = build(config["model"]).to(memory_format=layout)
    parameters = sum(p.numel() for p in net.parameters())
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
    loss_of = nn.CrossEntropyLoss(label_smoothing=config["loss"].get("label_smoothing", 0.0))
    optimizer = sgd(net, config["optimizer"])

    local = config["batch"]["global"] // args.ranks
    batches = prepare(config["data"], args.data, rank, args.ranks, local, args.warmup + args.steps, layout)
    step_ms = []
    for step, (images, labels) in enumerate(batches):
        if step == args.warmup:
            barrier.wait()
            start = time.perf_counter()
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(ddp(images), labels)
        loss.backward()
        optimizer.step()
        step_ms.append(1e3 * (time.perf_counter() - began))
    barrier.wait()
    seconds = time.perf_counter() - start

    if rank == 0:
        result = {
            "peer": f"PyTorch {torch.__version__} DDP, Gloo",
            "ranks": args.ranks,
            "batch": local * args.ranks,
            "layout": "nchw" if args.nchw else "channels_last",
            "parameters": parameters,
            "steps": args.steps,
            "samples_per_second": round(local * args.ranks * args.steps / seconds, 1),
            "step_ms_p50": round(statistics.median(step_ms[args.warmup :]), 3),
            "loss": round(loss.item(), 4),
        }
        assert math.isfinite(result["loss"]), "the peer's loss is not finite: the comparison would be void"
        print(json.dumps(result), flush=True)
    barrier.wait()
    # Gloo's threads can abort while the interpreter takes itself apart; the work is done.
    os._exit(0)


def prepare(section, folder, rank, ranks, local, steps, layout):
    """`steps` batches of this rank, shuffled, augmented and normalised, as (N, C, H, W) tensors in memory."""
    assert section["format"] == "idx", "only idx files are understood here"
    folder = folder or Path(section["path"])
    images, labels = read_idx(folder / "train-images-idx3-ubyte"), read_idx(folder / "train-labels-idx1-ubyte")
    mean, std = images.mean() / 255, images.std() / 255
    random = np.random.default_rng(1 + rank)
    epochs = 1 + steps * local * ranks // len(labels)
    order = np.concatenate([np.random.default_rng(epoch).permutation(len(labels)) for epoch in range(epochs)])
    batches = []
    for step in range(steps):
        first = (step * ranks + rank) * local
        mine = order[first : first + local]
        pixels = augment(images[mine], section.get("augment", []), random)
        normalised = ((pixels / np.float32(255) - mean) / std).astype(np.float32)
        tensor = torch.from_numpy(normalised)[:, None].contiguous(memory_format=layout)
        batches.append((tensor, torch.from_numpy(labels[mine].astype(np.int64))))
    return batches


def augment(images, names, random):
    """Random crop of the zero-padded image and horizontal flip, on (N, H, W) bytes."""
    count, height, width = images.shape
    for entry in names:
        kind, keys = (entry, {}) if isinstance(entry, str) else (entry["type"], entry)
        if kind == "random_crop":
            pad = keys.get("padding", 4)
            padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))
            top, left = random.integers(0, 2 * pad + 1, (2, count))
            rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)
            images = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
        elif kind == "horizontal_flip":
            images = np.where(random.random(count)[:, None, None] < 0.5, images[:, :, ::-1], images)
    return images


def read_idx(path):
    """An idx file of bytes, plain or .gz: two zero bytes, the type 8, the number of dimensions, the dimensions."""
    raw = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    assert raw[:3] == b"\0\0\x08", f"{path} is not an idx file of bytes"
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


if __name__ == "__main__":
    main()
