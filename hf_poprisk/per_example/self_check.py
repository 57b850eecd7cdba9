"""Before a run begins: is what the optimizer is shown the gradient that the stock trainer computes?

On the run's first micro-batch, in eval mode, because dropout draws other numbers for an example alone. Each
path's sum over the examples is compared with the gradient of the whole micro-batch, and the squares of the
one-backward path with those of the examples backpropagated alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_poprisk.per_example import BatchedGradients, Capture, Layout, Packed, Rows
from hf_poprisk.per_example.examples import NotSeparable, take
from hf_poprisk.per_example.one_by_one import OneByOne, same_random_numbers
from hf_poprisk.per_example.window import ExampleWindow


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing the same sums may be apart by rounding.

    Args:
        gradient: of a parameter's G, in units of its norm and of √ΣQ.
        square: of a parameter's Q, in units of its sum.
        floor: share of the whole model's gradient that counts as nothing in a single parameter.
    """

    gradient: float
    square: float
    floor: float


EXACT = Tolerance(gradient=1e-3, square=1e-2, floor=1e-4)
LOW_PRECISION = Tolerance(gradient=0.1, square=0.3, floor=0.1)


@dataclass
class Verdict:
    """Why a path is not to be taken; None where it is right.

    Attributes:
        together: all examples in one backward.
        one_by_one: one backward per example.
        shared: the parameters with a term in the loss that belongs to no example.
    """

    together: str | None
    one_by_one: str | None
    shared: set[Tensor]


