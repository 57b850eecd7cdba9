"""The examples' tensors side by side, as a loss expects them, and its slope there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_poprisk.per_example.layout import Layout, Packed


@dataclass
class Slot:
    """A tensor that a module gave: how the examples lie in it, and the loss's slope there."""

    axis: int | None  # None: the examples share it, or it is no function of single ones
    shift: int = 0  # of packed sequences: entries fewer than tokens
    slope: Tensor | None = None


class Joined(Function):
    """The examples' tensors as one, without a graph behind it; backward leaves the slope in the slot."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, slot: Slot, layout: Layout, *parts: Tensor) -> Tensor:
        ctx.slot, ctx.parts = slot, len(parts)
        return joined(parts, slot, layout)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        ctx.slot.slope = slope if ctx.slot.slope is None else ctx.slot.slope + slope
        return (None,) * (3 + ctx.parts)


def joined(parts: Sequence[Tensor], slot: Slot, layout: Layout) -> Tensor:
    axis = slot.axis
    if axis is None:
        return parts[0].clone()
    if isinstance(layout, Packed):
        shape = list(parts[0].shape)
        shape[axis] = layout.num_tokens - slot.shift
        whole = parts[0].new_zeros(shape)
        for span, part in zip(layout.spans(), parts, strict=True):
            whole.narrow(axis, span.start, part.shape[axis]).copy_(part)
        return whole
    per_example = layout.num_rows // layout.num_examples
    chunks = [part.tensor_split(per_example, axis) for part in parts]  # row j is of example j mod N
    return torch.cat([chunk for row in zip(*chunks, strict=True) for chunk in row], axis)


def part_of(slope: Tensor, slot: Slot, layout: Layout, example: int) -> Tensor:
    """An example's part of a slope at joined outputs."""
    axis = slot.axis
    assert axis is not None
    if isinstance(layout, Packed):
        span = layout.spans()[example]
        return slope.narrow(axis, span.start, span.stop - span.start - slot.shift)
    per_example = layout.num_rows // layout.num_examples
    parts = slope.unflatten(axis, (per_example, layout.num_examples, -1))
    return parts.select(axis + 1, example).flatten(axis, axis + 1)


def find(whole: Tensor, one: Tensor, layout: Layout) -> Slot:
    """Where the examples lie in an output, by its shape for all of them and for the first."""
    if whole.dim() == one.dim():
        other = [axis for axis in range(whole.dim()) if whole.shape[axis] != one.shape[axis]]
        if len(other) == 1:
            (axis,) = other
            if isinstance(layout, Packed):
                shift = layout.lengths[0] - one.shape[axis]
                if shift >= 0 and whole.shape[axis] == layout.num_tokens - shift:
                    return Slot(axis, shift)
            elif whole.shape[axis] == layout.num_examples * one.shape[axis]:
                return Slot(axis)
    return Slot(None)
