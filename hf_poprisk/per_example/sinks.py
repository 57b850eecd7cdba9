"""What becomes of per-example gradients: a sink is shown the h_i of every parameter, block by block.

The capture of one backward (``capture.py``) and the leaf hooks of one example (``window.py``) show them to
any number of sinks. A new one, for clipping or for influence, has these five methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_poprisk.per_example import kernels_cpu
from hf_poprisk.per_example.layout import wide

# An eighth of the rows or columns of a large matrix stands for all of them.
STRIDE = 8
# Of smaller ones more are taken, not fewer than this many.
FEWEST = 128
# Elements that are worked on together on a CPU: a few of these fit a core's cache.
_PIECE = 1 << 16
# Elements per all-reduce: large enough to fill the link, small against the model.
_BUCKET_NUMEL = 1 << 24


class Sink(Protocol):
    """Receives per-example gradients."""

    def wants(self, param: Tensor) -> bool:
        """Whether it is to be shown the gradients of this parameter."""

    def add(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        """Gradients of the rows ``start`` … of consecutive examples from ``first`` on; h: [n, rows, …].

        Blocks of rows come one after the other, and all examples of a block before the next one.
        """

    def add_rows(self, param: Tensor, rows: Tensor, examples: Tensor, h: Tensor) -> None:
        """Gradients of single rows of a table; rows and examples: [R] int64, h: [R, width]."""

    def part(self, param: Tensor) -> tuple[slice, slice] | None:
        """The rows and columns of the parameter as a matrix that it looks at; None: all."""

    def add_part(self, param: Tensor, first: int, h: Tensor) -> None:
        """As ``add``, of all of ``part``, where there is one; h: [n, rows, columns]."""


class SquareSum:
    """``Q = Σ h_i²``, elementwise, over the examples of an accumulation window.

    Q is float32 (float64 for float64 parameters) whatever the parameter's dtype: in float16 the squares of
    ordinary gradients underflow, in bfloat16 the sum stagnates. The buffers are kept from window to window.

    Args:
        params: whose squares are summed.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        self._wanted = set(self.params)
        self._sums: dict[Tensor, Tensor] = {}
        self._rows: dict[Tensor, int] = {}  # of this window: how many rows have been written

    def wants(self, param: Tensor) -> bool:
        return param in self._wanted

    def part(self, param: Tensor) -> None:
        return None

    def buffer(self, param: Tensor) -> tuple[Tensor, bool]:
        """The parameter's Q, to be written to as a whole, and whether its content is of an older window."""
        fresh = param not in self._rows
        self._rows[param] = len(param) if param.dim() else 1
        return self._buffer(param), fresh

    def _buffer(self, param: Tensor) -> Tensor:
        sums = self._sums.get(param)
        if sums is None or sums.device != param.device:
            sums = torch.empty_like(param, dtype=wide(param.dtype), requires_grad=False)
            self._sums[param] = sums
        return sums

    def add(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        sums = self._buffer(param)
        if param.dim() == 0:
            sums, h = sums[None], h.reshape(-1, 1)
        rows = sums[start : start + h.shape[1]]
        fresh = self._is_fresh(param, start, h.shape[1])  # the first one writes: no buffer is ever zeroed
        if len(h) > 1:
            squares = h.to(rows.dtype).square().sum(0)
            rows.copy_(squares) if fresh else rows.add_(squares)
        elif not fresh:
            rows.addcmul_(h[0], h[0])
        elif h.dtype == rows.dtype:
            torch.mul(h[0], h[0], out=rows)
        else:  # copy before squaring: bfloat16 · bfloat16 would round before the cast
            torch.square(rows.copy_(h[0]), out=rows)

    def _is_fresh(self, param: Tensor, start: int, count: int) -> bool:
        """Whether nothing has been written to these rows in this window; they will be now."""
        fresh = start >= self._rows.get(param, 0)
        if fresh:
            self._rows[param] = start + count
        return fresh

    def add_part(self, param: Tensor, first: int, h: Tensor) -> None:
        raise NotImplementedError("it looks at all of a parameter")

    def add_and_sum(self, param: Tensor, first: int, h: Tensor, start: int, total: Tensor) -> None:
        """``add``, and ``total += Σ h_i`` in the same pass; overwrites the total if ``first`` is 0."""
        fresh = self._is_fresh(param, start, h.shape[1])
        squares = self._buffer(param)[start : start + h.shape[1]]
        kernels_cpu.add_squares(h, total, squares, first=first == 0, fresh=fresh)

    def add_rows(self, param: Tensor, rows: Tensor, examples: Tensor, h: Tensor) -> None:
        sums, fresh = self.buffer(param)
        if fresh:
            sums.zero_()
        sums.index_add_(0, rows, h.square())

    def so_far(self) -> dict[Tensor, Tensor]:
        """Q of this rank, for the parameters that have one."""
        return {p: self._sums[p] for p in self._rows}

    def reduce(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """Q of some parameters over all ranks, in the units of gradients that DDP averages over W ranks.

        ``Q ← (Σ_ranks Q) / W²``; zero where no example reached the parameter. Every rank must call it.
        """
        for p in params:
            if p not in self._rows:  # reached on another rank only
                self._sums[p] = torch.zeros_like(p, dtype=wide(p.dtype), requires_grad=False)
        sums = {p: self._sums[p] for p in params}
        if dist.is_available() and dist.is_initialized() and (world := dist.get_world_size()) > 1:
            _all_reduce(list(sums.values()), scale=1.0 / world**2)
            if world & (world - 1):
                # Dividing by such a world size rounds G, and an element that one example touched has
                # G² = Q exactly before it: rounding alone must not open it.
                for p, sum_ in sums.items():
                    sum_.mul_(1.0 + 2.0 * torch.finfo(p.dtype).eps + 8.0 * torch.finfo(sum_.dtype).eps)
        return sums

    def reset(self) -> None:
        """Begin a new window."""
        self._rows.clear()


class Metric(Protocol):
    """A diagonal preconditioner of a model's parameters."""

    params: set[Tensor]

    def of(self, param: Tensor, rows: slice | Tensor, columns: slice) -> tuple[Tensor, float, float]:
        """P of some rows and columns of the parameter as a matrix, the bound c, the learning rate."""

    def turn(self, param: Tensor) -> int:
        """A number that grows by one with every step."""


class SelfInfluence:
    """``Σ_k lr_k h_ik · clamp(P_k h_ik, ±c)`` of each example: its own gradient, in a metric.

    To first order, how much a step along P lowers the accumulated loss by way of example i's own gradient.

    Of a parameter as a matrix, [shape[0], rest], the sums run over one in s rows, or columns if those are not
    more, times s: what is estimated is a prediction to first order, and the examples' gradients need not
    be formed in full. Which ones follows from the number of the step: all take their turn, and neither the
    layout nor a resumed run changes it. s is ``STRIDE``, less where under ``FEWEST`` would be left, and 1 for
    vectors.

    Args:
        metric: P, c and lr of the parameters that the sums run over.
        num_examples: N, the examples of the backward.

    Attributes:
        energy: [N] float32 (float64 for float64 parameters).
    """

    def __init__(self, metric: Metric, num_examples: int) -> None:
        self._metric = metric
        self._num_examples = num_examples
        self._sums: Tensor | None = None  # [N]
        self._parts: dict[Tensor, tuple[slice, slice]] = {}
        self._key: tuple[int, int, int] | None = None
        self._block: tuple[Tensor, float, float]  # the metric of what ``_key`` names

    def wants(self, param: Tensor) -> bool:
        return param in self._metric.params

    @property
    def params(self) -> list[Tensor]:
        """The trainable parameters that the sums run over."""
        return [p for p in self._metric.params if p.requires_grad]

    @property
    def energy(self) -> Tensor:
        return torch.zeros(self._num_examples) if self._sums is None else self._sums

    def part(self, param: Tensor) -> tuple[slice, slice] | None:
        return self._part(param) if self.stride(param) > 1 else None

    def _part(self, param: Tensor) -> tuple[slice, slice]:
        if param not in self._parts:
            rows, columns = as_matrix(param).shape
            stride = self.stride(param)
            turn, fewer = self._metric.turn(param) % stride, min(rows, columns)
            some = slice(turn * fewer // stride, (turn + 1) * fewer // stride)
            self._parts[param] = (some, slice(0, columns)) if rows < columns else (slice(0, rows), some)
        return self._parts[param]

    def stride(self, param: Tensor) -> int:
        """Of how many rows or columns one is taken."""
        return max(1, min(STRIDE, min(as_matrix(param).shape) // FEWEST))

    def add(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        rows, columns = self._part(param)
        h = h.reshape(len(h), h.shape[1] if h.dim() > 1 else 1, -1)
        low, high = max(rows.start, start), min(rows.stop, start + h.shape[1])
        if low < high:
            self.add_part(param, first, h[:, low - start : high - start, columns], low - rows.start)

    def add_part(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        rows = h.shape[1]
        if h.device.type == "cpu":  # elsewhere launches cost more than the cache saves
            rows = max(1, _PIECE // h.shape[2])
        for low in range(0, h.shape[1], rows):
            piece = h[:, low : low + rows]
            found = self._sums_of(self._of_block(param, start + low, piece.shape[1]), piece.flatten(1))
            sums = self._into(found)
            sums[first : first + len(h)] += found.to(sums.device)

    def add_rows(self, param: Tensor, rows: Tensor, examples: Tensor, h: Tensor) -> None:
        some, columns = self._part(param)
        if some.stop - some.start < len(param):
            taken = (rows >= some.start) & (rows < some.stop)
            rows, examples, h = rows[taken], examples[taken], h[taken]
        found = self._sums_of(self._scaled(param, rows, columns), h[:, columns])
        sums = self._into(found)
        sums.index_add_(0, examples.to(sums.device), found.to(sums.device))

    def _sums_of(self, metric: tuple[Tensor, float, float], h: Tensor) -> Tensor:
        """h: [R, numbers]. Returns [R]."""
        precondition, bound, lr = metric
        h = h.to(precondition.dtype)
        if precondition.dim() == 1 and kernels_cpu.usable(h := h.contiguous(), precondition):
            return lr * kernels_cpu.weigh(h, precondition, bound)
        return lr * (h * precondition).clamp_(-bound, bound).mul_(h).sum(1)

    def _into(self, like: Tensor) -> Tensor:
        if self._sums is None:
            self._sums = like.new_zeros(self._num_examples)
        return self._sums

    def _of_block(self, param: Tensor, start: int, count: int) -> tuple[Tensor, float, float]:
        """The metric of some rows of ``part``, flat."""
        if self._key != (key := (id(param), start, count)):  # blocks come one example after the other
            rows, columns = self._part(param)
            block = slice(rows.start + start, rows.start + start + count)
            precondition, bound, lr = self._scaled(param, block, columns)
            self._key, self._block = key, (precondition.flatten(), bound, lr)
        return self._block

    def _scaled(self, param: Tensor, rows: slice | Tensor, columns: slice) -> tuple[Tensor, float, float]:
        precondition, bound, lr = self._metric.of(param, rows, columns)
        return precondition, bound, lr * self.stride(param)


def as_matrix(x: Tensor) -> Tensor:
    """[shape[0], rest]; a vector has one column, a number one row as well."""
    return x.reshape(x.shape[0] if x.dim() else 1, -1)


def _all_reduce(tensors: list[Tensor], scale: float) -> None:
    """Sum each tensor over the ranks and multiply it by ``scale``, in place, in flat buckets."""
    before = accumulate((t.numel() for t in tensors), initial=0)
    kinds = [(t.dtype, t.device, numel // _BUCKET_NUMEL) for t, numel in zip(tensors, before, strict=False)]
    for _, found in groupby(zip(kinds, tensors, strict=True), key=itemgetter(0)):
        bucket = [t for _, t in found]
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat)
        flat.mul_(scale)
        for tensor, reduced in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(reduced.view_as(tensor))