class SelfCheck:
    """Tries the paths on one micro-batch.

    Args:
        model: not wrapped by DDP.
        window: makes an empty ``ExampleWindow`` over the optimizer's parameters.
        backward: computes the stock loss of a batch and backpropagates it; adds to the gradients.
        tolerance: by the precision of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        window: Callable[[], ExampleWindow],
        backward: Callable[[Any], None],
        tolerance: Tolerance,
    ) -> None:
        self._model, self._window, self._backward, self._tolerance = model, window, backward, tolerance
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._names = {p: name for name, p in model.named_parameters()}

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
        with _eval(self._model), _without_gradients(self._params), same_random_numbers():
            self._backward(inputs)
            stock = self._take_gradients()
            verdict = Verdict(why_not_together, None, set())
            squares: dict[Tensor, Tensor] | None = None
            if not all(bool(g.isfinite().all()) for g in stock.values()):
                return verdict  # nothing to compare with; the optimizer leaves such steps out
            if layers is not None:
                try:
                    window = self._window()
                    with window.batch(layers, layout) as capture, capturing(capture):
                        self._backward(inputs)
                    squares = window.squares.so_far()
                    verdict.together = self._differs(stock, self._take_gradients(), squares)
                except Exception as error:  # of a model on a path that it was not made for
                    verdict.together = _first_line(error)
                self._take_gradients()
            try:
                window = self._window()
                verdict.shared = self._run_one_by_one(inputs, layout, one_by_one, window)
                alone = window.squares.so_far()
                verdict.one_by_one = self._differs(stock, self._take_gradients(), alone)
                if verdict.one_by_one is None:
                    verdict.one_by_one = self._unshared(
                        inputs, layout, one_by_one, verdict.shared & set(window.squares.params)
                    )
            except Exception as error:
                verdict.one_by_one = _first_line(error)
            finally:
                one_by_one.release()
                self._take_gradients()
            if squares is not None and verdict.together is None:
                if verdict.one_by_one is None:
                    verdict.together = self._other_squares(squares, alone)
                elif _could_be_other_rows(inputs, layout):  # nothing vouches for its squares
                    verdict.together = verdict.one_by_one
            return verdict

    def _run_one_by_one(
        self, inputs: Any, layout: Layout, one_by_one: OneByOne, window: ExampleWindow
    ) -> set[Tensor]:
        while True:
            with one_by_one.cached(layout, learn=True), window.no_example(self._params) as met:
                self._backward(inputs)
            if not one_by_one.refine():
                break
            self._take_gradients()
            window.reset()
        for example in range(layout.num_examples):
            with window.example():
                one_by_one.backward(example)
        return met

    def _unshared(
        self,
        inputs: Any,
        layout: Layout,
        one_by_one: OneByOne,
        params: set[Tensor],
    ) -> str | None:
        """Is what reaches parameters by another way than the outputs the same whatever the examples?"""
        if not params:
            return None
        terms = []
        for examples in ([*range(layout.num_examples)], [0]):
            batch, part = some_examples(inputs, layout, examples, self._model)
            with one_by_one.cached(part):
                self._backward(batch)
            terms.append(self._take_gradients())
        for p in params:
            gap = (terms[0][p] - terms[1].get(p, torch.zeros_like(p))).norm()
            if not gap <= 10 * self._tolerance.gradient * terms[0][p].norm():
                return (
                    f"the loss reaches {self._names[p]} by another way than the model's outputs, and "
                    "differently for each example, where poprisk_exclude could leave it ungated"
                )
        return None

    def _differs(
        self, stock: dict[Tensor, Tensor], ours: dict[Tensor, Tensor], squares: dict[Tensor, Tensor]
    ) -> str | None:
        noise = {p: float(q.sum()) ** 0.5 for p, q in squares.items()}
        total = sum(float(g.norm()) ** 2 for g in stock.values()) ** 0.5
        total = max(total, sum(x**2 for x in noise.values()) ** 0.5)
        for p in self._params:
            g, h = (x[p] if p in x else torch.zeros_like(p) for x in (stock, ours))
            gap, size = float((g - h).norm()), float(g.norm())
            allowed = size + noise.get(p, 0.0) + self._tolerance.floor * total
            if not gap <= self._tolerance.gradient * allowed:
                return f"the gradient of {self._names[p]} would be {gap / size if size else 1:.0%} off"
        return None

    def _other_squares(self, squares: dict[Tensor, Tensor], alone: dict[Tensor, Tensor]) -> str | None:
        total = sum(float(q.sum()) for q in alone.values())
        for p, q in alone.items():
            allowed = float(q.sum()) + self._tolerance.floor**2 * total
            if (
                not float((q - squares.get(p, torch.zeros_like(q))).abs().sum())
                <= self._tolerance.square * allowed
            ):
                return f"the per-example gradients of {self._names[p]} are not those of the examples alone"
        return None

    def _take_gradients(self) -> dict[Tensor, Tensor]:
        """The accumulated gradients, which are taken away."""
        taken = {p: p.grad for p in self._params if p.grad is not None}
        for p in taken:
            p.grad = None
        return taken


def some_examples(inputs: Any, layout: Layout, examples: list[int], model: nn.Module) -> tuple[Any, Layout]:
    """Some examples as a micro-batch of their own."""
    batch = take(inputs, layout, examples, getattr(model, "config", None))
    if isinstance(layout, Packed):
        return batch, Packed(tuple(layout.lengths[i] for i in examples))
    return batch, Rows(len(examples), layout.num_rows // layout.num_examples * len(examples))


def _could_be_other_rows(inputs: Any, layout: Layout) -> bool:
    """Whether [tokens, rows] could pass for [rows, tokens]."""
    values = inputs.values() if hasattr(inputs, "values") else inputs
    shapes = (x.shape for x in values if isinstance(x, Tensor) and x.dim() > 1)
    return isinstance(layout, Packed) or any(shape[1] == layout.num_rows for shape in shapes)


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0].partition("; set ")[0]
    return text if isinstance(error, NotSeparable | RuntimeError) else f"{type(error).__name__}: {text}"


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):  # cuDNN has no backward in eval mode
            module.training = training[module] and not module.dropout
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _without_gradients(params: Iterable[Tensor]) -> Iterator[None]:
    before = {p: p.grad for p in params}
    for p in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before.items():
            p.grad = grad


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Leave TRL's metrics as they are: a loss that is tried out is not logged."""
    before = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if before is not None:
            trainer._metrics = before
