"""The per-example gradients of a large weight: ``h_i = D_iᵀ A_i``, squared while in the cache; of a table."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hf_poprisk.per_example import kernels_cpu, kernels_gpu
from hf_poprisk.per_example.basis import rotated_back
from hf_poprisk.per_example.layout import Layout, Rows, by_example, wide
from hf_poprisk.per_example.squares import SquareSum

# Elements of G, Q and h_i that are worked on together: three of these fit a core's cache.
_BLOCK = 1 << 16
# Elements of the h_i that are formed before they are summed and squared in one pass.
_SIDE_BY_SIDE = 1 << 19

# What a layer was given and the gradient of what it gave: A [rows, tokens, in] and D [rows, tokens, out].
Use = tuple[Tensor, Tensor]


class Products:
    """Forms the per-example gradients of large weights.

    Args:
        layout: which part of the batch belongs to which example.
        squares: to which they are added.
    """

    def __init__(self, layout: Layout, squares: SquareSum) -> None:
        self._layout, self._squares = layout, squares
        self.scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # kept from weight to weight

    def square(self, param: Tensor, uses: list[Use], grad: Tensor | None, tokens: Tokens | None) -> None:
        """Square the h_i of a weight, summed over its uses.

        Args:
            param: [out, in].
            uses: of the weight in linear layers.
            grad: G, [out, in], overwritten with ``Σ_i h_i``.
            tokens: of a weight that is an embedding too: its rows are moved there.
        """
        sides = self._squares.bases.get(param)
        if sides is not None:  # (D_i U_L)ᵀ (A_i U_R) is h_i in the basis
            left, right = sides
            uses = [(_times(a, right, param), _times(d, left, param)) for a, d in uses]
        single = tokens is None and len(uses) == 1 and isinstance(self._layout, Rows)
        if not (single and self._several_at_once(param, *uses[0], grad)):
            self._one_by_one(param, uses, grad, tokens, self._squares)
        if sides is not None and grad is not None:
            grad.copy_(rotated_back(sides, grad))

    def _several_at_once(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor | None) -> bool:
        """Take several examples in one pass over G and Q, if there is a way that is faster."""
        n = self._layout.num_examples
        # of low precision h_i must be rounded before it is squared, so it must be formed
        if a.shape[:2] == (n, 1) and wide(param.dtype) == param.dtype:
            self._single_tokens(param, a[:, 0], d[:, 0], grad)
            return True
        if grad is None:
            return False
        if kernels_gpu.usable(a, d, grad) and self._kernel_is_faster(param, a, d, grad):
            kernels_gpu.weight_gradient(d, a, n, grad, *self._squares.buffer(param))
            return True
        # on more threads torch's own passes are ahead
        single_thread = torch.get_num_threads() == 1
        if single_thread and a.dtype == d.dtype == torch.float32 and kernels_cpu.usable(grad):
            self._side_by_side(param, a, d, grad)
            return True
        return False

    def _single_tokens(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor | None) -> None:
        """Of one token per example no h_i need be formed: ``Q = (D²)ᵀ(A²)``."""
        target, fresh = self._squares.buffer(param)
        if grad is not None:
            grad.copy_(d.T @ a)
        a, d = (x.to(target.dtype).square() for x in (a, d))
        target.copy_(d.T @ a) if fresh else target.addmm_(d.T, a)

    def _kernel_is_faster(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor) -> bool:
        n, (rows, length, width), out = self._layout.num_examples, a.shape, d.shape[-1]
        # lengths differ from batch to batch: one measurement for all up to a power of two
        key = (a.device, a.dtype, n, rows, length.bit_length(), width, out)

        def ways() -> tuple[Callable[[], None], Callable[[], None]]:
            spare, squares = torch.empty_like(grad), SquareSum([param])
            kernel = partial(kernels_gpu.weight_gradient, d, a, n, spare, squares.buffer(param)[0], True)
            return kernel, partial(self._one_by_one, param, [(a, d)], spare, None, squares)

        return kernels_gpu.faster(key, ways)

    def _side_by_side(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor) -> None:
        """``_one_by_one`` for one use, with several examples in a product: one pass over G and Q for all."""
        n, rows = self._layout.num_examples, min(rows_per_block(param), param.shape[0])
        a, dt = by_example(a, n), by_example(d, n).transpose(1, 2)  # [N, tokens, in], [N, out, tokens]
        some = max(1, _SIDE_BY_SIDE // (rows * param.shape[1]))
        for start in range(0, param.shape[0], rows):
            total = grad[start : start + rows]
            for i in range(0, n, some):
                h = self._scratch_like(total.expand(min(some, n - i), *total.shape), total.dtype)
                torch.bmm(dt[i : i + some, start : start + rows], a[i : i + some], out=h)
                self._squares.add_and_sum(param, h, start, total, first=i == 0)

    def _one_by_one(
        self,
        param: Tensor,
        uses: list[Use],
        grad: Tensor | None,
        tokens: Tokens | None,
        squares: SquareSum,
    ) -> None:
        """One matrix product per example, block of rows and use."""
        rows, sums = rows_per_block(param), wide(param.dtype)
        # per example and use: D_iᵀ [out, tokens] and A_i [tokens, in]
        split = [list(zip(*map(self._layout.split, use), strict=True)) for use in uses]
        factors = [[(d.T, a) for a, d in parts] for parts in zip(*split, strict=True)]
        low = None if factors[0][0][0].dtype == sums else factors[0][0][0].dtype
        for start in range(0, param.shape[0], rows):
            stop = min(start + rows, param.shape[0])
            total = None if grad is None else grad[start:stop]
            h = self._scratch_like(param[start:stop], sums)
            rounded = h if low is None else self._scratch_like(param[start:stop], low)
            for i, parts in enumerate(factors):
                # the first example needs no scratch: it is the sum so far
                first = i == 0 and total is not None and tokens is None
                into = total if first else h
                product = into if low is None else rounded  # in the inputs' dtype, as autograd rounds it
                for k, (dt, a) in enumerate(parts):
                    block = dt if rows >= param.shape[0] else dt[start:stop]
                    torch.mm(block, a, out=product) if k == 0 else product.addmm_(block, a)
                if low is not None:
                    into.copy_(product)
                if total is not None and not first:
                    total.copy_(into) if i == 0 else total.add_(into)
                if tokens is not None:
                    tokens.take(i, start, into)
                squares.add(param, into[None], start)

    def _scratch_like(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (dtype, like.device)
        buffer = self.scratch.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self.scratch[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)


class Tokens:
    """The rows of an embedding's gradient that the examples touch, one row per example and token.

    Attributes:
        ids: token of each row, [rows] int64, sorted within an example.
        grads: their gradients, [rows, width], rotated as they are squared.
    """

    def __init__(self, weight: Tensor, layout: Layout, squares: SquareSum) -> None:
        self._weight, self._layout, self._squares = weight, layout, squares
        self._vocabulary, self._width = weight.shape
        self._keys: Tensor | None = None  # example · vocabulary + token, sorted

    def see(self, ids: Tensor) -> None:
        """Forward: ids [rows, …]."""
        keys = self._key(ids).unique()
        self._keys = keys if self._keys is None else torch.cat([self._keys, keys]).unique()
        self.ids = self._keys % self._vocabulary
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
        self.grads.add_(self._squares.rotated(self._weight, rounded(h, self._weight)))
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


def _times(x: Tensor, basis: Tensor | None, param: Tensor) -> Tensor:
    x = x.to(wide(param.dtype))
    return x if basis is None else x @ basis


def rounded(h: Tensor, param: Tensor) -> Tensor:
    """As the parameter's gradient is rounded, or an element that one example touched has G² ≠ Q."""
    return h if h.dtype == param.dtype else h.to(param.dtype).to(h.dtype)


def all_products(a: Tensor, d: Tensor, layout: Layout) -> Tensor:
    """Every example's ``D_iᵀ A_i`` at once, [N, out, in], in the dtype of sums."""
    if isinstance(layout, Rows):
        a, d = by_example(a, layout.num_examples), by_example(d, layout.num_examples)
        return torch.bmm(d.transpose(1, 2), a).to(wide(a.dtype))
    parts = zip(layout.split(a), layout.split(d), strict=True)
    return torch.stack([(d_i.T @ a_i).to(wide(a_i.dtype)) for a_i, d_i in parts])


def rows_per_block(param: Tensor) -> int:
    if param.device.type != "cpu":  # launches cost more than the cache saves
        return param.shape[0]
    return max(1, _BLOCK // (param.numel() // param.shape[0]))
