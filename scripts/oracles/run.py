#!/usr/bin/env python3
"""Writes tests/oracles/run.safetensors: the first 20 steps of two small nets in PyTorch, f32 on one CPU thread.

    python scripts/oracles/run.py            (needs torch and safetensors)

Keys:
    images               (STEPS, BATCH, H, W, C)  bytes; the net's input is image / 128 - 1, exact in f32
    labels               (STEPS, BATCH)           i32
    CASE.initial.NAME                             parameters and running statistics before the first step
    CASE.final.NAME                               the same after the last step
    CASE.losses          (STEPS)                  mean cross-entropy of each step's batch

NAME and shape are those of our checkpoints, which are PyTorch's. The file's metadata holds "cases", JSON that maps every
CASE to {"input": [H, W, C], "layers": [...], "optimizer": {...}} as the TOML has them.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

STEPS, BATCH, H, W, C, CLASSES = 20, 16, 12, 12, 1, 5
OPTIMIZER = dict(type="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)

CASES = {
    "chain": [
        dict(type="conv2d", name="conv1", filters=8, kernel=3, padding=1),
        dict(type="batch_norm", name="bn1"),
        dict(type="relu", name="relu1"),
        dict(type="max_pool", name="pool1", size=2, stride=2),
        dict(type="conv2d", name="conv2", filters=12, kernel=3, stride=2, padding=1, activation="relu"),
        dict(type="flatten", name="flat"),
        dict(type="linear", name="fc", units=CLASSES),
    ],
    "branches": [
        dict(type="conv2d", name="stem", filters=8, kernel=3, padding=1, activation="relu"),
        dict(type="conv2d", name="residual", filters=8, kernel=3, padding=1, bias=False),
        dict(type="batch_norm", name="bn1"),
        dict(type="add", name="sum", **{"from": ["bn1", "stem"]}),
        dict(type="relu", name="relu1"),
        dict(type="max_pool", name="pool1", size=2, stride=2),
        dict(type="conv2d", name="narrow", filters=4, kernel=1, padding=0),
        dict(type="conv2d", name="wide", filters=6, kernel=3, padding=1, **{"from": ["pool1"]}),
        dict(type="concat", name="both", **{"from": ["narrow", "wide"]}),
        dict(type="batch_norm", name="bn2", activation="relu"),
        dict(type="avg_pool", name="pool2", size=2, stride=2),
        dict(type="flatten", name="flat"),
        dict(type="linear", name="fc", units=CLASSES),
    ],
}


class Net(nn.Module):
    """Runs a list of layers as our TOML describes them; NCHW inside."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        before, sample = "input", {"input": torch.zeros(2, C, H, W)}
        for layer in layers:
            inputs = [sample[name] for name in layer.get("from", [before])]
            module = self.module(layer, inputs[0])
            if module is not None:
                self.add_module(layer["name"], module)
            before = layer["name"]
            sample[before] = self.apply_layer(layer, inputs).detach()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()

    def module(self, layer, x):
        if layer["type"] == "conv2d":
            keys = {key: layer[key] for key in ("stride", "padding", "bias") if key in layer}
            return nn.Conv2d(x.shape[1], layer["filters"], layer["kernel"], **keys)
        if layer["type"] == "batch_norm":
            return nn.BatchNorm2d(x.shape[1])
        if layer["type"] == "linear":
            return nn.Linear(x.shape[1], layer["units"])
        return None

    def apply_layer(self, layer, inputs):
        plain = {
            "relu": lambda x: x.relu(),
            "max_pool": lambda x: nn.functional.max_pool2d(x, layer["size"], layer["stride"]),
            "flatten": lambda x: x.flatten(1),
            "avg_pool": lambda x: nn.functional.avg_pool2d(x, layer["size"], layer["stride"]),
            "add": lambda *xs: sum(xs),
            "concat": lambda *xs: torch.cat(xs, 1),
        }
        y = (plain.get(layer["type"]) or getattr(self, layer["name"]))(*inputs)
        return y.relu() if layer.get("activation") == "relu" else y

    def forward(self, images):
        before, outputs = "input", {"input": images}
        for layer in self.layers:
            inputs = [outputs[name] for name in layer.get("from", [before])]
            before = layer["name"]
            outputs[before] = self.apply_layer(layer, inputs)
        return outputs[before]

    def tensors(self):
        return {name: t.clone() for name, t in self.state_dict().items() if not name.endswith("num_batches_tracked")}


def make_data():
    """Noise, and on it for every class a faint square in a place of its own, so that there is something to learn."""
    labels = torch.randint(CLASSES, (STEPS, BATCH))
    images = torch.randint(0, 128, (STEPS, BATCH, H, W, C))
    for step in range(STEPS):
        for sample in range(BATCH):
            corner = 2 * int(labels[step, sample])
            images[step, sample, corner : corner + 4, corner : corner + 4] += 32
    return images.to(torch.uint8), labels.to(torch.int32)


def run(layers, images, labels):
    net = Net(layers)
    initial = net.tensors()
    keys = {key: value for key, value in OPTIMIZER.items() if key != "type"}
    optimizer = torch.optim.SGD(net.parameters(), **keys)
    losses = []
    for x, label in zip(images, labels):
        x = (x.float() / 128 - 1).permute(0, 3, 1, 2)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), label.long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return initial, net.tensors(), torch.tensor(losses)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(2)
    images, labels = make_data()
    tensors = {"images": images, "labels": labels}
    for case, layers in CASES.items():
        initial, final, losses = run(layers, images, labels)
        tensors |= {f"{case}.initial.{name}": t for name, t in initial.items()}
        tensors |= {f"{case}.final.{name}": t for name, t in final.items()}
        tensors[f"{case}.losses"] = losses
        print(f"{case}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    cases = {case: dict(input=[H, W, C], layers=layers, optimizer=OPTIMIZER) for case, layers in CASES.items()}
    path = pathlib.Path(__file__).parents[2] / "tests/oracles/run.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"cases": json.dumps(cases)})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
