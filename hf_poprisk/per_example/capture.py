"""What becomes of the examples' gradients of one backward: summed into G, squared into Q."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_poprisk.per_example.functions import PerExample, PerRow
from hf_poprisk.per_example.layout import Layout, wide
from hf_poprisk.per_example.products import Products, Scratch, Use, all_products, flat, rows_per_block
from hf_poprisk.per_example.sinks import Sink
from hf_poprisk.per_example.tokens import Tokens, rounded

# Up to this many elements, the gradients of all examples are kept side by side.
_SMALL = 1 << 17


class Uncovered(RuntimeError):
    """A parameter is used in a way whose per-example gradients this module cannot form."""


class Capture:
    """The per-example gradients of one backward.

    Args:
        layout: which part of the batch belongs to which example.
        params: the parameters whose per-example gradients are wanted.
        sinks: are shown the per-example gradients.
        verify: compare what was captured with what autograd accumulated.
    """

    def __init__(self, layout: Layout, params: Iterable[Tensor], sinks: Sequence[Sink], verify: bool) -> None:
        self.layout = layout
        self.num_examples = layout.num_examples
        self.misfits: dict[Tensor, str] = {}  # parameters seen with a shape that hides the rows
        self.positions: set[Tensor] = set()  # tables whose [1, T] lookups belong to every row
        self._params = set(params)
        self._sinks = sinks
        self._uses: Counter[Tensor] = Counter()  # in the forward, recomputation aside
        self._in_forward: set[Tensor] = set()  # whose uses were counted there
        self._kept: dict[Tensor, Tensor] = {}  # small parameter → Σ over uses of h, [N, *shape]
        self._repeated: dict[Tensor, list[Use]] = defaultdict(list)  # of layers that are used several times
        self._tokens: dict[Tensor, Tokens] = {}  # embedding weight → its rows' gradients
        self._seen: set[Tensor] = set()  # in the backward
        self._paused = False
        self._returned: dict[Tensor, list[Tensor]] | None = defaultdict(list) if verify else None
        self._scratch: Scratch = {}
        self._products = Products(layout, self._scratch)

    # -- forward ----------------------------------------------------------------------------------------

    def captures(self, param: Tensor) -> bool:
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
        self._repeated.clear()
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
        if self._is_small(param):
            return self._returning(param, self._keep(param, all_products(a, d, self.layout)))
        if self._dense_uses(param) > 1:
            self._repeated[param].append((a, d))
            return self._returning(param, flat(d).T @ flat(a))
        grad = torch.empty_like(param, dtype=wide(param.dtype))
        self._products.show(param, [(a, d)], grad, self._tokens.get(param), self._of(param))
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
        self._returning(param, h)
        if self._is_small(param):
            if param not in self._kept:
                self._kept[param] = h.new_zeros(self.num_examples, *param.shape, dtype=wide(h.dtype))
            self._kept[param][example] += h
            return
        if self._dense_uses(param) > 1:
            raise Uncovered("a large weight is used both by a fused head and elsewhere")
        rows = rows_per_block(param)
        for start in range(0, param.shape[0], rows):
            block = h[start : start + rows].to(wide(h.dtype), copy=True)
            if param in self._tokens:
                self._tokens[param].take(example, start, block)
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
        elif param in self._repeated:
            uses = self._repeated.pop(param)
            self._products.show(param, uses, None, self._tokens.get(param), self._of(param))
        if param in self._tokens:
            tokens = self._tokens.pop(param)
            grads = rounded(tokens.grads, param)
            for sink in self._of(param):
                sink.add_rows(param, tokens.ids, tokens.examples, grads)

    def _is_small(self, param: Tensor) -> bool:
        """Whether its gradients are kept; those of an embedding are kept by token."""
        return self.num_examples * param.numel() <= _SMALL and param not in self._tokens

    def _dense_uses(self, param: Tensor) -> int:
        return self._uses[param] - (self._tokens[param].uses if param in self._tokens else 0)

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
