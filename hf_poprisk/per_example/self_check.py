"""Before a run begins: is what the sinks are shown the gradient that the stock trainer computes?

On the run's first micro-batch each path's sum over the examples is compared with the gradient of the whole
micro-batch, and the squares of the path in one backward with those of the examples backpropagated alone. In
train mode if nothing random is drawn there, else in eval mode: dropout draws other numbers for an example
alone. Gradients, buffers, attributes and random numbers are afterwards as they were.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.examples import NotSeparable, take
from hf_poprisk.per_example.layers import BatchedGradients
from hf_poprisk.per_example.layout import Layout, Packed, Rows, wide
from hf_poprisk.per_example.one_by_one import OneByOne
from hf_poprisk.per_example.random_numbers import random_state, same_random_numbers
from hf_poprisk.per_example.window import ExampleWindow


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing the same sums may be apart by rounding.

    Args:
        gradient: of a parameter's G, in units of its norm and of √ΣQ.
        square: of a parameter's Q, in units of its sum.
        floor: share of the whole model's gradient that counts as nothing in a single parameter.
        loss: of the loss, in units of its size.
    """

    gradient: float
    square: float
    floor: float
    loss: float


EXACT = Tolerance(gradient=1e-3, square=1e-2, floor=1e-3, loss=1e-4)
LOW_PRECISION = Tolerance(gradient=0.1, square=0.3, floor=0.01, loss=2e-2)
# Of a term that belongs to no example: it is computed from the same weights in the same way.
_SAME = 1e-2


@dataclass
class Verdict:
    """Why a path is not to be taken; None where it is right.

    Attributes:
        together: all examples in one backward.
        one_by_one: one backward per example.
        shared: the parameters with a term in the loss that belongs to no example.
        unreached: those of them that no example's backward reaches.
        decided: False if the gradient was not finite: there was nothing to compare with.
    """

    together: str | None = None
    one_by_one: str | None = None
    shared: set[Tensor] = field(default_factory=set)
    unreached: set[Tensor] = field(default_factory=set)
    decided: bool = True


