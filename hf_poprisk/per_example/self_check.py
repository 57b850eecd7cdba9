"""Before a run begins: is what is squared the gradient that the stock trainer computes?

On the run's first micro-batch each path's sum over the examples is compared with the gradient of the whole
micro-batch, and the squares of the path in one backward with those of the examples backpropagated alone. In
train mode if nothing random is drawn there, else in eval mode: dropout draws other numbers for an example
alone. Gradients, buffers, attributes and random numbers are afterwards as they were. A micro-batch without a
gradient, or with one of rounding alone, says nothing of any path, and the next one is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.examples import NotSeparable, take
from hf_poprisk.per_example.fsdp2 import is_sharded, local
from hf_poprisk.per_example.layers import BatchedGradients
from hf_poprisk.per_example.layout import Layout, Packed, wide
from hf_poprisk.per_example.one_by_one import OneByOne
from hf_poprisk.per_example.undisturbed import mode, random_state, same_random_numbers, undisturbed
from hf_poprisk.per_example.window import ExampleWindow


@dataclass(frozen=True)
class _Tolerance:
    """How far two ways of computing the same sums may be apart by rounding."""

    gradient: float  # of a parameter's G, in units of its norm and of √ΣQ
    square: float  # of a parameter's Q, in units of its sum
    floor: float  # share of the whole model's gradient that counts as nothing in a single parameter
    loss: float  # in units of its size
    rounding: float  # of a weight, in units of its size


_EXACT = _Tolerance(gradient=1e-3, square=1e-2, floor=1e-3, loss=1e-4, rounding=2**-22)
_LOW_PRECISION = _Tolerance(gradient=0.1, square=0.3, floor=0.01, loss=2e-2, rounding=2**-7)
# Of a term that belongs to no example: it is computed from the same weights in the same way.
_SAME = 1e-2
_ELSEWHERE = "another rank's loss"
_Gradients = dict[Tensor, Tensor]


@dataclass
class Verdict:
    """What a rank found out. A path is right where there is no reason against it; parameters go by name."""

    not_together: str | None = None  # of all examples in one backward
    not_one_by_one: str | None = None  # of one backward per example
    shared: set[str] = field(default_factory=set)  # parameters with a term in the loss of no example
    unreached: set[str] = field(default_factory=set)  # those of them that no example's backward reaches
    finite: bool = True
    no_gradient: bool = False  # but for rounding

    @classmethod
    def of(cls, ranks: Sequence[Verdict]) -> Verdict | None:
        """Of all ranks; None if no step will be taken, or no micro-batch adds to its gradient."""
        found = [verdict for verdict in ranks if not verdict.no_gradient]
        if not found or not all(verdict.finite for verdict in ranks):
            return None
        together, one_by_one = (
            min((why for v in found if (why := getattr(v, path))), key=_ELSEWHERE.__eq__, default=None)
            for path in ("not_together", "not_one_by_one")
        )
        shared, unreached = zip(*((v.shared, v.unreached) for v in found), strict=True)
        return cls(together, one_by_one, set().union(*shared), set().union(*unreached))


class SelfCheck:
    """Tries the paths on one micro-batch.

    Args:
        model: not wrapped by DDP.
        inputs: the micro-batch.
        layout: of it.
        window: makes an empty ``ExampleWindow`` over the parameters.
        backward: computes the stock loss of a batch, backpropagates it, and returns it.
        low_precision: whether some of the arithmetic is coarser than float32.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        layout: Layout,
        window: Callable[[], ExampleWindow],
        backward: Callable[[Any], float],
        low_precision: bool,
    ) -> None:
        self._model, self._inputs, self._layout = model, inputs, layout
        self._window, self._backward = window, backward
        self._tolerance = _LOW_PRECISION if low_precision else _EXACT
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._stock: _Gradients = {}
        self._stock_loss = 0.0
        self._shared: set[Tensor] = set()
        self._draws = self._keeps_state = False

    def run(
        self,
        layers: BatchedGradients | None,
        capturing: Callable[[Capture], AbstractContextManager[Any]],
        one_by_one: OneByOne,
        why_not_together: str | None,
    ) -> Verdict:
        """Compare the paths.

        Args:
            layers: of the path in one backward; None if it is out of the question.
            capturing: what else that path needs around its forward and backward.
            one_by_one: learns here where the examples are in the model's outputs.
            why_not_together: why ``layers`` is None.

        Raises:
            NotSeparable: what FSDP2 does not recover from, the other ranks being in the middle of a pass.
        """
        verdict = self._verdict = Verdict(not_together=why_not_together)
        self._one_by_one = one_by_one
        with mode(self._model, training=True):
            self._run_stock()
            verdict.no_gradient = not self._distance(self._stock, {})
        with mode(self._model, training=not self._draws):
            if self._draws:
                self._run_stock()
            broken = any(not bool(g.isfinite().all()) for g in self._stock.values())
            if self._over_shards([[float(broken)]])[0][0]:
                verdict.finite = False
                return verdict
            together: _Gradients = {}
            if layers is not None:
                verdict.not_together, together = self._try(partial(self._run_together, layers, capturing))
            verdict.not_one_by_one, alone = self._try(self._run_alone)
            verdict.shared = {self._names[p] for p in self._shared}
            if verdict.not_one_by_one is None:
                verdict.not_one_by_one = self._reason(self._check_parts)
            one_by_one.release()
            if layers is not None and verdict.not_together is None:
                verdict.not_together = self._squares_differ(together, alone)
            if verdict.not_one_by_one is None and self._keeps_state:
                verdict.not_one_by_one = "the model keeps state in its forward, which examples alone change"
        doubt = verdict.not_one_by_one if layers is None else verdict.not_together
        if self._over_shards([[float(doubt is not None)]])[0][0] and not verdict.no_gradient:
            with mode(self._model, training=True):
                verdict.no_gradient = self._is_rounding()
        return verdict

    # -- passes ------------------------------------------------------------------------------------------

    def _run_stock(self) -> None:
        """The gradient to compare with; sees whether the pass draws random numbers and changes buffers."""

        def watched() -> float:
            random = tree_leaves(random_state())
            buffers = {name: b.clone() for name, b in self._model.named_buffers()}
            loss = self._backward(self._inputs)
            self._draws = not all(map(np.array_equal, random, tree_leaves(random_state())))
            self._keeps_state |= any(
                name in buffers and not torch.equal(b, buffers[name])
                for name, b in self._model.named_buffers()
            )
            return loss

        self._stock, self._stock_loss = self._fresh(watched)

    def _run_together(
        self,
        layers: BatchedGradients,
        capturing: Callable[[Capture], AbstractContextManager[Any]],
        window: ExampleWindow,
    ) -> float:
        with window.batch(layers, self._layout) as capture, capturing(capture):
            return self._backward(self._inputs)

    def _run_alone(self, window: ExampleWindow) -> float:
        one_by_one, layout = self._one_by_one, self._layout
        while True:
            with one_by_one.cached(layout, learn=True), same_random_numbers():
                self._backward(self._inputs)
            self._take_gradients()
            if not one_by_one.refine():
                break
        with one_by_one.cached(layout), window.no_example(self._params) as met:
            loss = self._backward(self._inputs)
        self._shared = set(met)
        reached: set[Tensor] = set()
        with ExitStack() as stack:
            for p in met:
                hook = window.leaf(p).register_hook(lambda _, p=p: reached.add(p))
                stack.callback(hook.remove)
            for example in range(layout.num_examples):
                with window.example():
                    one_by_one.backward(example)
        self._verdict.unreached = {self._names[p] for p in self._shared - reached}
        return loss

    def _is_rounding(self) -> bool:
        """Whether the gradient is another one with weights that differ by rounding.

        Of that kind are the differences of what should be equal: pairs of twice the same text, a distance
        from a reference that has the same weights.
        """
        self._run_stock()
        gradients, weights = self._stock, [local(p) for p in self._params]
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad(), same_random_numbers():
            for weight in weights:
                weight.mul_(1 + self._tolerance.rounding * torch.empty_like(weight).uniform_(-1, 1))
        try:
            self._run_stock()
        finally:
            with torch.no_grad():
                for weight, old in zip(weights, before, strict=True):
                    weight.copy_(old)
        return not self._distance(self._stock, gradients) < 0.5 * self._distance(gradients, {})

    def _distance(self, some: _Gradients, others: _Gradients) -> float:
        gaps = (some[p] - others[p] if p in others else some[p] for p in self._params if p in some)
        return self._over_shards([[sum(float(gap.norm()) ** 2 for gap in gaps)]])[0][0] ** 0.5

    def _fresh(self, run: Callable[[], Any]) -> tuple[_Gradients, Any]:
        """A pass that finds everything as at the start, and leaves it so: its gradients, what it returns."""
        with undisturbed(self._model, self._params):
            returned = run()
            return self._take_gradients(), returned

    def _take_gradients(self) -> _Gradients:
        """The accumulated gradients, which are taken away."""
        taken: _Gradients = {p: local(p.grad) for p in self._params if p.grad is not None}
        for p in taken:
            p.grad = None
        return taken

    def _over_shards(self, rows: list[list[float]]) -> list[list[float]]:
        """Sums over what this rank holds of each parameter, over all of it."""
        sums = torch.tensor(rows, dtype=torch.float64, device=self._params[0].device)
        return self._window().add_over_shards(sums).tolist()

    # -- comparisons -------------------------------------------------------------------------------------

    def _try(self, run: Callable[[ExampleWindow], float]) -> tuple[str | None, _Gradients]:
        """Why a path is wrong, if it is, and the squares that it gives."""
        window, found = self._window(), []
        reason = self._reason(lambda: found.append(self._fresh(partial(run, window))))
        return reason or self._difference(*found[0], window.so_far()), window.so_far()

    def _reason(self, run: Callable[[], Any]) -> str | None:
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a model on a path that it was not made for
            text = (str(error).strip() or type(error).__name__).splitlines()[0].partition("; set ")[0]
            known = isinstance(error, RuntimeError | NotSeparable)
            reason = text if known else f"{type(error).__name__}: {text}"
            if is_sharded(self._model):
                raise NotSeparable(reason) from error
            return reason
        return None

    def _difference(self, ours: _Gradients, loss: float, squares: _Gradients) -> str | None:
        rows = []
        for p in self._params:
            g, h = (x[p] if p in x else torch.zeros_like(local(p)) for x in (self._stock, ours))
            both = float((g - h).norm()) ** 2, float(g.norm()) ** 2
            rows.append([*both, float(squares[p].sum()) if p in squares else 0.0])
        stock = self._stock_loss
        wrong = abs(loss - stock) > self._tolerance.loss * max(abs(stock), 1e-3)
        *rows, (anywhere, *_) = self._over_shards([*rows, [float(wrong), 0.0, 0.0]])
        if anywhere:
            return f"the loss would be {loss:.4g} and not {stock:.4g}" if wrong else _ELSEWHERE
        size = sum(size for _, size, _ in rows)
        if not size and not self._verdict.no_gradient:
            return "dropout aside there is no gradient to compare with"
        total = max(size, sum(noise for *_, noise in rows)) ** 0.5
        worst, name, off = 1.0, "", 0.0
        for p, row in zip(self._params, rows, strict=True):
            gap, size, noise = (x**0.5 for x in row)
            allowed = size + noise + self._tolerance.floor * total
            excess = gap / (self._tolerance.gradient * allowed) if allowed else float(gap > 0)
            if not excess <= worst:
                worst, name, off = excess, self._names[p], gap / size if size else 1.0
        return f"the gradient of {name} would be {off:.0%} off" if name else None

    def _check_parts(self) -> None:
        """One by one: are the rows the examples', and is what no example owns the same whatever they are?"""
        one_by_one, n = self._one_by_one, self._layout.num_examples
        some = partial(some_examples, self._inputs, self._layout, model=self._model)
        first, _ = some([0])
        self._fresh(lambda: one_by_one.check_rows(self._layout, lambda: self._backward(first)))
        gated = [p for p in self._window().params if p in self._shared]
        if not gated:
            return

        def shared_terms(batch: Any, part: Layout) -> float:
            with one_by_one.cached(part):
                return self._backward(batch)

        parts = [some(examples) for examples in ([*range(n)], [0], [n - 1])]
        whole, *others = (self._fresh(partial(shared_terms, *part))[0] for part in parts)
        for other in others:
            gaps = ((whole[p] - other.get(p, torch.zeros_like(whole[p]))).norm() for p in gated)
            rows = [
                [float(gap) ** 2, float(whole[p].norm()) ** 2] for gap, p in zip(gaps, gated, strict=True)
            ]
            for p, (gap, size) in zip(gated, self._over_shards(rows), strict=True):
                if not gap <= _SAME**2 * size:
                    raise NotSeparable(
                        f"the loss reaches {self._names[p]} by another way than the model's outputs, and "
                        "differently for each example, where poprisk_exclude could leave it ungated"
                    )

    def _squares_differ(self, together: _Gradients, alone: _Gradients) -> str | None:
        if self._verdict.not_one_by_one is not None:
            # Random numbers drawn inside the model are others for an example alone: no fault of this path.
            vouched = self._draws and not _could_be_other_rows(self._inputs, self._layout)
            return None if vouched else f"examples alone: {self._verdict.not_one_by_one}"
        params = [p for p in self._params if p in together or p in alone]
        rows = []
        for p in params:
            nothing = torch.zeros_like(local(p), dtype=wide(p.dtype))
            q, other = alone.get(p, nothing), together.get(p, nothing)
            rows.append([float(q.sum()), float((q - other).abs().sum())])
        rows = self._over_shards(rows) if rows else []
        total = sum(size for size, _ in rows)
        for p, (size, gap) in zip(params, rows, strict=True):
            if not gap <= self._tolerance.square * (size + self._tolerance.floor**2 * total):
                return f"the per-example gradients of {self._names[p]} are not those of the examples alone"
        return None


def some_examples(inputs: Any, layout: Layout, examples: list[int], model: nn.Module) -> tuple[Any, Layout]:
    """Some examples as a micro-batch of their own; one may be there twice."""
    return take(inputs, layout, examples, getattr(model, "config", None)), layout.of(examples)


def _could_be_other_rows(inputs: Any, layout: Layout) -> bool:
    """Whether [tokens, rows] could pass for [rows, tokens]."""
    values = inputs.values() if hasattr(inputs, "values") else inputs
    shapes = (x.shape for x in values if isinstance(x, Tensor) and x.dim() > 1)
    return isinstance(layout, Packed) or any(shape[1] == layout.num_rows for shape in shapes)
