"""The examples' gradients of one backward, squared into Q, and the autograd functions that form them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from hf_poprisk.per_example.layout import Layout, Rows, wide
from hf_poprisk.per_example.products import Products, Tokens, Use, all_products, rounded, rows_per_block
from hf_poprisk.per_example.squares import SquareSum

# Up to this many elements, the gradients of all examples are kept side by side.
_SMALL = 1 << 17


class Capture:
    """The per-example gradients of one backward.

    Args:
        layout: which part of the batch belongs to which example.
        squares: of the parameters whose per-example gradients are wanted; they are added to it.
        describe: names a parameter in messages.
        verify: compare what was captured with what autograd accumulated.

    Raises:
        RuntimeError: in the backward, for a parameter whose per-example gradients cannot be formed.
    """

    def __init__(
        self, layout: Layout, squares: SquareSum, describe: Callable[[Tensor], str], verify: bool
    ) -> None:
        self.layout = layout
        self.num_examples = layout.num_examples
        self.misfits: dict[Tensor, str] = {}  # parameters seen with a shape that hides the rows
        self.positions: set[Tensor] = set()  # tables whose [1, T] lookups belong to every row
        self.params = {p for p in squares.params if p.requires_grad}  # that are captured
        self._squares, self._describe = squares, describe
        self._uses: Counter[Tensor] = Counter()  # in layers; recomputation aside
        self._in_forward: set[Tensor] = set()  # whose uses were counted there
        self._kept: dict[Tensor, Tensor] = {}  # small parameter → Σ over uses of h, [N, *shape]
        self._repeated: dict[Tensor, list[Use]] = defaultdict(list)  # of layers that are used several times
        self._tokens: dict[Tensor, Tokens] = {}  # embedding weight → its rows' gradients
        self._seen: set[Tensor] = set()  # in the backward
        self._paused = False
        self._returned: dict[Tensor, list[Tensor]] | None = defaultdict(list) if verify else None
        self._products = Products(layout, squares)

    # -- forward ----------------------------------------------------------------------------------------

    def wants(self, param: Tensor | None) -> bool:
        """Whether this use of the parameter is to be captured."""
        return param in self.params and torch.is_grad_enabled() and not self._paused

    def used(self, param: Tensor) -> None:
        """Count a use of a weight in a layer."""
        self._uses[param] += self._counts(param)

    def lookup(self, weight: Tensor, ids: Tensor) -> None:
        """Note a lookup of token ids, [rows, …], in an embedding."""
        if self._counts(weight):
            if weight not in self._tokens:
                self._tokens[weight] = Tokens(weight, self.layout, self._squares)
            self._tokens[weight].see(ids)

    def _counts(self, param: Tensor) -> bool:
        """False for the recomputation of a checkpoint, whose forward was counted.

        Reentrant checkpointing shows its forward without gradients, so there the recomputation counts.
        """
        if torch._C._current_graph_task_id() == -1:  # no backward is running
            self._in_forward.add(param)
            return True
        return param not in self._in_forward

    def release(self) -> None:
        """Let go of what was kept; a loss that is held on to would hold it too."""
        self._kept.clear()
        self._repeated.clear()
        self._tokens.clear()
        self._products.scratch.clear()

    def fits(self, x: Tensor, params: Iterable[Tensor | None], packed: bool = True) -> bool:
        """Whether the examples can be seen in ``x``; if not, remember whom it concerns.

        ``packed=False``: for what would mix sequences that lie in one row.
        """
        if self.layout.fits(x) and (packed or isinstance(self.layout, Rows)):
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
        if self._uses[param] > 1:
            self._repeated[param].append((a, d))
            return self._returning(param, d.flatten(0, 1).T @ a.flatten(0, 1))
        grad = torch.empty_like(param, dtype=wide(param.dtype))
        self._products.square(param, [(a, d)], grad, self._tokens.get(param))
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
            raise self._uncovered(
                param, "it is looked up inside a reentrant checkpoint and used outside of it too"
            )
        if self._squares.bases.get(param, (None, None))[0] is not None:
            raise self._uncovered(param, "it is an embedding, whose rows a basis must not mix")
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
        self._square_alone(param, example, h)

    def convolution(
        self, param: Tensor, x: Tensor, d: Tensor, gradients: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """x: [rows, in, …], d: [rows, out, …]; ``gradients(x, d, n=…)`` of n examples. Returns their sum."""
        self._seen.add(param)
        if self._is_small(param):
            h = gradients(x, d, n=self.num_examples)
            return self._returning(param, self._keep(param, h.to(wide(h.dtype))))
        total = torch.zeros_like(param, dtype=wide(param.dtype))
        for i in range(self.num_examples):
            h = gradients(x[i :: self.num_examples], d[i :: self.num_examples], n=1)[0]
            total += h
            self._square_alone(param, i, h)
        return self._returning(param, total)

    def _square_alone(self, param: Tensor, example: int, h: Tensor) -> None:
        """Square one example's gradient of a large weight's only use, but for an embedding's rows."""
        if self._uses[param] > 1:
            raise self._uncovered(
                param, "a large weight of a fused head or a convolution is used elsewhere too"
            )
        rows, h = rows_per_block(param), self._squares.rotated(param, h)
        for start in range(0, param.shape[0], rows):
            block = h[start : start + rows].to(wide(h.dtype), copy=True)
            if param in self._tokens:
                self._tokens[param].take(example, start, block)
            self._squares.add(param, block[None], start)

    def finish(self, param: Tensor, grad: Tensor) -> None:
        """The leaf hook: every use of ``param`` has been through its backward."""
        if param in self.misfits:
            raise self._uncovered(param, f"a layer does not see the examples: {self.misfits[param]}")
        if param not in self._seen:
            raise self._uncovered(param, "it was used outside the layers whose gradients are captured")
        if self._returned is not None:
            parts = self._returned.pop(param, [])
            gap = (grad - sum(parts)).abs().max()
            if not parts or gap > 1e-2 * grad.abs().max():
                raise self._uncovered(
                    param, "a part of its gradient did not come through the captured layers"
                )
        if param in self._kept:
            kept = rounded(self._kept.pop(param), param)
            self._squares.add(param, self._squares.rotated(param, kept))
        elif param in self._repeated:
            self._products.square(param, self._repeated.pop(param), None, self._tokens.get(param))
        if param in self._tokens:
            tokens = self._tokens.pop(param)
            self._squares.add_rows(param, tokens.ids, rounded(tokens.grads, param))

    def _is_small(self, param: Tensor) -> bool:
        """Whether its gradients are kept; those of an embedding are kept by token."""
        return self.num_examples * param.numel() <= _SMALL and param not in self._tokens

    def _uncovered(self, param: Tensor, why: str) -> RuntimeError:
        return RuntimeError(
            f"the per-example gradients of {self._describe(param)} cannot be formed: {why}; set "
            "per_device_train_batch_size=1 and accumulate."
        )

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


