#!/usr/bin/env python3
"""Writes tests/oracles/layers.safetensors and tests/oracles/losses.safetensors: what PyTorch says that every layer and
every loss computes, forward and backward.

    python scripts/oracles/layers.py           (needs torch and safetensors)

PyTorch computes in f64 from inputs that f32 holds exactly; the files hold f32. Activations are NHWC, parameters in the
canonical layout of checkpoints (which is PyTorch's). Keys of layers.safetensors:

    CASE.input.I, CASE.grad_input.I             every input and the gradient by it
    CASE.output, CASE.grad_output               what comes out, and the gradient that comes back
    CASE.param.NAME, CASE.grad_param.NAME       parameters and their gradients (none for running statistics)
    CASE.after.NAME                             a running statistic after one step of training

Its metadata maps every CASE to JSON: type and keys (TOML) of the layer, inputs ([H, W, C] each), batch, training.

Keys of losses.safetensors, whose metadata maps every CASE to JSON: loss (TOML), weights (a list or null):

    outputs (N, K), labels (N), as floats       common to all cases
    CASE.loss (1), CASE.grad (N, K)             the mean over samples, and its gradient
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parents[2] / "tests/oracles"
ACTIVATIONS = {"relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def main():
    torch.manual_seed(2)
    FOLDER.mkdir(exist_ok=True)
    for name, make in [("layers", layers), ("losses", losses)]:
        tensors, metadata = make()
        tensors = {key: value.detach().float().contiguous() for key, value in tensors.items()}
        path = FOLDER / f"{name}.safetensors"
        save_file(tensors, path, metadata={case: json.dumps(about) for case, about in metadata.items()})
        print(f"{path}: {len(metadata)} cases, {path.stat().st_size} bytes, torch {torch.__version__}")


def layers():
    tensors, metadata = {}, {}

    def case(name, kind, keys, shapes, function, params=None, training=True, batch=2):
        """function(inputs, params) -> output, all NCHW; vectors are (N, C, 1, 1)."""
        inputs = [draw(batch, c, h, w).requires_grad_() for h, w, c in shapes]
        params = {key: value.requires_grad_(not key.startswith("running")) for key, value in (params or {}).items()}
        before = {key: value.detach().clone() for key, value in params.items()}
        output = function(inputs, params)
        if "activation" in keys:
            output = ACTIVATIONS[keys["activation"]](output)
        metadata[name] = dict(type=kind, keys=toml(keys), inputs=shapes, batch=batch, training=training)
        tensors[f"{name}.output"] = nhwc(output)
        tensors.update({f"{name}.input.{i}": nhwc(x) for i, x in enumerate(inputs)})
        tensors.update({f"{name}.param.{key}": value for key, value in before.items()})
        if not training:
            return
        grad_output = draw(*output.shape)
        output.backward(grad_output)
        tensors[f"{name}.grad_output"] = nhwc(grad_output)
        tensors.update({f"{name}.grad_input.{i}": nhwc(x.grad) for i, x in enumerate(inputs)})
        for key, value in params.items():
            if key.startswith("running"):
                tensors[f"{name}.after.{key}"] = value
            else:
                tensors[f"{name}.grad_param.{key}"] = value.grad

    weighted(case)
    pooling(case)
    normalization(case)
    elementwise(case)
    return tensors, metadata


def weighted(case):
    def conv(name, shape, filters, kernel, stride=1, padding=0, groups=1, **keys):
        (h, w, c), (kh, kw) = shape, pair(kernel)
        params = {"weight": scaled(draw(filters, c // groups, kh, kw), c // groups * kh * kw)}
        if keys.get("bias", True):
            params["bias"] = draw(filters)

        def function(x, p):
            padded = F.pad(x[0], zeros((h, w), pair(kernel), stride, padding))
            return F.conv2d(padded, p["weight"], p.get("bias"), stride, groups=groups)

        keys |= dict(filters=filters, kernel=kernel, stride=stride, padding=padding, groups=groups)
        case(name, "conv2d", keys, [shape], function, params)

    conv("conv2d_valid", [6, 5, 3], 4, 3)
    conv("conv2d_1x1", [3, 5, 7], 9, 1)
    conv("conv2d_1x1_stride_2", [5, 4, 6], 8, 1, stride=2)
    conv("conv2d_padded_stride_2", [7, 5, 3], 5, 3, stride=2, padding=1, activation="relu")
    conv("conv2d_same", [5, 6, 4], 17, 3, padding="same")
    conv("conv2d_same_stride_2", [6, 7, 2], 3, 3, stride=2, padding="same")
    conv("conv2d_large_stride", [11, 9, 3], 6, 5, stride=3, padding=2, activation="tanh")
    conv("conv2d_groups", [5, 5, 6], 8, 3, padding=1, groups=2)
    conv("conv2d_depthwise", [4, 5, 8], 8, 3, padding=1, groups=8)
    conv("conv2d_oblong", [4, 6, 3], 4, [1, 3], padding="same")
    conv("conv2d_without_bias", [4, 4, 5], 6, 2, bias=False)
    conv("conv2d_whole_image", [3, 4, 2], 5, [3, 4], activation="sigmoid")

    def linear(name, c, outputs, **keys):
        params = {"weight": scaled(draw(outputs, c), c)}
        if keys.get("bias", True):
            params["bias"] = draw(outputs)

        def function(x, p):
            return image(F.linear(x[0].flatten(1), p["weight"], p.get("bias")))

        case(name, "linear", keys | dict(units=outputs), [[1, 1, c]], function, params, batch=3)

    linear("linear", 11, 7)
    linear("linear_relu", 37, 18, activation="relu")
    linear("linear_single", 5, 1, activation="tanh")
    linear("linear_without_bias", 8, 10, bias=False)


def pooling(case):
    def pool(name, kind, shape, size, stride=None, padding=0):
        h, w, _ = shape
        step = stride or size
        around = zeros((h, w), (size, size), step, padding)

        def function(x, _):
            if kind == "max_pool":
                return F.max_pool2d(F.pad(x[0], around, value=-torch.inf), size, step)
            return F.avg_pool2d(F.pad(x[0], around), size, step)

        keys = dict(size=size, padding=padding) | ({"stride": stride} if stride else {})
        case(name, kind, keys, [shape], function)

    for kind in ["max_pool", "avg_pool"]:
        pool(f"{kind}_2", kind, [6, 4, 5], 2)
        pool(f"{kind}_remainder", kind, [7, 5, 3], 2)
        pool(f"{kind}_overlapping", kind, [7, 9, 17], 3, stride=2)
        pool(f"{kind}_padded", kind, [6, 5, 4], 3, stride=2, padding=1)
        pool(f"{kind}_same", kind, [6, 5, 4], 3, stride=2, padding="same")
        pool(f"{kind}_gaps", kind, [8, 8, 3], 2, stride=3)
    case("global_avg_pool", "global_avg_pool", {}, [[5, 3, 33]], lambda x, _: F.adaptive_avg_pool2d(x[0], 1))
    case("global_max_pool", "global_max_pool", {}, [[5, 3, 6]], lambda x, _: F.adaptive_max_pool2d(x[0], 1))


def normalization(case):
    def lrn(name, shape, depth_radius=5, bias=2.0, alpha=1e-4, beta=0.75):
        size = 2 * depth_radius + 1
        keys = dict(depth_radius=depth_radius, bias=bias, alpha=alpha, beta=beta)
        case(name, "lrn", keys, [shape], lambda x, _: F.local_response_norm(x[0], size, alpha * size, beta, bias))

    lrn("lrn_alexnet", [3, 2, 14])
    lrn("lrn_strong", [2, 3, 9], depth_radius=2, bias=1.0, alpha=0.5)
    lrn("lrn_across_blocks", [1, 2, 300], depth_radius=4, alpha=0.2)
    lrn("lrn_power", [2, 2, 7], depth_radius=1, alpha=0.3, beta=0.6)

    def batch_norm(name, shape, training=True, momentum=0.1, epsilon=1e-5, **keys):
        c = shape[2]
        params = {
            "weight": rounded(1 + 0.5 * draw(c)),
            "bias": draw(c),
            "running_mean": draw(c),
            "running_var": rounded(0.5 + draw(c).abs()),
        }

        def function(x, p):
            mean, var = p["running_mean"], p["running_var"]
            return F.batch_norm(x[0], mean, var, p["weight"], p["bias"], training, momentum, epsilon)

        keys |= dict(momentum=momentum, epsilon=epsilon)
        case(name, "batch_norm", keys, [shape], function, params, training, batch=3)

    batch_norm("batch_norm", [4, 3, 5])
    batch_norm("batch_norm_relu", [3, 3, 18], activation="relu")
    batch_norm("batch_norm_keys", [2, 3, 4], momentum=0.25, epsilon=0.01, activation="sigmoid")
    batch_norm("batch_norm_vector", [1, 1, 6])
    batch_norm("batch_norm_evaluation", [3, 2, 5], training=False, activation="relu")


def elementwise(case):
    for kind, function in ACTIVATIONS.items():
        case(kind, kind, {}, [[3, 4, 5]], lambda x, _, function=function: function(x[0]))
    case("softmax", "softmax", {}, [[1, 1, 10]], lambda x, _: F.softmax(x[0], dim=1))
    case("softmax_image", "softmax", {}, [[2, 3, 4]], lambda x, _: F.softmax(x[0], dim=1))
    case("flatten", "flatten", {}, [[3, 4, 5]], lambda x, _: image(x[0].flatten(1)))
    case("dropout_none", "dropout", {"rate": 0.0}, [[2, 3, 4]], lambda x, _: F.dropout(x[0], 0.0))
    case("dropout_evaluation", "dropout", {"rate": 0.4}, [[2, 3, 4]], lambda x, _: x[0].clone(), training=False)
    case("add", "add", {}, [[3, 2, 4]] * 2, lambda x, _: x[0] + x[1])
    case("add_three_relu", "add", {"activation": "relu"}, [[3, 2, 4]] * 3, lambda x, _: x[0] + x[1] + x[2])
    case("concat", "concat", {}, [[3, 2, 4], [3, 2, 1], [3, 2, 6]], lambda x, _: torch.cat(x, dim=1))


def losses():
    n, k = 6, 5
    outputs, labels = 2 * draw(n, k), torch.tensor([3, 0, 4, 4, 1, 2])
    weights = rounded(draw(k).abs() + 0.25)
    tensors, metadata = {"outputs": outputs, "labels": labels}, {}

    def case(name, keys, function, weights=None):
        x = outputs.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        tensors.update({f"{name}.loss": loss.reshape(1), f"{name}.grad": x.grad})
        metadata[name] = dict(loss=toml(keys), weights=weights.tolist() if weights is not None else None)

    def cross_entropy(name, label_smoothing=0.0, weights=None):
        # The mean is over samples; PyTorch's own mean would divide by the sum of the batch's weights.
        def function(x):
            rows = F.cross_entropy(x, labels, weights, label_smoothing=label_smoothing, reduction="none")
            return rows.mean()

        case(name, dict(type="softmax_cross_entropy", label_smoothing=label_smoothing), function, weights)

    cross_entropy("cross_entropy")
    cross_entropy("cross_entropy_smoothed", 0.1)
    cross_entropy("cross_entropy_weighted", weights=weights)
    cross_entropy("cross_entropy_smoothed_weighted", 0.2, weights)
    one_hot = F.one_hot(labels, k).double()
    case("mse", dict(type="mse"), lambda x: F.mse_loss(x, one_hot))
    for name, smoothing in [("kl_divergence", 0.0), ("kl_divergence_smoothed", 0.3)]:
        target = (1 - smoothing) * one_hot + smoothing / k
        keys = dict(type="kl_divergence", label_smoothing=smoothing)
        case(name, keys, lambda x, t=target: F.kl_div(F.log_softmax(x, dim=1), t, reduction="batchmean"))
    return tensors, metadata


def draw(*shape):
    """Normal values that f32 holds exactly, as f64."""
    return torch.randn(*shape).double()


def rounded(x):
    return x.float().double()


def scaled(weight, fan_in):
    """As He's initialisation scales it, so that outputs are about as large as inputs."""
    return rounded(weight * (2 / fan_in) ** 0.5)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def image(x):
    """A vector (N, C) as the image that it is here."""
    return x[:, :, None, None]


def pair(value):
    return tuple(value) if isinstance(value, list) else (value, value)


def zeros(image_size, kernel, stride, padding):
    """(left, right, top, bottom), as F.pad wants it."""
    around = []
    for length, size in zip(image_size, kernel):
        if padding == "same":
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            around.append((total // 2, total - total // 2))
        else:
            around.append((padding, padding))
    (top, bottom), (left, right) = around
    return left, right, top, bottom


def toml(keys):
    """JSON's strings, numbers, booleans and lists are TOML's."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())


if __name__ == "__main__":
    main()
