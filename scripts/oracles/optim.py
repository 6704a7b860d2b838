#!/usr/bin/env python3
"""Writes tests/oracles/optim.safetensors: what PyTorch's optimizers do to one tensor in a few steps.

    python scripts/oracles/optim.py            (needs torch and safetensors)

Keys:
    param               (N)         the tensor before the first step
    grads               (STEPS, N)  the gradient of every step
    CASE.params         (STEPS, N)  the tensor after every step
    CASE.state.NAME     (N)         the state after the last step, under PyTorch's name

The file's metadata maps every CASE to its keys as the TOML has them, as JSON: {"type": "sgd", "lr": 0.1, ...}.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file

N, STEPS = 9, 20

CASES = {
    "sgd": dict(type="sgd", lr=0.1),
    "sgd_weight_decay": dict(type="sgd", lr=0.1, weight_decay=0.05),
    "sgd_momentum": dict(type="sgd", lr=0.1, momentum=0.9),
    "sgd_momentum_weight_decay": dict(type="sgd", lr=0.1, momentum=0.9, weight_decay=0.05),
    "sgd_nesterov": dict(type="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": dict(type="adam", lr=0.01),
    "adam_weight_decay": dict(type="adam", lr=0.01, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1),
    "adamw": dict(type="adamw", lr=0.01, weight_decay=0.1),
    "adagrad": dict(type="adagrad", lr=0.05),
    "adagrad_lr_decay": dict(type="adagrad", lr=0.05, lr_decay=0.1, weight_decay=0.05),
    "adadelta": dict(type="adadelta", lr=1.0),
    "adadelta_rho": dict(type="adadelta", lr=0.5, rho=0.8, eps=1e-5, weight_decay=0.05),
}

RULES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}

# What PyTorch keeps beside the moments: a count that Lockstep takes from the step number.
NOT_STATE = {"step"}


def run(case, param, grads):
    keys = dict(case)
    rule = RULES[keys.pop("type")]
    keys.setdefault("weight_decay", 0.0)  # AdamW alone has another default
    value = torch.nn.Parameter(param.clone())
    optimizer = rule([value], **keys)
    after = []
    for grad in grads:
        value.grad = grad.clone()
        optimizer.step()
        after.append(value.detach().clone())
    state = {name: t for name, t in optimizer.state[value].items() if name not in NOT_STATE and t is not None}
    return torch.stack(after), state


def main():
    torch.manual_seed(1)
    param, grads = torch.randn(N), torch.randn(STEPS, N)
    grads[1, 0] = 0.0  # a value without a gradient still decays and keeps its momentum
    tensors = {"param": param, "grads": grads}
    for name, case in CASES.items():
        tensors[f"{name}.params"], state = run(case, param, grads)
        tensors |= {f"{name}.state.{key}": value.clone() for key, value in state.items()}
    path = pathlib.Path(__file__).parents[2] / "tests/oracles/optim.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={name: json.dumps(case) for name, case in CASES.items()})
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
