"""What becomes of the examples' gradients of one backward: summed into G, squared into Q."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hf_poprisk.per_example import kernels_cpu, kernels_gpu
from hf_poprisk.per_example.functions import PerExample, PerRow
from hf_poprisk.per_example.layout import Layout, Rows, wide
from hf_poprisk.per_example.sinks import Sink, SquareSum
from hf_poprisk.per_example.tokens import Tokens, rounded

# Elements of G, Q and h_i that are worked on together: three of these fit a core's cache.
_BLOCK = 1 << 16
# Up to this many elements, the gradients of all examples are kept side by side.
_SMALL = 1 << 17
# Elements of the h_i that are formed before they are summed and squared in one pass.
_SIDE_BY_SIDE = 1 << 19


class Uncovered(RuntimeError):
    """A gated parameter is used in a way whose per-example gradients this module cannot form."""


class Capture:
    """The per-example gradients of one backward.

    Args:
        layout: which part of the batch belongs to which example.
        params: the parameters whose per-example gradients are wanted.
        sinks: are shown the per-example gradients.
        verify: compare what was captured with what autograd accumulated (first micro-batch of a run).
    """

    def __init__(
        self,
        layout: Layout,
        params: Iterable[Tensor],
        sinks: Sequence[Sink],
        verify: bool,
    ) -> None:
        self.layout = layout
        self.num_examples = layout.num_examples
        self.misfits: dict[Tensor, str] = {}  # parameters seen with a shape that hides the rows
        self.positions: set[Tensor] = set()  # tables whose [1, T] lookups belong to every row
        self._params = set(params)
        self._sinks = sinks
        self._uses: Counter[Tensor] = Counter()  # in the forward, recomputation aside
        self._in_forward: set[Tensor] = set()  # whose uses were counted there
        self._kept: dict[Tensor, Tensor] = {}  # small parameter → Σ over uses of h, [N, *shape]
        self._inputs: dict[Tensor, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # of repeated layers
        self._tokens: dict[Tensor, Tokens] = {}  # embedding weight → its rows' gradients
        self._seen: set[Tensor] = set()  # in the backward
        self._paused = False
        self._returned: dict[Tensor, list[Tensor]] | None = defaultdict(list) if verify else None
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    # -- forward ----------------------------------------------------------------------------------------

    def gates(self, param: Tensor) -> bool:
        return param in self._params

    def wants(self, param: Tensor | None) -> bool:
        """Whether this use of the parameter is to be captured."""
        return param in self._params and torch.is_grad_enabled() and not self._paused

    def used(self, param: Tensor) -> bool:
        """Count a use; False for the recomputation of a checkpoint, whose forward was counted.

        Reentrant checkpointing shows its forward without gradients, so there the recomputation counts.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and param in self._in_forward:
            return False
        if not in_backward:
            self._in_forward.add(param)
        self._uses[param] += 1
        return True

    def lookup(self, weight: Tensor, ids: Tensor) -> None:
        """Count a lookup of token ids, [rows, …], in an embedding."""
        if self.used(weight):
            if weight not in self._tokens:
                self._tokens[weight] = Tokens(weight, self.layout)
            self._tokens[weight].uses += 1
            self._tokens[weight].see(ids)

    def release(self) -> None:
        """Let go of what was kept; a loss that is held on to would hold it too."""
        self._kept.clear()
        self._inputs.clear()
        self._tokens.clear()
        self._scratch.clear()

    def fits(self, x: Tensor, params: Iterable[Tensor | None]) -> bool:
        """Whether the examples can be seen in ``x``; if not, remember whom it concerns."""
        if self.layout.fits(x):
            return True
        for p in params:
            if self.wants(p):
                self.misfits[p] = f"its input is {list(x.shape)} and {self.layout}"
        return False

    def per_row(self, param: Tensor, dims: int) -> Tensor:
        """An elementwise parameter as ``layout.copies`` with ``dims`` axes."""
        self.used(param)
        return PerRow.apply(param, self, dims)

    def for_example(self, param: Tensor, example: int) -> Tensor:
        """The parameter, for an operation that is run example by example, in their order.

        Take it right before the example's operations: autograd then squares one example's gradient
        before it forms the next one's.
        """
        if example == 0:
            self.used(param)
        return PerExample.apply(param, self, example)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what runs in this block to autograd."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    # -- backward ---------------------------------------------------------------------------------------

    def dense(self, param: Tensor, a: Tensor, d: Tensor) -> Tensor:
        """``Σ_i D_iᵀ A_i`` for one use of a weight; squares the terms when it is the only use.

        Args:
            param: [out, in].
            a: [rows, tokens, in].
            d: [rows, tokens, out].

        Returns:
            [out, in], float32 (float64 for float64).
        """
        self._seen.add(param)
        tokens = self._tokens.get(param)
        dense_uses = self._uses[param] - (tokens.uses if tokens else 0)
        if self.num_examples * param.numel() <= _SMALL and tokens is None:
            return self._returning(param, self._keep(param, _outer(a, d, self.layout)))
        if dense_uses > 1:
            self._inputs[param].append((a, d))
            return self._returning(param, _flat(d).T @ _flat(a))
        grad = torch.empty_like(param, dtype=wide(param.dtype))
        self._sum_and_show(param, [(a, d)], grad, tokens)
        return self._returning(param, grad)

    def elementwise(self, param: Tensor, h: Tensor) -> Tensor:
        """h: the gradient of ``per_row``'s copies, or of one at every token. Returns their sum."""
        self._seen.add(param)
        return self._returning(param, self._keep(param, self.layout.sums(h, param.shape)))

    def embedding(self, param: Tensor, ids: Tensor, d: Tensor, padding: int | None) -> Tensor:
        """ids: [rows, …], d: [rows, …, width]."""
        self._seen.add(param)
        tokens = self._tokens.get(param)
        if tokens is None:
            raise Uncovered("it is looked up inside a reentrant checkpoint and used outside of it too")
        h = tokens.add(ids, d, padding)
        grad = torch.zeros_like(param, dtype=h.dtype).index_add_(0, tokens.ids, h)
        return self._returning(param, grad)

    def whole(self, param: Tensor, example: int, h: Tensor) -> None:
        """One example's complete gradient of the operation that was run example by example."""
        self._seen.add(param)
        tokens = self._tokens.get(param)
        if self._returned is not None:
            self._returned[param].append(h.clone())
        if self.num_examples * param.numel() <= _SMALL and tokens is None:
            kept = self._kept.get(param)
            if kept is None:
                shape = (self.num_examples, *param.shape)
                kept = self._kept[param] = h.new_zeros(shape, dtype=wide(h.dtype))
            kept[example] += h
            return
        if self._uses[param] - (tokens.uses if tokens else 0) > 1:
            raise Uncovered("a large weight is used both by a fused head and elsewhere")
        rows = self._rows_per_block(param)
        for start in range(0, param.shape[0], rows):
            block = h[start : start + rows].to(wide(h.dtype), copy=True)
            if tokens is not None:
                tokens.take(example, start, block)
            for sink in self._of(param):
                sink.add(param, example, block[None], start)

    def finish(self, param: Tensor, grad: Tensor) -> None:
        """The leaf hook: every use of ``param`` has been through its backward.

        Raises:
            Uncovered: the gradient is not made of what was captured.
        """
        if param in self.misfits:
            raise Uncovered(f"a layer does not see the examples: {self.misfits[param]}")
        if param not in self._seen:
            raise Uncovered("it was used outside the layers whose gradients are captured")
        if self._returned is not None:
            parts = self._returned.pop(param, [])
            gap = (grad - sum(parts)).abs().max()
            if not parts or gap > 1e-2 * grad.abs().max():
                raise Uncovered("a part of its gradient did not come through the captured layers")
        if param in self._kept:
            h = rounded(self._kept.pop(param), param)
            for sink in self._of(param):
                sink.add(param, 0, h)
        elif self._inputs.get(param):
            self._sum_and_show(param, self._inputs.pop(param), None, self._tokens.get(param))
        if param in self._tokens:
            tokens = self._tokens.pop(param)
            grads = rounded(tokens.grads, param)
            for sink in self._of(param):
                sink.add_rows(param, tokens.ids, tokens.examples, grads)

    def _of(self, param: Tensor) -> list[Sink]:
        return [sink for sink in self._sinks if sink.wants(param)]

    def _returning(self, param: Tensor, grad: Tensor) -> Tensor:
        grad = grad.to(param.dtype)
        if self._returned is not None:
            self._returned[param].append(grad.clone())
        return grad

    def _keep(self, param: Tensor, h: Tensor) -> Tensor:
        """Add [N, *shape] to the examples' gradients of a small parameter; returns their sum."""
        total = h.sum(0)
        h = rounded(h, param)
        self._kept[param] = self._kept[param].add_(h) if param in self._kept else h
        return total

    def _rows_per_block(self, param: Tensor) -> int:
        if param.device.type != "cpu":  # launches cost more than the cache saves
            return param.shape[0]
        return max(1, _BLOCK // (param.numel() // param.shape[0]))

    def _sum_and_show(
        self,
        param: Tensor,
        uses: list[tuple[Tensor, Tensor]],
        grad: Tensor | None,
        tokens: Tokens | None,
    ) -> None:
        """``grad = Σ_i h_i`` (if given), and the h_i, summed over the uses, to the sinks."""
        sinks = self._of(param)
        single, by_rows = tokens is None and len(uses) == 1, isinstance(self.layout, Rows)
        if len(sinks) == 1 and tokens is None and (part := sinks[0].part(param)) is not None:
            return self._show_part(sinks[0], param, part, uses, grad)
        squares = sinks[0] if len(sinks) == 1 and isinstance(sinks[0], SquareSum) else None
        if squares is not None and single and by_rows:
            a, d = uses[0]
            # of low precision h_i must be rounded before it is squared, so it must be formed
            exact = param.dtype in (torch.float32, torch.float64)
            if exact and a.shape[:2] == (self.num_examples, 1):
                return self._square_single_tokens(squares, param, a[:, 0], d[:, 0], grad)
            if (
                grad is not None
                and kernels_gpu.usable(a, d, grad)
                and self._fused_is_faster(param, a, d, grad)
            ):
                target, fresh = squares.buffer(param)
                return kernels_gpu.weight_gradient(d, a, self.num_examples, grad, target, fresh)
        if single and by_rows and grad is not None and grad.dtype == torch.float32:
            a, d = uses[0]
            # on more threads torch's own passes are ahead
            quick = torch.get_num_threads() == 1 or squares is None
            if quick and a.dtype == d.dtype == torch.float32 and kernels_cpu.usable(grad):
                return self._side_by_side(param, a, d, grad, sinks)
        self._one_by_one(param, uses, grad, tokens, sinks)

    def _square_single_tokens(
        self, squares: SquareSum, param: Tensor, a: Tensor, d: Tensor, grad: Tensor | None
    ) -> None:
        """Of one token per example no h_i need be formed: ``Q = (D²)ᵀ(A²)``."""
        target, fresh = squares.buffer(param)
        if grad is not None:
            grad.copy_(d.T @ a)
        a, d = (x.to(target.dtype).square() for x in (a, d))
        target.copy_(d.T @ a) if fresh else target.addmm_(d.T, a)

    def _show_part(
        self,
        sink: Sink,
        param: Tensor,
        part: tuple[slice, slice],
        uses: list[tuple[Tensor, Tensor]],
        grad: Tensor | None,
    ) -> None:
        """``grad = Σ_i h_i`` (if given), and of the h_i themselves no more than the sink looks at."""
        n = self.num_examples
        if grad is not None:
            ((a, d),) = uses
            for rows, columns in _around(part, param):
                grad[rows, columns] = _flat(d)[:, rows].T @ _flat(a)[:, columns]
        rows, columns = part
        factors = [
            (_by_example(d, n)[..., rows].transpose(1, 2), _by_example(a, n)[..., columns]) for a, d in uses
        ]
        some = max(1, max(_SIDE_BY_SIDE, param.numel()) // param[rows, columns].numel())
        for i in range(0, n, some):
            first, *others = (torch.bmm(dt[i : i + some], a[i : i + some]) for dt, a in factors)
            h = sum(others, first)
            sink.add_part(param, i, h)
            if grad is not None:
                total = h.sum(0, dtype=grad.dtype)
                grad[rows, columns] = total if i == 0 else grad[rows, columns] + total

    def _fused_is_faster(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor) -> bool:
        (rows, length, width), out = a.shape, d.shape[-1]
        # lengths differ from batch to batch: one measurement for all up to a power of two
        key = (a.device, a.dtype, self.num_examples, rows, length.bit_length(), width, out)

        def ways() -> tuple[Callable[[], None], Callable[[], None]]:
            spare, squares = torch.empty_like(grad), SquareSum([param])
            fused = partial(kernels_gpu.weight_gradient, d, a, self.num_examples, spare)
            return (
                partial(fused, squares.buffer(param)[0], True),
                partial(self._one_by_one, param, [(a, d)], spare, None, [squares]),
            )

        return kernels_gpu.faster(key, ways)

    def _one_by_one(
        self,
        param: Tensor,
        uses: list[tuple[Tensor, Tensor]],
        grad: Tensor | None,
        tokens: Tokens | None,
        sinks: Sequence[Sink],
    ) -> None:
        """``_sum_and_show`` with one matrix product per example, block of rows and use."""
        rows, sums = self._rows_per_block(param), wide(param.dtype)
        # per example and use: D_iᵀ [out, tokens] and A_i [tokens, in]
        split = [list(zip(*map(self.layout.split, use), strict=True)) for use in uses]
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

    def _side_by_side(self, param: Tensor, a: Tensor, d: Tensor, grad: Tensor, sinks: Sequence[Sink]) -> None:
        """``_one_by_one`` for one use, with several examples in a product: one pass over G and Q for all."""
        n, rows = self.num_examples, min(self._rows_per_block(param), param.shape[0])
        a, dt = _by_example(a, n), _by_example(d, n).transpose(1, 2)  # [N, tokens, in], [N, out, tokens]
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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _around(part: tuple[slice, slice], matrix: Tensor) -> list[tuple[slice, slice]]:
    """The rest of a matrix, of which a part has some columns of all rows, or some rows of all columns."""
    rows, columns = part
    if columns.stop - columns.start < matrix.shape[1]:
        sides = slice(0, columns.start), slice(columns.stop, None)
        return [(rows, side) for side in sides]
    return [(side, columns) for side in (slice(0, rows.start), slice(rows.stop, None))]


def _by_example(x: Tensor, num_examples: int) -> Tensor:
    """[rows, tokens, width] as [N, tokens of all its rows, width]; a view if an example is a row."""
    x = x.reshape(-1, num_examples, *x.shape[1:]).transpose(0, 1)
    return x.reshape(num_examples, -1, x.shape[-1])


def _outer(a: Tensor, d: Tensor, layout: Layout) -> Tensor:
    """Every example's ``D_iᵀ A_i`` at once, [N, out, in], in the dtype of sums."""
    if isinstance(layout, Rows):
        a, d = _by_example(a, layout.num_examples), _by_example(d, layout.num_examples)
        return torch.bmm(d.transpose(1, 2), a).to(wide(a.dtype))
    parts = zip(layout.split(a), layout.split(d), strict=True)
    return torch.stack([(d_i.T @ a_i).to(wide(a_i.dtype)) for a_i, d_i in parts])
