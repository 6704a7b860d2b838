#!/usr/bin/env python3
"""Checks that weights of configs/alexnet-owt.toml are torchvision's AlexNet's, there and back.

    cargo build --release && python scripts/alexnet_torchvision.py [--checkpoint PATH]

Needs torch and safetensors; without torchvision, its model is built here from the same layers. On the same images

  1. torchvision's model, freshly initialised and saved by safetensors, is evaluated by `trainer eval`;
  2. a checkpoint of ours (PATH, or one made here by a step of training) is loaded into torchvision's model;

and both times the logits of the two programs must be equal to within TOLERANCE of the largest. Prints the differences;
exits with 1 if one is too large. In a program of your own, loading a checkpoint takes two lines:

    tensors = safetensors.torch.load_file("runs/alexnet-owt/checkpoints/step-00000100.safetensors")
    torchvision.models.alexnet().load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})

and giving weights to `trainer eval --checkpoint weights.safetensors` one:

    safetensors.torch.save_file(torchvision.models.alexnet(weights="DEFAULT").state_dict(), "weights.safetensors")
"""

import argparse
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = Path(__file__).parents[1] / "configs/alexnet-owt.toml"
SIDE, IMAGES = 224, 12
# Of the logits, relative to the largest: sums of 9,216 products in another order.
TOLERANCE = 1e-4
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of configs/alexnet-owt.toml (default: one is made)")
    parser.add_argument("--trainer", default="target/release/trainer")
    args = parser.parse_args()

    torch.manual_seed(1)
    net = alexnet().eval()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images = make_images(folder / "data")
        save_file(net.state_dict(), folder / "torchvision.safetensors")
        there = compare("torchvision -> trainer", net, images, evaluate(args, folder, folder / "torchvision.safetensors"))

        checkpoint = args.checkpoint or train(args, folder)
        tensors = load_file(checkpoint)
        net.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")})
        back = compare("trainer -> torchvision", net, images, evaluate(args, folder, checkpoint))
    sys.exit(0 if there and back else 1)


def alexnet():
    try:
        from torchvision.models import alexnet
    except ImportError:
        return SameNet()
    return alexnet(weights=None)


class SameNet(nn.Module):
    """torchvision.models.AlexNet for 224 x 224, with its names."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *[nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)],
            *[nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)],
            *[nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
            *[nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
            *[nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)],
        )
        self.classifier = nn.Sequential(
            *[nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU()],
            *[nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()],
            nn.Linear(4096, 1000),
        )

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


def make_images(folder):
    """Writes images of noise, a class each, in the order of the classes, which then are training set and test set. Returns
    them as the net sees them: (IMAGES, 3, SIDE, SIDE)."""
    pixels = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=torch.uint8)
    for number in range(IMAGES):
        write_png(folder / f"{number:02}" / "0.png", pixels[number])
    return ((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def write_png(path, pixels):
    """(H, W, 3) bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    path.parent.mkdir(parents=True)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def train(args, folder):
    """A checkpoint after one step."""
    run = folder / "run"
    trainer(args, folder, "--out", run, "--set", "run.steps=1", "--set", "batch.local=8", "--set", "schedule.warmup_epochs=0")
    return next((run / "checkpoints").iterdir())


def evaluate(args, folder, checkpoint):
    """Our logits for the test images."""
    path = folder / "logits.safetensors"
    trainer(args, folder, "--set", "batch.local=8", "--checkpoint", checkpoint, "--logits", path, command="eval")
    return load_file(path)["logits"]


def trainer(args, folder, *more, command=None):
    augment = f'[{{ type = "resize", shorter = {SIDE} }}, {{ type = "normalize", statistics = "imagenet" }}]'
    words = [args.trainer, *([command] if command else []), "--config", CONFIG, *more]
    words += ["--set", f"data.path={folder / 'data'}", "--set", f"data.augment={augment}"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def compare(what, net, images, ours):
    with torch.inference_mode():
        theirs = net(images)
    largest, difference = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    equal = difference <= TOLERANCE * largest
    print(f"{what}: logits to {largest:.4f}, largest difference {difference:.1e}" + ("" if equal else ": NOT EQUAL"))
    return equal


if __name__ == "__main__":
    main()