class SelfCheck:
    """Tries the paths on one micro-batch.

    Args:
        model: not wrapped by DDP.
        window: makes an empty ``ExampleWindow`` over the parameters.
        backward: computes the stock loss of a batch, backpropagates it, and returns it.
        tolerance: by the precision of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        window: Callable[[], ExampleWindow],
        backward: Callable[[Any], float],
        tolerance: Tolerance,
    ) -> None:
        self._model, self._window, self._stock, self._tolerance = model, window, backward, tolerance
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._names = {p: name for name, p in model.named_parameters()}
        self._loss = 0.0
        self._draws = self._keeps_state = False

    def run(
        self,
        inputs: Any,
        layout: Layout,
        layers: BatchedGradients | None,
        capturing: Callable[[Capture], AbstractContextManager[Any]],
        one_by_one: OneByOne,
        why_not_together: str | None,
    ) -> Verdict:
        """Compare the paths.

        Args:
            inputs: the micro-batch.
            layout: of it.
            layers: of the path in one backward; None if it is out of the question.
            capturing: what else that path needs around its forward and backward.
            one_by_one: learns here where the examples are in the model's outputs.
            why_not_together: why ``layers`` is None.
        """
        verdict = Verdict(together=why_not_together)
        with _mode(self._model, training=True), _undisturbed(self._model, self._params):
            self._watched(inputs)
            stock, loss = self._take_gradients(), self._loss
        with _mode(self._model, training=not self._draws):
            if self._draws:
                stock, loss = self._fresh(lambda: self._watched(inputs)), self._loss
            if not all(bool(g.isfinite().all()) for g in stock.values()):
                verdict.decided = False
                return verdict
            squares: dict[Tensor, Tensor] | None = None
            if layers is not None:
                window = self._window()

                def together() -> None:
                    with window.batch(layers, layout) as capture, capturing(capture):
                        self._backward(inputs)

                verdict.together = self._try(together, stock, loss, window)
                squares = window.squares.so_far()
            window = self._window()
            verdict.one_by_one = self._try(
                lambda: self._run_one_by_one(inputs, layout, one_by_one, window, verdict), stock, loss, window
            )
            if verdict.one_by_one is None:
                verdict.one_by_one = self._reason(lambda: self._is_whole(inputs, layout, one_by_one, verdict))
            one_by_one.release()
            if squares is not None and verdict.together is None:
                verdict.together = self._squares_differ(
                    squares, window.squares.so_far(), verdict, inputs, layout
                )
            if verdict.one_by_one is None and self._keeps_state:
                verdict.one_by_one = "the model keeps state in its forward, which examples alone would change"
        return verdict

    # -- passes ------------------------------------------------------------------------------------------

    def _backward(self, batch: Any) -> None:
        self._loss = self._stock(batch)

    def _watched(self, inputs: Any) -> None:
        """The stock pass; sees whether it draws random numbers and changes buffers."""
        random = random_state()
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        self._backward(inputs)
        self._draws = not _same(random, random_state())
        self._keeps_state |= any(
            not torch.equal(b, buffers[name]) for name, b in self._model.named_buffers() if name in buffers
        )

    def _fresh(self, run: Callable[[], Any]) -> dict[Tensor, Tensor]:
        """The gradients of a pass that finds everything as at the start, and leaves it so."""
        with _undisturbed(self._model, self._params):
            run()
            return self._take_gradients()

    def _try(
        self, run: Callable[[], Any], stock: dict[Tensor, Tensor], loss: float, window: ExampleWindow
    ) -> str | None:
        """Why a path is wrong."""

        def compare() -> None:
            ours = self._fresh(run)
            if abs(self._loss - loss) > self._tolerance.loss * max(abs(loss), 1e-3):
                raise NotSeparable(f"the loss would be {self._loss:.4g} and not {loss:.4g}")
            self._compare(stock, ours, window.squares.so_far())

        return self._reason(compare)

    @staticmethod
    def _reason(run: Callable[[], Any]) -> str | None:
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except NotSeparable as error:
            return str(error)
        except Exception as error:  # of a model on a path that it was not made for
            text = (str(error).strip() or type(error).__name__).splitlines()[0].partition("; set ")[0]
            return text if isinstance(error, RuntimeError) else f"{type(error).__name__}: {text}"
        return None

    def _run_one_by_one(
        self, inputs: Any, layout: Layout, one_by_one: OneByOne, window: ExampleWindow, verdict: Verdict
    ) -> None:
        while True:
            with one_by_one.cached(layout, learn=True), same_random_numbers():
                self._backward(inputs)
            self._take_gradients()
            if not one_by_one.refine():
                break
        with one_by_one.cached(layout), window.no_example(self._params) as met:
            self._backward(inputs)
        verdict.shared, reached = set(met), set[Tensor]()
        hooks = [p.register_hook(lambda _, p=p: reached.add(p)) for p in met]
        try:
            for example in range(layout.num_examples):
                with window.example():
                    one_by_one.backward(example)
        finally:
            for hook in hooks:
                hook.remove()
        verdict.unreached = verdict.shared - reached

    def _take_gradients(self) -> dict[Tensor, Tensor]:
        """The accumulated gradients, which are taken away."""
        taken = {p: p.grad for p in self._params if p.grad is not None}
        for p in taken:
            p.grad = None
        return taken

    # -- comparisons -------------------------------------------------------------------------------------

    def _compare(
        self, stock: dict[Tensor, Tensor], ours: dict[Tensor, Tensor], squares: dict[Tensor, Tensor]
    ) -> None:
        noise = {p: float(q.sum()) ** 0.5 for p, q in squares.items()}
        total = sum(float(g.norm()) ** 2 for g in stock.values()) ** 0.5
        total = max(total, sum(x**2 for x in noise.values()) ** 0.5)
        worst, name, off = 1.0, "", 0.0
        for p in self._params:
            g, h = (x[p] if p in x else torch.zeros_like(p) for x in (stock, ours))
            gap, size = float((g - h).norm()), float(g.norm())
            allowed = size + noise.get(p, 0.0) + self._tolerance.floor * total
            excess = gap / (self._tolerance.gradient * allowed) if allowed else float(gap > 0)
            if not excess <= worst:
                worst, name, off = excess, self._names[p], gap / size if size else 1.0
        if name:
            raise NotSeparable(f"the gradient of {name} would be {off:.0%} off")

    def _is_whole(self, inputs: Any, layout: Layout, one_by_one: OneByOne, verdict: Verdict) -> None:
        """One by one: are the rows the examples', and is what no example owns the same whatever they are?"""
        first, part = some_examples(inputs, layout, [0], self._model)
        if not one_by_one.has_rows_of(layout):
            self._fresh(lambda: one_by_one.check_rows(lambda: self._backward(first)))
        gated = verdict.shared & set(self._window().squares.params)
        if not gated:
            return
        terms = []
        for examples in ([*range(layout.num_examples)], [0], [layout.num_examples - 1]):
            batch, part = some_examples(inputs, layout, examples, self._model)

            def run(batch: Any = batch, part: Layout = part) -> None:
                with one_by_one.cached(part):
                    self._backward(batch)

            terms.append(self._fresh(run))
        for p in gated:
            for other in terms[1:]:
                gap = (terms[0][p] - other.get(p, torch.zeros_like(p))).norm()
                if not gap <= _SAME * terms[0][p].norm():
                    raise NotSeparable(
                        f"the loss reaches {self._names[p]} by another way than the model's outputs, and "
                        "differently for each example, where poprisk_exclude could leave it ungated"
                    )

    def _squares_differ(
        self,
        together: dict[Tensor, Tensor],
        alone: dict[Tensor, Tensor],
        verdict: Verdict,
        inputs: Any,
        layout: Layout,
    ) -> str | None:
        if verdict.one_by_one is not None:
            # Random numbers drawn inside the model are others for an example alone: no fault of this path.
            vouched = self._draws and not _could_be_other_rows(inputs, layout)
            return None if vouched else f"examples alone: {verdict.one_by_one}"
        total = sum(float(q.sum()) for q in alone.values())
        for p in together.keys() | alone.keys():
            nothing = torch.zeros_like(p, dtype=wide(p.dtype))
            q, other = alone.get(p, nothing), together.get(p, nothing)
            allowed = float(q.sum()) + self._tolerance.floor**2 * total
            if not float((q - other).abs().sum()) <= self._tolerance.square * allowed:
                return f"the per-example gradients of {self._names[p]} are not those of the examples alone"
        return None


