"""The input path that PyTorch's users have by default: torchvision's ImageFolder-like reading with PIL, RandomResizedCrop,
flip, ToTensor and Normalize, in one worker process of a DataLoader. Prints one JSON line.

    input_pil.py FOLDER [SIDE [SECONDS]]

A pass over the folder warms up; then whole passes are timed until SECONDS are over, by the clock and by the CPU time of the
worker. The worker is the bottleneck by far: the main process only counts.
"""

import json
import os
import pathlib
import sys
import time

import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms

folder = pathlib.Path(sys.argv[1])
side = int(sys.argv[2]) if len(sys.argv) > 2 else 224
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 5.0


class Images(torch.utils.data.Dataset):
    def __init__(self):
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        # As torchvision.datasets.folder.pil_loader does it.
        with open(self.files[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), 0


def cpu_seconds(process):
    """User and system time: fields 14 and 15 of its stat, counted from behind the name in brackets."""
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    torch.set_num_threads(1)
    # One worker that lives on, batches of 32, as a training script has it.
    loader = torch.utils.data.DataLoader(Images(), batch_size=32, shuffle=True, num_workers=1, persistent_workers=True)
    for _ in loader:
        pass
    worker = torch.multiprocessing.active_children()[0].pid
    start, cpu, images = time.perf_counter(), cpu_seconds(worker), 0
    while time.perf_counter() - start < seconds:
        for batch, _ in loader:
            images += len(batch)
    rate, cpu_rate = images / (time.perf_counter() - start), images / (cpu_seconds(worker) - cpu)
    peer = f"torchvision {torchvision.__version__}, PIL {PIL.__version__}"
    print(json.dumps({"peer": peer, "images_per_second": rate, "images_per_cpu_second": cpu_rate}))


if __name__ == "__main__":
    main()
