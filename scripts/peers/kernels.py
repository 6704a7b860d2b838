"""The layers of benches/kernels.rs in PyTorch: the same names, batches and products, one thread, channels-last.

    python scripts/peers/kernels.py [NAME...]

Each time is the least of many calls within a fifth of a second, of this thread's CPU time. `weight` is backward without the gradient of the
input. Gradients come from `torch.autograd.grad`, which writes them anew in each call, as our layers do.
"""

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)
torch.manual_seed(1)


def conv(channels, filters, kernel, relu=True, **keys):
    layer = nn.Conv2d(channels, filters, kernel, **keys)
    return nn.Sequential(layer, nn.ReLU(inplace=True)) if relu else layer


def linear(inputs, units, relu=True):
    return nn.Sequential(nn.Linear(inputs, units), nn.ReLU(inplace=True)) if relu else nn.Linear(inputs, units)


class Add(nn.Module):
    def forward(self, a, b):
        return a + b


# name: (batches, number of inputs, (side, channels), layer)
LAYERS = {
    "fashion1": ([64], 1, (28, 1), conv(1, 32, 3, relu=False, padding=1)),
    "fashion2": ([64], 1, (28, 32), conv(32, 32, 3, relu=False, padding=1)),
    "fashion3": ([64], 1, (14, 32), conv(32, 64, 3, relu=False, padding=1)),
    "fashion4": ([64], 1, (14, 64), conv(64, 64, 3, relu=False, padding=1)),
    "fashion5": ([64], 1, (7, 64), conv(64, 128, 3, relu=False, padding=1)),
    "fashion6": ([64], 1, (1, 3136), linear(3136, 128, relu=False)),
    "fashion7": ([64], 1, (1, 128), linear(128, 10, relu=False)),
    "depthwise": ([64], 1, (14, 64), conv(64, 64, 3, relu=False, padding=1, groups=64)),
    "conv1": ([32], 1, (227, 3), conv(3, 96, 11, stride=4)),
    "conv2": ([32], 1, (27, 96), conv(96, 256, 5, padding=2)),
    "conv3": ([32], 1, (13, 256), conv(256, 384, 3, padding=1)),
    "conv4": ([32], 1, (13, 384), conv(384, 384, 3, padding=1)),
    "conv5": ([32], 1, (13, 384), conv(384, 256, 3, padding=1)),
    "pool1": ([32, 128], 1, (55, 96), nn.MaxPool2d(3, 2)),
    "pool2": ([32, 128], 1, (27, 256), nn.MaxPool2d(3, 2)),
    "pool5": ([32, 128], 1, (13, 256), nn.MaxPool2d(3, 2)),
    "lrn1": ([32, 128], 1, (27, 96), nn.LocalResponseNorm(11, alpha=11e-4, k=2.0)),
    "lrn2": ([32, 128], 1, (13, 256), nn.LocalResponseNorm(11, alpha=11e-4, k=2.0)),
    "flatten": ([32, 128], 1, (6, 256), nn.Flatten()),
    "dropout6": ([32, 128], 1, (1, 4096), nn.Dropout()),
    "fc6": ([32, 128], 1, (1, 9216), linear(9216, 4096)),
    "fc7": ([32, 128], 1, (1, 4096), linear(4096, 4096)),
    "fc8": ([32, 128], 1, (1, 4096), linear(4096, 1000, relu=False)),
    "avg_pool": ([32], 1, (27, 256), nn.AvgPool2d(3, 2)),
    "relu": ([32], 1, (27, 256), nn.ReLU()),
    "sigmoid": ([32], 1, (27, 256), nn.Sigmoid()),
    "tanh": ([32], 1, (27, 256), nn.Tanh()),
    "dropout": ([32], 1, (27, 256), nn.Dropout()),
    "add": ([32], 2, (27, 256), Add()),
    "add_relu": ([32], 2, (27, 256), nn.Sequential(Add(), nn.ReLU(inplace=True))),
    "batchnorm": ([32], 1, (27, 256), nn.Sequential(nn.BatchNorm2d(256), nn.ReLU(inplace=True))),
}
# name: (M, K, N)
PRODUCTS = {
    "winograd3": (512, 256, 384),
    "winograd4": (512, 384, 384),
    "winograd5": (512, 384, 256),
    "square": (768, 768, 768),
}


def main():
    names = sys.argv[1:]

    def is_chosen(case):
        return not names or any(case.startswith(name) for name in names)

    print(f"{'layer':10} {'batch':>6} {'product':9} {'ms':>10}")
    for name, (batches, inputs, sizes, layer) in LAYERS.items():
        for batch in batches if is_chosen(name) else []:
            run_layer(name, batch, inputs, sizes, layer)
    for name, (m, k, n) in PRODUCTS.items():
        if is_chosen(name):
            a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
            report(name, m, "product", least(lambda: torch.mm(a, b, out=c)))
    for batch in [32, 128] if is_chosen("loss") else []:
        run_loss(batch)


def report(name, batch, product, seconds):
    print(f"{name:10} {batch:6} {product:9} {seconds * 1e3:10.4f}", flush=True)


def run_layer(name, batch, inputs, sizes, layer):
    side, channels = sizes
    layer = layer.to(memory_format=torch.channels_last)
    shape = (batch, channels) if side == 1 else (batch, channels, side, side)

    def tensor():
        values = torch.rand(shape) * 2 - 1
        return values if side == 1 else values.contiguous(memory_format=torch.channels_last)

    call = layer if inputs == 1 else lambda *x: layer[1](layer[0](*x)) if isinstance(layer, nn.Sequential) else layer(*x)
    x = [tensor() for _ in range(inputs)]
    params = list(layer.parameters())
    # Of a call whose graph is built, as in training.
    for tensor in [] if params else x:
        tensor.requires_grad_()
    report(name, batch, "forward", least(lambda: call(*x)))
    for product, wanted in [("weight", params)] * bool(params) + [("backward", params + x)]:
        for tensor in x:
            tensor.requires_grad_(product == "backward")
        y = call(*x)
        dy = torch.rand_like(y) * 2 - 1
        report(name, batch, product, least(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)))


def run_loss(batch):
    outputs = (torch.rand(batch, 1000) * 2 - 1).requires_grad_()
    labels = torch.arange(batch) * 37 % 1000
    report("loss", batch, "both", least(lambda: torch.autograd.grad(F.cross_entropy(outputs, labels), outputs)))


def least(call):
    call()
    start, best = time.thread_time(), float("inf")
    while time.thread_time() - start < 0.2:
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    return best


main()
