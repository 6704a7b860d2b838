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
import socket
import statistics
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with the idx files (default: [data] path)")
    parser.add_argument("-n", "--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="timed steps")
    parser.add_argument("--warmup", type=int, default=30, help="steps before the timed ones")
    parser.add_argument("--nchw", action="store_true", help="PyTorch's own layout instead of channels_last")
    args = parser.parse_args()

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
    # One core a rank, as on our side; set before the ranks import anything that starts threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(train, args=(args,), nprocs=args.ranks)


def train(rank, args):
    torch.set_num_threads(1)
    if len(os.sched_getaffinity(0)) >= args.ranks:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
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
            dist.barrier()
            start = time.perf_counter()
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(ddp(images), labels)
        loss.backward()
        optimizer.step()
        step_ms.append(1e3 * (time.perf_counter() - began))
    dist.barrier()
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
    dist.barrier()
    # Gloo's threads can abort while the interpreter takes itself apart; the work is done.
    os._exit(0)


def build(model):
    """The chain of [[model.layers]] as nn.Sequential, parameters named as in our checkpoints where a layer has a name."""
    height, width, channels = model["input"]
    shape = torch.zeros(1, channels, height, width)
    net = nn.Sequential()
    for number, entry in enumerate(model["layers"]):
        kind = entry["type"]
        assert "from" not in entry, "only a chain of layers is understood here"
        if kind == "conv2d":
            layer = conv2d(entry, shape.shape[1])
        elif kind == "batch_norm":
            layer = nn.BatchNorm2d(shape.shape[1], eps=entry.get("epsilon", 1e-5), momentum=entry.get("momentum", 0.1))
        elif kind == "max_pool":
            layer = nn.MaxPool2d(entry["size"], entry.get("stride", entry["size"]))
        elif kind == "global_avg_pool":
            layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        elif kind == "linear":
            layer = nn.Linear(shape.shape[1], entry["units"], bias=entry.get("bias", True))
        elif kind == "dropout":
            layer = nn.Dropout(entry["rate"])
        else:
            layer = {"relu": nn.ReLU(inplace=True), "flatten": nn.Flatten()}[kind]
        net.add_module(entry.get("name", f"{kind}_{number}"), layer)
        if "activation" in entry:
            assert entry["activation"] == "relu", entry
            net.add_module(f"relu_{number}", nn.ReLU(inplace=True))
        shape = layer.eval()(shape)
    return net.train()


def conv2d(entry, channels):
    kernel, padding = entry["kernel"], entry.get("padding", "valid")
    assert padding != "same" or entry.get("stride", 1) == 1, "PyTorch has no strided \"same\""
    if padding in ("same", "valid"):
        padding = kernel // 2 if padding == "same" else 0
    layer = nn.Conv2d(
        channels,
        entry["filters"],
        kernel,
        entry.get("stride", 1),
        padding,
        groups=entry.get("groups", 1),
        bias=entry.get("bias", True),
    )
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def sgd(net, section):
    assert section["type"] == "sgd", "only sgd is understood here"
    return torch.optim.SGD(
        net.parameters(),
        lr=section["lr"],
        momentum=section.get("momentum", 0.0),
        nesterov=section.get("nesterov", False),
        weight_decay=section.get("weight_decay", 0.0),
        fused=True,
    )


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
