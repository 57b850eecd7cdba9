"""A table of relative positions, as T5 has it: what all rows of a batch add to their attention scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_poprisk.per_example.capture import Capture, _node, _wanted
from hf_poprisk.per_example.layout import Rows

BIASES = ("compute_bias", "compute_position_bias")  # methods that look the table up, [1, heads, …]


def run_bias(method: str) -> Callable[..., Tensor]:
    """Relative positions: what all rows add to their scores, [1, heads, …], as one copy per row."""

    def run(module: Any, capture: Capture, *args: Any, **kwargs: Any) -> Tensor:
        table, weight = module.relative_attention_bias, module.relative_attention_bias.weight
        if not capture.wants(weight) or not isinstance(capture.layout, Rows):
            return getattr(type(module), method)(module, *args, **kwargs)
        leaf = weight.detach().requires_grad_()
        try:
            table._parameters["weight"] = leaf
            bias = getattr(type(module), method)(module, *args, **kwargs)[:1]  # some give the rows' copies
        finally:
            table._parameters["weight"] = weight
        capture.used(weight)
        return Shared.apply(weight, capture, (leaf, bias))

    return run


class Shared(Function):
    """What was made of a copy of a parameter, [1, …], once for all rows: as one copy per row."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Capture, made: tuple[Tensor, Tensor]) -> Tensor:
        ctx.param, ctx.capture, ctx.made, ctx.node = param, capture, made, _node(param)
        return made[1].detach().expand(capture.layout.num_rows, *made[1].shape[1:])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if not _wanted(ctx.node):
            return None, None, None
        (leaf, made), n = ctx.made, ctx.capture.num_examples
        slopes = [d[i::n].sum(0, keepdim=True) for i in range(n)]
        h = [torch.autograd.grad(made, leaf, slope, retain_graph=True)[0] for slope in slopes]
        return ctx.capture.elementwise(ctx.param, torch.stack(h)), None, None
