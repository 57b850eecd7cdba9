"""Where Q comes from when several examples share a backward: per-example weight gradients, layer by layer.

A layer's weight gradient is ``G = Σ_i D_iᵀ A_i`` over the examples of the micro-batch, with A the layer's
input and D the gradient of its output. Computing it one example at a time costs the same arithmetic, and
every term is the example's ``h_i``, to be squared into Q while it is in the cache. Nothing of the size
[examples, out, in] exists for a large layer.

While a ``capture`` lasts, the layers that own a gated parameter run through the autograd functions below.
Small parameters (norms, biases, adapter factors) keep their ``h_i`` until the backward is through with
them, because they may be used more than once; so does an embedding that is tied to the head.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from hf_poprisk import kernels

# Elements of G, Q and h_i that are worked on together: three of these fit a core's cache.
_BLOCK = 1 << 16
# Up to this many elements, the gradients of all examples are kept side by side.
_SMALL = 1 << 17
_DORA = "peft.tuners.lora.dora.DoraLinearLayer"  # by name: PEFT need not be installed


class Uncovered(RuntimeError):
    """A gated parameter is used in a way whose per-example gradients this module cannot form."""


class BatchedGradients:
    """Forms the per-example gradients of the gated parameters of a model.

    Args:
        model: the model, not wrapped by DDP; may be a PEFT model.
        params: its gated parameters.

    Attributes:
        uncovered: name → why, for the gated parameters that no supported layer owns. Not to be used with
            ``capture`` unless empty.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        self._params = {p for p in params if p.requires_grad}
        # whose [1, T] positions are known to be added to the rows, and not taken apart first
        self._positions = {
            child.weight
            for parent in model.modules()
            if type(parent).__module__.startswith("transformers.")
            for child in parent.children()
            if isinstance(child, nn.Embedding)
        }
        self._runs: list[tuple[nn.Module, Callable[..., Any]]] = []
        owned: set[Tensor] = set()
        for module in model.modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p in self._params}
            run = _layer(module, own) if own else None
            if run is not None:
                owned.update(own.values())
                self._runs.append((module, run))
        self.uncovered = {
            name: f"a parameter of {type(model.get_submodule(name.rpartition('.')[0])).__name__}"
            for name, p in model.named_parameters()
            if p in self._params - owned
        }

    @contextmanager
    def capture(self, capture: Capture) -> Iterator[None]:
        """Run the layers through ``capture`` inside this block, which holds the forward and the backward."""
        capture.positions = self._positions
        for module, _ in self._runs:
            if "forward" in vars(module):
                raise RuntimeError(
                    f"the forward of {type(module).__name__} was replaced after BatchedGradients was built: "
                    "build it again."
                )
        for module, run in self._runs:
            module.forward = partial(run, module, capture)
        try:
            yield
        finally:
            for module, _ in self._runs:
                del module.forward
            capture.release()


