"""A training step in PyTorch on a GPU: eager, captured by hand as a CUDA graph, compiled, or both; and what the GPU can do at best.

    python scripts/peers/gpu_step.py [--device cuda]

Waits for requests, one JSON object a line on stdin, and answers each with one on stdout, so that measurements can take turns
with another program's without a new start of PyTorch. What a request lacks of keys has the defaults below.

    {"do": "step", "config": "configs/alexnet.toml", "mode": "eager", "precision": "bf16", "batch": 512, "steps": 30, "warmup": 10}
    {"do": "peaks", "matrix": 8192, "copy_mib": 2048}
    {"do": "forget"}                        nets and memory of earlier requests

Net, loss and optimizer are those of the TOML. The peer is spared what is not training: one batch of noise lies on the device.
Activations are channels_last, bf16 and fp16 are autocast, fp16 with a loss scaler, the optimizer is the fused one, cuDNN may choose
by timing. Modes: eager, graphed, compiled, compiled and graphed. An answer is {"error": TEXT} where something failed; the next request
is answered all the same.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
import tomllib
from pathlib import Path

import torch
from torch import nn

from torch_net import build, sgd

# By what asked for it: a function that takes a step, and the number of parameters. Kept until `forget`, since compiling takes minutes.
steps_made = {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    # Whatever else prints, Inductor for one, prints elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.backends.cudnn.benchmark = True
    for line in sys.stdin:
        try:
            answer = answer_to(json.loads(line), device)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def answer_to(request, device):
    work = {"step": measure_step, "peaks": measure_peaks, "forget": forget}[request.pop("do")]
    return work(device=device, **request) | {"peer": f"PyTorch {torch.__version__}"}


def measure_step(device, config, mode="eager", precision="bf16", batch=512, steps=30, warmup=10):
    """Samples a second over the timed steps, which are waited for at their end alone, and the peak of device memory since all
    was forgotten."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    key = (config, mode, precision, batch)
    if key not in steps_made:
        steps_made[key] = training_step(device, tomllib.loads(Path(config).read_text()), mode, precision, batch)
    step, parameters = steps_made[key]
    for _ in range(warmup):
        loss = step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    synchronize(device)
    seconds = time.perf_counter() - start
    assert math.isfinite(loss.item()), "the peer's loss is not finite: the comparison would be void"
    answer = {"samples_per_second": batch * steps / seconds, "step_ms": 1e3 * seconds / steps, "parameters": parameters}
    if device == "cuda":
        answer["allocated_mib"] = torch.cuda.max_memory_allocated() / 2**20
        answer["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return answer


def training_step(device, config, mode, precision, batch):
    """A function that takes one step and returns the loss, and the number of parameters."""
    graphed = mode.endswith("graphed")
    assert device == "cuda" or not graphed, "a CUDA graph needs a GPU"
    torch.manual_seed(config["run"].get("seed", 0))
    net = build(config["model"]).to(device, memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in net.parameters())
    # Noise teaches nothing: a low rate keeps the loss finite and costs the same.
    optimizer = sgd(net, config["optimizer"] | {"lr": 1e-4})
    loss_of = nn.CrossEntropyLoss(label_smoothing=config["loss"].get("label_smoothing", 0.0))
    height, width, channels = config["model"]["input"]
    images = torch.randn(batch, channels, height, width, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % config["model"]["layers"][-1]["units"]
    # By itself max-autotune makes CUDA graphs of forward and of backward; where the whole step becomes one, it must not.
    tuned = {"compiled": "max-autotune", "compiled and graphed": "max-autotune-no-cudagraphs"}.get(mode)
    forward = torch.compile(net, mode=tuned) if tuned else net
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    # A scale that does not overflow at once: were the first update skipped, the fused optimizer's momentum would begin as the
    # memory was left.
    scaler = torch.amp.GradScaler(device, init_scale=256.0, enabled=precision == "fp16")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=precision in ("bf16", "fp16"), cache_enabled=not graphed):
            loss = loss_of(forward(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return (captured(step) if graphed else step), parameters


def captured(step):
    """The whole step as one CUDA graph, as PyTorch's notes on CUDA do it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss

    return replay


def measure_peaks(device, matrix=8192, copy_mib=2048, repetitions=20):
    """Medians: a product of square bf16 matrices in TFLOP/s, copies on the device (bytes read and written) and over the bus in
    GB/s."""
    left, right = (torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(device, repetitions, lambda: left @ right)
    values = torch.randn(copy_mib * 2**18, device=device)
    copy = torch.empty_like(values)
    host = torch.randn(copy_mib * 2**18, pin_memory=device == "cuda")
    size = copy_mib * 2**20
    return {
        "tflop_s": 2 * matrix**3 / product / 1e12,
        "copy_gb_s": 2 * size / timed(device, repetitions, lambda: copy.copy_(values)) / 1e9,
        "to_device_gb_s": size / timed(device, repetitions, lambda: copy.copy_(host, non_blocking=True)) / 1e9,
        "to_host_gb_s": size / timed(device, repetitions, lambda: host.copy_(copy, non_blocking=True)) / 1e9,
    }


def timed(device, repetitions, work):
    """The median of the seconds that it takes, after three times untimed."""
    seconds = []
    for repetition in range(3 + repetitions):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def forget(device):
    steps_made.clear()
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {}


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
