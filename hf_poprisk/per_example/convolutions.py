"""Convolutions, whether strided, dilated or in groups, whose per-example gradients are captured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from hf_poprisk.per_example.capture import Capture, _node, _wanted

_OF_AXES = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def convolution(capture: Capture, *args: Any, **kwargs: Any) -> Tensor:
    """``F.conv1d``, ``F.conv2d`` or ``F.conv3d``, by the number of the weight's axes."""
    given = dict.fromkeys(_ARGUMENTS[2:]) | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given["bias"]
    stride, dilation = (_each(given[k] or 1, weight.dim() - 2) for k in ("stride", "dilation"))
    padding, groups = given["padding"] or 0, given["groups"] or 1
    if padding == "same":
        total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
        x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
    padding = [0] * len(stride) if isinstance(padding, str) else _each(padding, len(stride))
    options = (stride, padding, dilation, groups)
    forward = _OF_AXES[weight.dim()]
    # without an axis of rows the channels would be taken for it
    if x.dim() != weight.dim() or not capture.fits(x, (weight, bias), packed=False):
        return forward(x, weight, bias, *options)
    if not capture.wants(weight):  # frozen or ungated
        y = forward(x, weight, None, *options)
        return y + on_channels(capture.per_row(bias, 2), x.dim()).to(y.dtype)
    for p in (weight, bias):
        if capture.wants(p):
            capture.used(p)
    return Convolution.apply(x, weight, bias, capture, options)


def on_channels(copies: Tensor, dims: int) -> Tensor:
    """[rows, channels] as [rows, channels, 1, …] with ``dims`` axes."""
    return copies.view(*copies.shape, *(1,) * (dims - 2))


def weight_gradients(x: Tensor, d: Tensor, weight: Tensor, options: Sequence[Any], n: int) -> Tensor:
    """Of n examples, whose row j is of example j mod n: [n, *weight.shape].

    One convolution's backward in n times as many groups: an example's channels are a group of their own.
    """
    *geometry, groups = options
    x, d = (t.reshape(-1, n * t.shape[1], *t.shape[2:]) for t in (x, d))
    like = weight.to(d.dtype).repeat(n, *(1,) * (weight.dim() - 1))
    return _backward(d, x, like, [*geometry, n * groups], 1).view(n, *weight.shape)


def _backward(d: Tensor, x: Tensor, weight: Tensor, options: Sequence[Any], which: int) -> Tensor:
    """The gradient of the input (0) or of the weight (1)."""
    *geometry, groups = options
    mask = [which == 0, which == 1, False]
    call = torch.ops.aten.convolution_backward
    return call(d, x, weight, None, *geometry, False, [0] * (x.dim() - 2), groups, mask)[which]


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


class Convolution(Function):
    """With a captured weight, [out, in / groups, …]; x is [rows, in, …]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, capture: Capture, options: Sequence[Any]
    ) -> Tensor:
        y = _OF_AXES[x.dim()](x, weight, bias, *options)
        ctx.weight, ctx.bias, ctx.capture, ctx.options = weight, bias, capture, options
        ctx.input_dtype = x.dtype
        ctx.nodes = _node(weight), _node(bias)
        ctx.save_for_backward(x.to(y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(d.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _backward(d, x, ctx.weight.to(d.dtype), ctx.options, 0).to(ctx.input_dtype)
            if _wanted(ctx.nodes[0]):
                gradients = partial(weight_gradients, weight=ctx.weight, options=ctx.options)
                grad_weight = ctx.capture.convolution(ctx.weight, x, d, gradients)
            if _wanted(ctx.nodes[1]):
                if ctx.bias in ctx.capture.params:
                    grad_bias = ctx.capture.elementwise(ctx.bias, d.flatten(2).transpose(1, 2))
                else:
                    grad_bias = d.transpose(0, 1).flatten(1).sum(1).to(ctx.bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None
