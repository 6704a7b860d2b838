"""What the PyTorch side of a comparison is made of: ranks as processes of one core, and net and optimizer read from our
TOML, so that the two sides cannot drift apart."""

import os
import socket

import torch
import torch.multiprocessing as mp
from torch import nn


def start_ranks(train, ranks, *args):
    """Calls train(rank, *args, barrier) in a process for each rank; they can meet at the barrier."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
    # One core a rank, as on our side; set before the ranks import anything that starts threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(train, args=(*args, mp.get_context("spawn").Barrier(ranks)), nprocs=ranks)


def pin(rank, ranks):
    """One thread, on a core of its own where there are enough."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= ranks:
        os.sched_setaffinity(0, {cores[rank]})


def build(model):
    """The chain of [[model.layers]] as nn.Sequential."""
    height, width, channels = model["input"]
    shape = torch.zeros(1, channels, height, width)
    net = nn.Sequential()
    for entry in model["layers"]:
        assert "from" not in entry, "only a chain of layers is understood here"
        layer = make(entry, shape.shape[1]).eval()
        shape = layer(shape)
        net.append(layer)
        if "activation" in entry:
            assert entry["activation"] == "relu", entry
            net.append(nn.ReLU(inplace=True))
    return net.train()


def make(entry, channels):
    """One layer for an input of so many channels (for a vector: values)."""
    kind = entry["type"]
    if kind == "conv2d":
        return conv2d(entry, channels)
    if kind == "linear":
        return initialised(entry, nn.Linear(channels, entry["units"], bias=entry.get("bias", True)))
    if kind == "batch_norm":
        return nn.BatchNorm2d(channels, eps=entry.get("epsilon", 1e-5), momentum=entry.get("momentum", 0.1))
    if kind == "max_pool":
        return nn.MaxPool2d(entry["size"], entry.get("stride", entry["size"]))
    if kind == "lrn":
        size, alpha = 2 * entry.get("depth_radius", 5) + 1, entry.get("alpha", 1e-4)
        return nn.LocalResponseNorm(size, size * alpha, entry.get("beta", 0.75), entry.get("bias", 2.0))
    if kind == "global_avg_pool":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if kind == "dropout":
        return nn.Dropout(entry.get("rate", 0.5))
    return {"relu": nn.ReLU(inplace=True), "flatten": nn.Flatten()}[kind]


def conv2d(entry, channels):
    kernel, padding = entry["kernel"], entry.get("padding", "valid")
    assert padding != "same" or entry.get("stride", 1) == 1, 'PyTorch has no strided "same"'
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
    return initialised(entry, layer)


def initialised(entry, layer):
    init = entry.get("init", "he_normal")
    if init == "normal":
        nn.init.normal_(layer.weight, std=0.01)
    else:
        assert init == "he_normal", entry
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.constant_(layer.bias, entry.get("bias_init", 0.0))
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
