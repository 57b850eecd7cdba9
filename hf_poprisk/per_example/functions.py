"""The operations whose backward hands the examples' gradients to a ``Capture``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


def _node(param: Tensor | None) -> Any:
    """Where the parameter's gradient arrives in the graph."""
    needed = param is not None and param.requires_grad
    return torch.autograd.graph.get_gradient_edge(param).node if needed else None


def _wanted(node: Any) -> bool:
    """Whether this backward is after the parameter's gradient: ``autograd.grad`` in a loss is not."""
    return node is not None and torch._C._will_engine_execute_node(node)


class Linear(Function):
    """``F.linear`` with a captured weight, [out, in] or (Conv1D) [in, out]; x is [rows, …, in]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, capture: Any, transposed: bool
    ) -> Tensor:
        y = F.linear(x, weight.T if transposed else weight, bias)
        ctx.weight, ctx.bias, ctx.capture, ctx.transposed = weight, bias, capture, transposed
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
                weight = ctx.weight.to(d.dtype)
                grad_x = (d @ (weight.T if ctx.transposed else weight)).to(ctx.input_dtype)
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            d = d.reshape(d.shape[0], -1, d.shape[-1])
            if _wanted(ctx.nodes[0]):
                grad_weight = ctx.capture.dense(ctx.weight, *((d, x) if ctx.transposed else (x, d)))
            if _wanted(ctx.nodes[1]):
                captured = ctx.capture.captures(ctx.bias)
                grad_bias = (
                    ctx.capture.elementwise(ctx.bias, d) if captured else d.sum((0, 1)).to(ctx.bias.dtype)
                )
        return grad_x, grad_weight, grad_bias, None, None


class Embedding(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, capture: Any) -> Tensor:
        ctx.weight, ctx.padding, ctx.capture, ctx.node = weight, padding, capture, _node(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        if not _wanted(ctx.node):
            return None, None, None, None
        return ctx.capture.embedding(ctx.weight, ids, d, ctx.padding), None, None, None


class PerRow(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Any, dims: int) -> Tensor:
        ctx.param, ctx.capture, ctx.node = param, capture, _node(param)
        return capture.layout.copies(param, dims)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if not _wanted(ctx.node):
            return None, None, None
        return ctx.capture.elementwise(ctx.param, d), None, None


class PerExample(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Any, example: int) -> Tensor:
        ctx.param, ctx.capture, ctx.example, ctx.node = param, capture, example, _node(param)
        return param.view_as(param)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if _wanted(ctx.node):
            ctx.capture.whole(ctx.param, ctx.example, d)
        return d, None, None
