"""The rows of an embedding's gradient, one per example and token."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from hf_poprisk.per_example.layout import Layout, wide


class Tokens:
    """The rows of an embedding's gradient that the examples touch, one row per example and token.

    Attributes:
        ids: token of each row, [rows of it] int64, sorted within an example.
        examples: whose row it is, [rows of it] int64.
        grads: their gradients, [rows of it, width].
    """

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self.uses = 0
        self._weight, self._layout = weight, layout
        self._vocabulary, self._width = weight.shape
        self._keys: Tensor | None = None  # example · vocabulary + token, sorted

    def see(self, ids: Tensor) -> None:
        """Forward: ids [rows, …]."""
        keys = self._key(ids).unique()
        self._keys = keys if self._keys is None else torch.cat([self._keys, keys]).unique()
        self.ids, self.examples = self._keys % self._vocabulary, self._keys // self._vocabulary
        self._per_example: list[list[int]] | None = None
        self.grads = torch.zeros(
            len(self.ids), self._width, dtype=wide(self._weight.dtype), device=self.ids.device
        )

    def _key(self, ids: Tensor) -> Tensor:
        return (ids + self._vocabulary * self._layout.owners(ids)).reshape(-1)

    def add(self, ids: Tensor, d: Tensor, padding: int | None) -> Tensor:
        """Add the gradients of one lookup; returns the rows of this lookup alone."""
        d = d.reshape(-1, self._width).to(self.grads.dtype)
        if padding is not None:
            d = d.masked_fill((ids.reshape(-1) == padding)[:, None], 0)
        h = torch.zeros_like(self.grads)
        h.index_add_(0, torch.searchsorted(self._keys, self._key(ids)), d)
        self.grads.add_(rounded(h, self._weight))
        return h

    def take(self, example: int, start: int, block: Tensor) -> None:
        """Move the example's rows out of ``block``, rows ``start`` … of its gradient: they are not final."""
        if self._per_example is None:
            edges = torch.arange(self._layout.num_examples + 1, device=self.ids.device) * self._vocabulary
            self._edges = torch.searchsorted(self._keys, edges).tolist()
            ids = self.ids.tolist()
            self._per_example = [ids[lo:hi] for lo, hi in zip(self._edges[:-1], self._edges[1:], strict=True)]
        mine, offset = self._per_example[example], self._edges[example]
        lo, hi = bisect_left(mine, start), bisect_left(mine, start + block.shape[0])
        if lo < hi:
            where = self.ids[offset + lo : offset + hi] - start
            self.grads[offset + lo : offset + hi].add_(block[where])
            block[where] = 0


def rounded(h: Tensor, param: Tensor) -> Tensor:
    """As the parameter's gradient is rounded, or an element that one example touched has G² ≠ Q."""
    return h if h.dtype == param.dtype else h.to(param.dtype).to(h.dtype)
