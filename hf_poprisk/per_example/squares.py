"""The squares of the per-example gradients, summed over a window: ``Q = Σ h_i²``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_poprisk.per_example import kernels_cpu
from hf_poprisk.per_example.basis import Sides, rotated
from hf_poprisk.per_example.layout import wide
from hf_poprisk.per_example.ranks import average_squares


class SquareSum:
    """``Q = Σ h_i²``, elementwise, over the examples of an accumulation window.

    Q is float32 (float64 for float64 parameters) whatever the parameter's dtype: in float16 the squares of
    ordinary gradients underflow, in bfloat16 the sum stagnates. The buffers are kept from window to window.

    Args:
        params: whose squares are summed.
        bases: of those whose gradients are rotated before they are squared.
    """

    def __init__(self, params: Iterable[Tensor], bases: Mapping[Tensor, Sides] | None = None) -> None:
        self.params, self.bases = list(params), bases or {}
        self._sums: dict[Tensor, Tensor] = {}
        self._rows: dict[Tensor, int] = {}  # of this window: how many rows have been written

    def rotated(self, param: Tensor, h: Tensor) -> Tensor:
        """Gradients of the whole parameter, [..., out, in], as they are squared."""
        return rotated(self.bases[param], h) if param in self.bases else h

    def add(self, param: Tensor, h: Tensor, start: int = 0) -> None:
        """Gradients of the rows ``start`` … of some examples, [n, rows, …], rotated.

        Blocks of rows come one after the other, and all examples of a block before the next one.
        """
        h = h if param.dim() else h.reshape(-1, 1)
        rows, fresh = self.buffer(param, start, start + h.shape[1])
        if len(h) > 1:
            squares = h.to(rows.dtype).square().sum(0)
            rows.copy_(squares) if fresh else rows.add_(squares)
        elif not fresh:
            rows.addcmul_(h[0], h[0])
        elif h.dtype == rows.dtype:
            torch.mul(h[0], h[0], out=rows)
        else:  # copy before squaring: bfloat16 · bfloat16 would round before the cast
            torch.square(rows.copy_(h[0]), out=rows)

    def add_and_sum(self, param: Tensor, h: Tensor, start: int, total: Tensor, first: bool) -> None:
        """``add``, and ``total += Σ h_i`` in the same pass; overwrites the total if ``first``."""
        squares, fresh = self.buffer(param, start, start + h.shape[1])
        kernels_cpu.add_squares(h, total, squares, first=first, fresh=fresh)

    def add_rows(self, param: Tensor, rows: Tensor, h: Tensor) -> None:
        """Gradients of single rows of a table, rotated; rows: [R] int64, h: [R, width]."""
        sums, fresh = self.buffer(param)
        if fresh:
            sums.zero_()
        sums.index_add_(0, rows, h.square())

    def buffer(self, param: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, bool]:
        """Rows of the parameter's Q, to be written to, and whether their content is of an older window.

        So the first example writes and the others add: no buffer is ever zeroed.
        """
        sums = self._sums.get(param)
        if sums is None or sums.device != param.device:
            sums = torch.empty_like(param, dtype=wide(param.dtype), requires_grad=False)
            self._sums[param] = sums
        rows = sums[start:stop] if param.dim() else sums[None]
        fresh = start >= self._rows.get(param, 0)
        if fresh:
            self._rows[param] = start + len(rows)
        return rows, fresh

    def so_far(self) -> dict[Tensor, Tensor]:
        """Q of this rank, for the parameters that have one."""
        return {p: self._sums[p] for p in self._rows}

    def reduce(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """Q of some parameters over all ranks, in the units of gradients that DDP averages over W ranks.

        ``Q ← (Σ_ranks Q) / W²``; zero where no example reached the parameter. Every rank must call it.
        """
        for p in params:
            if p not in self._rows:  # reached on another rank only
                self.buffer(p)[0].zero_()
        sums = {p: self._sums[p] for p in params}
        average_squares(sums)
        return sums

    def take(self, params: list[Tensor]) -> list[Tensor]:
        """Q of some parameters on this rank, as ``reduce`` begins with it; it is forgotten here."""
        taken = []
        for p in params:
            if p not in self._rows:
                self.buffer(p)[0].zero_()
            taken.append(self._sums.pop(p))
            self._rows.pop(p)
        return taken

    def reset(self) -> None:
        """Begin a new window."""
        self._rows.clear()
