"""The per-example gradients ``h_i = D_iᵀ A_i`` of a large weight, shown to the sinks while in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_poprisk.per_example import kernels_cpu, kernels_gpu
from hf_poprisk.per_example.layout import Layout, Rows, wide
from hf_poprisk.per_example.sinks import Sink, SquareSum
from hf_poprisk.per_example.tokens import Tokens

# Elements of G, Q and h_i that are worked on together: three of these fit a core's cache.
_BLOCK = 1 << 16
# Elements of the h_i that are formed before they are summed and squared in one pass.
_SIDE_BY_SIDE = 1 << 19

# What a layer was given and the gradient of what it gave: A [rows, tokens, in] and D [rows, tokens, out].
Use = tuple[Tensor, Tensor]
Scratch = dict[tuple[torch.dtype, torch.device], Tensor]


class Products:
    """Forms the per-example gradients of large weights.

    Args:
        layout: which part of the batch belongs to which example.
        scratch: buffers, kept from weight to weight.
    """

    def __init__(self, layout: Layout, scratch: Scratch) -> None:
        self._layout, self._scratch = layout, scratch

    def show(
        self, param: Tensor, uses: list[Use], grad: Tensor | None, tokens: Tokens | None, sinks: list[Sink]
    ) -> None:
        """The h_i of a weight, summed over its uses, to the sinks.

        Args:
            param: [out, in].
            uses: of the weight in linear layers.
            grad: G, [out, in], overwritten with ``Σ_i h_i``.
            tokens: of a weight that is an embedding too: its rows are moved there.
        """
        single = tokens is None and len(uses) == 1 and isinstance(self._layout, Rows)
        if not (single and self._several_at_once(param, *uses[0], grad, sinks)):
            self._one_by_one(param, uses, grad, tokens, sinks)

    def _several_at_once(
        self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor | None, sinks: list[Sink]
    ) -> bool:
        """Take several examples in one pass over G and Q, if there is a way that is faster."""
        n = self._layout.num_examples
        squares = sinks[0] if len(sinks) == 1 and isinstance(sinks[0], SquareSum) else None
        # of low precision h_i must be rounded before it is squared, so it must be formed
        if squares is not None and a.shape[:2] == (n, 1) and wide(param.dtype) == param.dtype:
            _square_single_tokens(squares, param, a[:, 0], d[:, 0], grad)
            return True
        if grad is None:
            return False
        gpu = squares is not None and kernels_gpu.usable(a, d, grad)
        if gpu and self._kernel_is_faster(param, a, d, grad):
            kernels_gpu.weight_gradient(d, a, n, grad, *squares.buffer(param))
            return True
        # on more threads torch's own passes are ahead
        quick = torch.get_num_threads() == 1 or squares is None
        if quick and a.dtype == d.dtype == torch.float32 and kernels_cpu.usable(grad):
            self._side_by_side(param, a, d, grad, sinks)
            return True
        return False

    def _kernel_is_faster(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor) -> bool:
        n, (rows, length, width), out = self._layout.num_examples, a.shape, d.shape[-1]
        # lengths differ from batch to batch: one measurement for all up to a power of two
        key = (a.device, a.dtype, n, rows, length.bit_length(), width, out)

        def ways() -> tuple[Callable[[], None], Callable[[], None]]:
            spare, squares = torch.empty_like(grad), SquareSum([param])
            kernel = partial(kernels_gpu.weight_gradient, d, a, n, spare, squares.buffer(param)[0], True)
            return kernel, partial(self._one_by_one, param, [(a, d)], spare, None, [squares])

        return kernels_gpu.faster(key, ways)

    def _one_by_one(
        self,
        param: Tensor,
        uses: list[Use],
        grad: Tensor | None,
        tokens: Tokens | None,
        sinks: Sequence[Sink],
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
                for sink in sinks:
                    sink.add(param, i, into[None], start)

    def _side_by_side(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor, sinks: list[Sink]) -> None:
        """``_one_by_one`` for one use, with several examples in a product: one pass over G and Q for all."""
        n, rows = self._layout.num_examples, min(rows_per_block(param), param.shape[0])
        a, dt = by_example(a, n), by_example(d, n).transpose(1, 2)  # [N, tokens, in], [N, out, tokens]
        some = max(1, _SIDE_BY_SIDE // (rows * param.shape[1]))
        squares = next((sink for sink in sinks if isinstance(sink, SquareSum)), None)
        for start in range(0, param.shape[0], rows):
            total = grad[start : start + rows]
            for i in range(0, n, some):
                h = self._scratch_like(total.expand(min(some, n - i), *total.shape), total.dtype)
                torch.bmm(dt[i : i + some, start : start + rows], a[i : i + some], out=h)
                for sink in sinks:
                    if sink is not squares:
                        sink.add(param, i, h, start)
                if squares is not None:
                    squares.add_and_sum(param, i, h, start, total)
                else:
                    torch.sum(h, 0, out=total) if i == 0 else total.add_(h.sum(0))

    def _scratch_like(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (dtype, like.device)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._scratch[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)


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


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def by_example(x: Tensor, num_examples: int) -> Tensor:
    """[rows, tokens, width] as [N, tokens of all its rows, width]; a view if an example is a row."""
    x = x.reshape(-1, num_examples, *x.shape[1:]).transpose(0, 1)
    return x.reshape(num_examples, -1, x.shape[-1])


def _square_single_tokens(
    squares: SquareSum, param: Tensor, a: Tensor, d: Tensor, grad: Tensor | None
) -> None:
    """Of one token per example no h_i need be formed: ``Q = (D²)ᵀ(A²)``."""
    target, fresh = squares.buffer(param)
    if grad is not None:
        grad.copy_(d.T @ a)
    a, d = (x.to(target.dtype).square() for x in (a, d))
    target.copy_(d.T @ a) if fresh else target.addmm_(d.T, a)