def _node(param: Tensor | None) -> Any:
    """Where the parameter's gradient arrives in the graph."""
    needed = param is not None and param.requires_grad
    return torch.autograd.graph.get_gradient_edge(param).node if needed else None


def _wanted(node: Any) -> bool:
    """Whether this backward is after the parameter's gradient: ``autograd.grad`` in a loss is not."""
    return node is not None and torch._C._will_engine_execute_node(node)


class Linear(Function):
    """``F.linear`` with a captured weight, [out, in] or (Conv1D) [in, out]; x is [rows, …, in]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, capture: Capture, transposed: bool
    ) -> Tensor:
        y = F.linear(x, weight.T if transposed else weight, bias)
        ctx.weight, ctx.bias, ctx.capture, ctx.transposed = weight, bias, capture, transposed
        ctx.input_dtype = x.dtype
        ctx.nodes = _node(weight), _node(bias)
        ctx.save_for_backward(x.to(y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(d.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                weight = ctx.weight.to(d.dtype)
                grad_x = (d @ (weight.T if ctx.transposed else weight)).to(ctx.input_dtype)
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            d = d.reshape(d.shape[0], -1, d.shape[-1])
            if _wanted(ctx.nodes[0]):
                grad_weight = ctx.capture.dense(ctx.weight, *((d, x) if ctx.transposed else (x, d)))
            if _wanted(ctx.nodes[1]):
                if ctx.bias in ctx.capture.params:
                    grad_bias = ctx.capture.elementwise(ctx.bias, d)
                else:
                    grad_bias = d.sum((0, 1)).to(ctx.bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


class Embedding(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, capture: Capture) -> Tensor:
        ctx.weight, ctx.padding, ctx.capture, ctx.node = weight, padding, capture, _node(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        if not _wanted(ctx.node):
            return None, None, None, None
        return ctx.capture.embedding(ctx.weight, ids, d, ctx.padding), None, None, None


class PerRow(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Capture, dims: int) -> Tensor:
        ctx.param, ctx.capture, ctx.node = param, capture, _node(param)
        return capture.layout.copies(param, dims)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if not _wanted(ctx.node):
            return None, None, None
        return ctx.capture.elementwise(ctx.param, d), None, None


class PerExample(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Capture, example: int) -> Tensor:
        ctx.param, ctx.capture, ctx.example, ctx.node = param, capture, example, _node(param)
        return param.view_as(param)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if _wanted(ctx.node):
            ctx.capture.whole(ctx.param, ctx.example, d)
        return d, None, None