class Capture:
    """The per-example gradients of one backward.

    Args:
        num_examples: N.
        num_rows: rows of the batch, a multiple of N; row j belongs to example j mod N, which is how TRL
            lays out preference pairs.
        params: the gated parameters.
        square_buffer: parameter → its Q, and whether nothing has been written to it in this window.
        verify: compare what was captured with what autograd accumulated (first micro-batch of a run).
    """

    def __init__(
        self,
        num_examples: int,
        num_rows: int,
        params: Iterable[Tensor],
        square_buffer: Callable[[Tensor], tuple[Tensor, bool]],
        verify: bool,
    ) -> None:
        if num_rows % num_examples:
            raise Uncovered(f"{num_rows} rows do not divide over {num_examples} examples")
        self.num_examples = num_examples
        self.num_rows = num_rows
        self.misfits: dict[Tensor, str] = {}  # parameters seen with a shape that hides the rows
        self.positions: set[Tensor] = set()  # tables whose [1, T] lookups belong to every row
        self._params = set(params)
        self._square_buffer = square_buffer
        self._uses: Counter[Tensor] = Counter()  # in the forward, recomputation aside
        self._in_forward: set[Tensor] = set()  # whose uses were counted there
        self._kept: dict[Tensor, Tensor] = {}  # small parameter → Σ over uses of h, [N, *shape]
        self._inputs: dict[Tensor, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # of repeated layers
        self._tokens: dict[Tensor, _Tokens] = {}  # embedding weight → its rows' gradients
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

    def release(self) -> None:
        """Let go of what was kept; a loss that is held on to would hold it too."""
        self._kept.clear()
        self._inputs.clear()
        self._tokens.clear()
        self._scratch.clear()

    def fits(self, x: Tensor, params: Iterable[Tensor | None]) -> bool:
        """Whether the rows of the batch are the first axis of ``x``; if not, remember whom it concerns."""
        if x.dim() >= 2 and x.shape[0] == self.num_rows:
            return True
        for p in params:
            if self.wants(p):
                self.misfits[p] = f"its input is {list(x.shape)} and the batch has {self.num_rows} rows"
        return False

    def per_row(self, param: Tensor, dims: int) -> Tensor:
        """An elementwise parameter as [rows, 1, …, *shape] with ``dims`` axes, one copy per row."""
        self.used(param)
        return _PerRow.apply(param, self, dims)

    def for_example(self, param: Tensor, example: int) -> Tensor:
        """The parameter, for an operation that is run example by example, in their order.

        Take it right before the example's operations: autograd then squares one example's gradient
        before it forms the next one's.
        """
        if example == 0:
            self.used(param)
        return _PerExample.apply(param, self, example)

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
            return self._returning(param, self._keep(param, _outer(a, d, self.num_examples)))
        if dense_uses > 1:
            self._inputs[param].append((a, d))
            return self._returning(param, _flat(d).T @ _flat(a))
        grad = torch.empty_like(param, dtype=_sum_dtype(param.dtype))
        self._sum_and_square(param, [(a, d)], grad, tokens)
        return self._returning(param, grad)

    def elementwise(self, param: Tensor, h: Tensor) -> Tensor:
        """h: [rows, *shape]. Returns the sum over rows."""
        self._seen.add(param)
        h = h.reshape(-1, self.num_examples, *param.shape).sum(0, dtype=_sum_dtype(h.dtype))
        return self._returning(param, self._keep(param, h))

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
            wide = h.to(_sum_dtype(h.dtype))
            kept = self._kept.get(param)
            if kept is None:
                kept = self._kept[param] = wide.new_zeros(self.num_examples, *param.shape)
            kept[example] += wide
            return
        if self._uses[param] - (tokens.uses if tokens else 0) > 1:
            raise Uncovered("a large weight is used both by a fused head and elsewhere")
        target, fresh = self._square_buffer(param)
        rows = self._rows_per_block(param)
        for start in range(0, param.shape[0], rows):
            block = h[start : start + rows].to(target.dtype, copy=True)
            if tokens is not None:
                tokens.take(example, start, block)
            if fresh:
                torch.mul(block, block, out=target[start : start + rows])
            else:
                target[start : start + rows].addcmul_(block, block)

    def finish(self, param: Tensor, grad: Tensor) -> None:
        """The leaf hook: every use of ``param`` has been through its backward.

        Raises:
            Uncovered: the gradient is not made of what was captured.
        """
        if param not in self._seen:
            raise Uncovered("it was used outside the layers whose gradients are captured")
        if self._returned is not None:
            parts = self._returned.pop(param, [])
            gap = (grad - sum(parts)).abs().max()
            if not parts or gap > 1e-2 * grad.abs().max():
                raise Uncovered("a part of its gradient did not come through the captured layers")
        if param in self._kept:
            target, fresh = self._square_buffer(param)
            squares = self._kept.pop(param).square_().sum(0)
            target.copy_(squares) if fresh else target.add_(squares)
        elif self._inputs.get(param):
            self._sum_and_square(param, self._inputs.pop(param), None, self._tokens.get(param))
        if param in self._tokens:
            target, fresh = self._square_buffer(param)
            if fresh:
                target.zero_()
            tokens = self._tokens.pop(param)
            target.index_add_(0, tokens.ids, tokens.grads.square_())

    def _returning(self, param: Tensor, grad: Tensor) -> Tensor:
        grad = grad.to(param.dtype)
        if self._returned is not None:
            self._returned[param].append(grad.clone())
        return grad

    def _keep(self, param: Tensor, h: Tensor) -> Tensor:
        """Add [N, *shape] to the examples' gradients of a small parameter; returns their sum."""
        total = h.sum(0)
        self._kept[param] = self._kept[param].add_(h) if param in self._kept else h
        return total

    def _rows_per_block(self, param: Tensor) -> int:
        if param.device.type != "cpu":  # launches cost more than the cache saves
            return param.shape[0]
        return max(1, _BLOCK // (param.numel() // param.shape[0]))

    def _sum_and_square(
        self,
        param: Tensor,
        uses: list[tuple[Tensor, Tensor]],
        grad: Tensor | None,
        tokens: _Tokens | None,
    ) -> None:
        """``grad = Σ_i h_i`` (if given) and ``Q += Σ_i h_i²``, h_i summed over the uses."""
        target, fresh = self._square_buffer(param)
        if tokens is None and len(uses) == 1 and uses[0][0].shape[:2] == (self.num_examples, 1):
            a, d = (x[:, 0] for x in uses[0])
            if grad is not None:
                grad.copy_(d.T @ a)
            wide_a, wide_d = (x.to(target.dtype).square() for x in (a, d))
            target.copy_(wide_d.T @ wide_a) if fresh else target.addmm_(wide_d.T, wide_a)
            return
        if tokens is None and len(uses) == 1 and grad is not None and grad.dtype == torch.float32:
            a, d = uses[0]
            if kernels.usable(a, d, grad, target) and self._fused_is_faster(a, d, grad):
                return kernels.weight_gradient(d, a, self.num_examples, grad, target, fresh)
        self._one_by_one(uses, grad, target, fresh, tokens)

    def _fused_is_faster(self, a: Tensor, d: Tensor, grad: Tensor) -> bool:
        (rows, length, width), out = a.shape, d.shape[-1]
        # lengths differ from batch to batch: one measurement for all up to a power of two
        key = (a.device, a.dtype, self.num_examples, rows, length.bit_length(), width, out)

        def ways() -> tuple[Callable[[], None], Callable[[], None]]:
            spare = torch.empty_like(grad), torch.empty_like(grad)
            return (
                partial(kernels.weight_gradient, d, a, self.num_examples, *spare, True),
                partial(self._one_by_one, [(a, d)], *spare, True, None),
            )

        return kernels.faster(key, ways)

    def _one_by_one(
        self,
        uses: list[tuple[Tensor, Tensor]],
        grad: Tensor | None,
        target: Tensor,
        fresh: bool,
        tokens: _Tokens | None,
    ) -> None:
        """``_sum_and_square`` with one matrix product per example, block of rows and use."""
        n, rows = self.num_examples, self._rows_per_block(target)
        # per example and use: D_iᵀ [out, tokens] and A_i [tokens, in]
        factors = [[(_flat(d[i::n]).T, _flat(a[i::n])) for a, d in uses] for i in range(n)]
        low = None if factors[0][0][0].dtype == target.dtype else factors[0][0][0].dtype
        for start in range(0, target.shape[0], rows):
            stop = min(start + rows, target.shape[0])
            squares = target[start:stop]
            total = None if grad is None else grad[start:stop]
            h = self._scratch_like(squares, target.dtype)
            rounded = h if low is None else self._scratch_like(squares, low)
            for i, parts in enumerate(factors):
                # the first example needs no scratch: it is the sum so far
                first = i == 0 and total is not None and tokens is None
                into = total if first else h
                product = into if low is None else rounded  # in the inputs' dtype, as autograd rounds it
                for k, (dt, a) in enumerate(parts):
                    block = dt if rows >= target.shape[0] else dt[start:stop]
                    torch.mm(block, a, out=product) if k == 0 else product.addmm_(block, a)
                if low is not None:
                    into.copy_(product)
                if total is not None and not first:
                    total.copy_(into) if i == 0 else total.add_(into)
                if tokens is not None:
                    tokens.take(i, start, into)
                if i == 0 and fresh:
                    torch.mul(into, into, out=squares)
                else:
                    squares.addcmul_(into, into)

    def _scratch_like(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (dtype, like.device)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._scratch[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)


class _Tokens:
    """The rows of an embedding's gradient that the examples touch, one row per example and token.

    Attributes:
        ids: token of each row, [rows of it] int64, sorted within an example.
        grads: their gradients, [rows of it, width].
    """

    def __init__(self, vocabulary: int, width: int, num_examples: int) -> None:
        self.uses = 0
        self._vocabulary, self._width, self._num_examples = vocabulary, width, num_examples
        self._keys: Tensor | None = None  # example · vocabulary + token, sorted

    def see(self, ids: Tensor) -> None:
        """Forward: ids [rows, …]."""
        keys = self._key(ids).unique()
        self._keys = keys if self._keys is None else torch.cat([self._keys, keys]).unique()
        self.ids = self._keys % self._vocabulary
        self._per_example: list[list[int]] | None = None
        self.grads: Tensor | None = None

    def _key(self, ids: Tensor) -> Tensor:
        example = torch.arange(ids.shape[0], device=ids.device) % self._num_examples
        return (ids.reshape(ids.shape[0], -1) + self._vocabulary * example[:, None]).reshape(-1)

    def _rows(self, dtype: torch.dtype) -> Tensor:
        if self.grads is None:
            self.grads = torch.zeros(
                len(self.ids), self._width, dtype=_sum_dtype(dtype), device=self.ids.device
            )
        return self.grads

    def add(self, ids: Tensor, d: Tensor, padding: int | None) -> Tensor:
        """Add the gradients of one lookup; returns the rows of this lookup alone."""
        d = d.reshape(-1, self._width).to(_sum_dtype(d.dtype))
        if padding is not None:
            d = d.masked_fill((ids.reshape(-1) == padding)[:, None], 0)
        h = torch.zeros_like(self._rows(d.dtype))
        h.index_add_(0, torch.searchsorted(self._keys, self._key(ids)), d)
        self._rows(d.dtype).add_(h)
        return h

    def take(self, example: int, start: int, block: Tensor) -> None:
        """Move the example's rows out of ``block``, rows ``start`` … of its gradient: they are not final."""
        if self._per_example is None:
            edges = torch.arange(self._num_examples + 1, device=self.ids.device) * self._vocabulary
            self._edges = torch.searchsorted(self._keys, edges).tolist()
            ids = self.ids.tolist()
            self._per_example = [ids[lo:hi] for lo, hi in zip(self._edges[:-1], self._edges[1:], strict=True)]
        mine, offset = self._per_example[example], self._edges[example]
        lo, hi = bisect_left(mine, start), bisect_left(mine, start + block.shape[0])
        if lo < hi:
            where = self.ids[offset + lo : offset + hi] - start
            self._rows(block.dtype)[offset + lo : offset + hi].add_(block[where])
            block[where] = 0


def _node(param: Tensor | None) -> Any:
    """Where the parameter's gradient arrives in the graph."""
    needed = param is not None and param.requires_grad
    return torch.autograd.graph.get_gradient_edge(param).node if needed else None


def _wanted(node: Any) -> bool:
    """Whether this backward is after the parameter's gradient: ``autograd.grad`` in a loss is not."""
    return node is not None and torch._C._will_engine_execute_node(node)


class _Linear(Function):
    """``F.linear`` with a gated weight, [out, in] or (Conv1D) [in, out]; x is [rows, …, in]."""

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
                h = d.sum(1)
                gated = ctx.capture.gates(ctx.bias)
                grad_bias = ctx.capture.elementwise(ctx.bias, h) if gated else h.sum(0).to(ctx.bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


class _Embedding(Function):
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


class _PerRow(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Capture, dims: int) -> Tensor:
        ctx.param, ctx.capture, ctx.node = param, capture, _node(param)
        ones = (1,) * (dims - 1 - param.dim())
        return param.view(1, *ones, *param.shape).expand(capture.num_rows, *ones, *param.shape)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if not _wanted(ctx.node):
            return None, None, None
        h = d.reshape(ctx.capture.num_rows, *ctx.param.shape)
        return ctx.capture.elementwise(ctx.param, h), None, None


class _PerExample(Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, capture: Capture, example: int) -> Tensor:
        ctx.param, ctx.capture, ctx.example, ctx.node = param, capture, example, _node(param)
        return param.view_as(param)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        if _wanted(ctx.node):
            ctx.capture.whole(ctx.param, ctx.example, d)
        return d, None, None


def _layer(module: nn.Module, own: Mapping[str, Tensor]) -> Callable[..., Any] | None:
    """How to run a module that owns gated parameters; None where there is no way."""
    if "forward" in vars(module):
        return None  # somebody else has replaced it
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return _run_linear if set(own) <= {"weight", "bias"} else None
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return _run_embedding if plain and set(own) == {"weight"} else None
    if forward is nn.LayerNorm.forward or forward is nn.RMSNorm.forward:
        return _run_norm if len(module.normalized_shape) == 1 else None
    if f"{type(module).__module__}.{type(module).__qualname__}" == _DORA:
        return _run_dora
    return _run_elementwise if _is_elementwise(module, own) else None


def _run_linear(module: Any, capture: Capture, *args: Tensor, **kwargs: Tensor) -> Tensor:
    x, weight, bias = _input(args, kwargs), module.weight, module.bias
    if not (capture.wants(weight) or capture.wants(bias)) or not capture.fits(x, (weight, bias)):
        return type(module).forward(module, x)
    transposed = isinstance(module, Conv1D)
    if not capture.wants(weight):  # frozen or ungated: only the bias goes row by row
        y = F.linear(x, weight.T if transposed else weight)
        return y + capture.per_row(bias, y.dim()).to(y.dtype)
    for p in (weight, bias):
        if capture.wants(p):
            capture.used(p)
    return _Linear.apply(x, weight, bias, capture, transposed)


def _run_embedding(module: Any, capture: Capture, *args: Any, **kwargs: Any) -> Any:
    if not capture.wants(module.weight):
        return type(module).forward(module, *args, **kwargs)
    with _EmbeddingMode(module.weight, capture):  # subclasses scale or mask around the lookup
        return type(module).forward(module, *args, **kwargs)


class _EmbeddingMode(TorchFunctionMode):
    """Sends the lookups in one weight through ``_Embedding``."""

    def __init__(self, weight: Tensor, capture: Capture) -> None:
        super().__init__()
        self._weight, self._capture = weight, capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding or args[1] is not self._weight:
            return func(*args, **kwargs)
        ids, capture, weight = args[0], self._capture, self._weight
        if ids.dim() == 2 and ids.shape[0] == 1 and weight in capture.positions:
            ids = ids.expand(capture.num_rows, *ids.shape[1:])  # positions, the same for every row
        if not capture.fits(ids, (weight,)):  # ids of one axis may as well be positions
            return func(*args, **kwargs)
        if capture.used(weight):
            tokens = capture._tokens.setdefault(
                weight, _Tokens(weight.shape[0], weight.shape[1], capture.num_examples)
            )
            tokens.uses += 1
            tokens.see(ids)
        padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
        return _Embedding.apply(weight, ids, padding, capture)


def _run_norm(module: Any, capture: Capture, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """LayerNorm and torch's RMSNorm take no weight with a row axis: normalise first, then scale."""
    x = _input(args, kwargs)
    params = (module.weight, getattr(module, "bias", None))
    if not any(capture.wants(p) for p in params) or not capture.fits(x, params):
        return type(module).forward(module, x)
    if isinstance(module, nn.LayerNorm):
        y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    else:
        y = F.rms_norm(x, module.normalized_shape, None, module.eps)
    weight, bias = (capture.per_row(p, x.dim()) if capture.wants(p) else p for p in params)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _run_elementwise(module: nn.Module, capture: Capture, *args: Any, **kwargs: Any) -> Any:
    """Any module whose parameters only scale or shift the last axis: give it one copy per row."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if capture.wants(p)}
    x = _input(args, kwargs)
    if not own or not capture.fits(x, own.values()):
        return type(module).forward(module, *args, **kwargs)
    try:
        for name, p in own.items():
            module._parameters[name] = capture.per_row(p, x.dim())  # type: ignore[assignment]
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(own)  # type: ignore[arg-type]


def _run_dora(module: Any, capture: Capture, x: Tensor, **kwargs: Any) -> Tensor:
    """PEFT's DoRA layer gives ``m·f − base``: run it with the magnitude m fixed, then scale by row."""
    magnitude = module.weight
    if not capture.wants(magnitude) or not capture.fits(x, (magnitude,)):
        return type(module).forward(module, x, **kwargs)
    base = kwargs["base_layer"]
    if kwargs.get("base_result") is None:  # so it is when x went through dropout
        kwargs["base_result"] = base(x)

    def lora_weight(**adapters: Any) -> Tensor:
        with capture.paused():  # PEFT runs an identity matrix through the factors, for a norm it detaches
            return type(module).get_lora_weight(module, **adapters)

    module.get_lora_weight = lora_weight
    fixed = magnitude.detach().masked_fill(magnitude == 0, 1.0)
    module._parameters["weight"] = fixed  # type: ignore[assignment]
    try:
        y = type(module).forward(module, x, **kwargs)
    finally:
        module._parameters["weight"] = magnitude
        del module.get_lora_weight
    base_result = kwargs["base_result"]
    if base.bias is not None:
        base_result = base_result - base.bias
    return (y + base_result) * (capture.per_row(magnitude, x.dim()) / fixed) - base_result


def _is_elementwise(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Try it: with a copy per row, does the module compute the same and give each row its gradient?"""
    if next(module.children(), None) is not None or any(p.dim() != 1 for p in own.values()):
        return False
    first = next(iter(own.values()))
    if first.device.type == "meta" or len({p.shape for p in own.values()}) > 1:
        return False
    module = copy.deepcopy(module)  # its forward may count or remember
    own = {name: module._parameters[name] for name in own}  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3), (2, 3, 2)):
        x = torch.randn(*shape, first.numel(), generator=generator).to(first.device, first.dtype)
        try:
            with torch.random.fork_rng(devices=[]):
                expected_y, expected = _probe(module, own, x, rowwise=False)
                y, h = _probe(module, own, x, rowwise=True)
        except Exception:  # code of the user's, on an input that it was not made for
            return False
        pairs = [(y, expected_y), *zip(h, expected, strict=True)]
        if not all(torch.allclose(a.float(), b.float(), rtol=3e-2, atol=3e-2) for a, b in pairs):
            return False
    return True


def _probe(
    module: nn.Module, own: Mapping[str, Tensor], x: Tensor, rowwise: bool
) -> tuple[Tensor, list[Tensor]]:
    """Output, and per parameter the gradients of the two rows, [2, width]: at once, or row by row."""
    saved = dict(module._parameters)
    weight = torch.linspace(0.5, 1.5, x.numel(), device=x.device, dtype=x.dtype).view_as(x)
    try:
        if rowwise:
            ones = (1,) * (x.dim() - 2)
            copies = {
                n: p.detach().expand(2, *ones, -1).contiguous().requires_grad_() for n, p in own.items()
            }
            module._parameters.update(copies)  # type: ignore[arg-type]
            with torch.enable_grad():
                y = type(module).forward(module, x)
                grads = torch.autograd.grad((y * weight).sum(), list(copies.values()))
            return y.detach(), [g.reshape(2, -1) for g in grads]
        outputs, rows = [], []
        for row in range(2):
            copies = {n: p.detach().clone().requires_grad_() for n, p in own.items()}
            module._parameters.update(copies)  # type: ignore[arg-type]
            with torch.enable_grad():
                y = type(module).forward(module, x[row : row + 1])
                rows.append(torch.autograd.grad((y * weight[row : row + 1]).sum(), list(copies.values())))
            outputs.append(y.detach())
        return torch.cat(outputs), [torch.stack(g) for g in zip(*rows, strict=True)]
    finally:
        module._parameters.clear()
        module._parameters.update(saved)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument, whatever a layer calls it."""
    return args[0] if args else next(iter(kwargs.values()))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _outer(a: Tensor, d: Tensor, num_examples: int) -> Tensor:
    """Every example's ``D_iᵀ A_i`` at once, [N, out, in], in the dtype of sums."""
    a, d = (
        x.reshape(-1, num_examples, *x.shape[1:]).transpose(0, 1).reshape(num_examples, -1, x.shape[-1])
        for x in (a, d)
    )
    return torch.bmm(d.transpose(1, 2), a).to(_sum_dtype(a.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
