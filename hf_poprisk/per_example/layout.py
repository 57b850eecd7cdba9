"""Which part of a tensor of a micro-batch belongs to which example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """An example owns whole rows: row j belongs to example j mod N, as TRL lays out preference pairs.

    Args:
        num_examples: N.
        num_rows: the first axis of the micro-batch's tensors, a multiple of N.
    """

    num_examples: int
    num_rows: int

    def __str__(self) -> str:
        return f"the batch has {self.num_rows} rows"

    def of(self, examples: Sequence[int]) -> Rows:
        """Of a micro-batch of some of the examples."""
        return Rows(len(examples), self.num_rows // self.num_examples * len(examples))

    def fits(self, x: Tensor) -> bool:
        """Whether the examples can be seen in ``x``."""
        return x.dim() >= 2 and x.shape[0] == self.num_rows

    def split(self, x: Tensor) -> list[Tensor]:
        """x: [rows, tokens, width]. Returns N tensors [tokens of the example, width]."""
        return [x[i :: self.num_examples].reshape(-1, x.shape[-1]) for i in range(self.num_examples)]

    def owners(self, x: Tensor) -> Tensor:
        """The example of each entry of ``x``, [rows, …] int64 that broadcasts over it."""
        owners = torch.arange(self.num_rows, device=x.device) % self.num_examples
        return owners.view(-1, *(1,) * (x.dim() - 1))

    def copies(self, param: Tensor, dims: int) -> Tensor:
        """An elementwise parameter with one copy per row, [rows, 1, …, *shape] with ``dims`` axes."""
        ones = (1,) * (dims - 1 - param.dim())
        return param.view(1, *ones, *param.shape).expand(self.num_rows, *ones, *param.shape)

    def sums(self, h: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradients of ``copies``, or of them at every token, summed per example: [N, *shape], wide."""
        h = h.reshape(-1, self.num_examples, h[0].numel() // prod(shape), *shape)
        return h.sum((0, 2), dtype=wide(h.dtype))


@dataclass(frozen=True)
class Packed:
    """One row holds the sequences one after the other; a sequence is an example.

    Args:
        lengths: tokens of each sequence; they add up to the length T of the row.
    """

    lengths: tuple[int, ...]

    num_rows = 1

    @property
    def num_examples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def __str__(self) -> str:
        return f"the batch has {self.num_tokens} tokens in one row"

    def of(self, examples: Sequence[int]) -> Packed:
        """Of a micro-batch of some of the examples."""
        return Packed(tuple(self.lengths[i] for i in examples))

    def fits(self, x: Tensor) -> bool:
        return x.dim() >= 2 and x.shape[:2] == (1, self.num_tokens)

    def spans(self) -> list[slice]:
        """Where each sequence is."""
        return [slice(start, stop) for start, stop in pairwise(accumulate(self.lengths, initial=0))]

    def split(self, x: Tensor) -> list[Tensor]:
        """x: [1, T, width]. Returns N tensors [tokens of the example, width]."""
        return list(x[0].split(self.lengths))

    def owners(self, x: Tensor) -> Tensor:
        """The example of each token of ``x``, [1, T, …] int64 that broadcasts over it."""
        lengths = torch.tensor(self.lengths, device=x.device)
        owners = torch.arange(self.num_examples, device=x.device).repeat_interleave(lengths)
        return owners.view(1, -1, *(1,) * (x.dim() - 2))

    def copies(self, param: Tensor, dims: int) -> Tensor:
        """An elementwise parameter with one copy per token, [1, T, 1, …, *shape] with ``dims`` axes."""
        ones = (1,) * (dims - 2 - param.dim())
        return param.view(1, 1, *ones, *param.shape).expand(1, self.num_tokens, *ones, *param.shape)

    def sums(self, h: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradients of ``copies`` summed per example: [N, *shape], wide."""
        h = h.reshape(self.num_tokens, -1, *shape).sum(1, dtype=wide(h.dtype))
        return h.new_zeros(self.num_examples, *shape).index_add_(0, self.owners(h[None]).view(-1), h)


Layout = Rows | Packed


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_example(x: Tensor, num_examples: int) -> Tensor:
    """[rows, …, width] as [N, tokens of all its rows, width]; a view if an example is a row."""
    x = x.reshape(-1, num_examples, *x.shape[1:]).transpose(0, 1)
    return x.reshape(num_examples, -1, x.shape[-1])


@dataclass
class Slot:
    """How the examples lie in a tensor that a module gave."""

    axis: int | None  # None: the examples share it, or it is no function of single ones
    shift: int = 0  # of packed sequences: entries fewer than tokens
    slope: Tensor | None = None  # of the loss, there


def find(whole: Tensor, one: Tensor, layout: Layout) -> Slot:
    """Where the examples lie in an output, by its shape for all of them and for the first."""
    if whole.dim() != one.dim():
        return Slot(None)
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


def joined(parts: Sequence[Tensor], slot: Slot, layout: Layout) -> Tensor:
    """The examples' tensors as one; the inverse of ``part_of``."""
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


def part_of(whole: Tensor, slot: Slot, layout: Layout, example: int) -> Tensor:
    """An example's part of a tensor that holds all of them."""
    axis = slot.axis
    assert axis is not None
    if isinstance(layout, Packed):
        span = layout.spans()[example]
        return whole.narrow(axis, span.start, span.stop - span.start - slot.shift)
    per_example = layout.num_rows // layout.num_examples
    parts = whole.unflatten(axis, (per_example, layout.num_examples, -1))
    return parts.select(axis + 1, example).flatten(axis, axis + 1)