def some_examples(inputs: Any, layout: Layout, examples: list[int], model: nn.Module) -> tuple[Any, Layout]:
    """Some examples as a micro-batch of their own; one may be there twice."""
    batch = take(inputs, layout, examples, getattr(model, "config", None))
    if isinstance(layout, Packed):
        return batch, Packed(tuple(layout.lengths[i] for i in examples))
    return batch, Rows(len(examples), layout.num_rows // layout.num_examples * len(examples))


def _could_be_other_rows(inputs: Any, layout: Layout) -> bool:
    """Whether [tokens, rows] could pass for [rows, tokens]."""
    values = inputs.values() if hasattr(inputs, "values") else inputs
    shapes = (x.shape for x in values if isinstance(x, Tensor) and x.dim() > 1)
    return isinstance(layout, Packed) or any(shape[1] == layout.num_rows for shape in shapes)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and not training:  # cuDNN has no backward in eval mode
            module.training = before[module] and not module.dropout
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def _undisturbed(model: nn.Module, params: Iterable[Tensor]) -> Iterator[None]:
    """Without gradients inside this block, and everything as before after it."""
    grads = {p: p.grad for p in params}
    buffers = {b: b.clone() for b in model.buffers() if b.device.type != "meta"}
    attributes = {m: dict(vars(m)) for m in model.modules()}
    # what they hold is restored in place: hooks that a first forward installs, lists of what was seen
    held = [
        (value, value.copy())
        for values in attributes.values()
        for value in values.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    for p in grads:
        p.grad = None
    try:
        with same_random_numbers():
            yield
    finally:
        for p, grad in grads.items():
            p.grad = grad
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
