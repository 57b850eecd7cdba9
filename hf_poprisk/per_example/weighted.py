"""A weight on the gradient of each example, put where the loss meets the model's outputs.

All of an example's gradient flows through what the model gives for it. Multiplied by w_i there, the
accumulated gradient is ``Σ w_i h_i``, whatever the loss is and wherever it is computed, in one backward or
one by one, and whoever sums the squares sees ``w_i h_i``. This takes three things, each of them checked: the
examples lie side by side in the outputs, and each is what it is alone; the loss is a sum over them; and it
reaches no parameter past the outputs. The first two are asked once, of two examples in eval mode; the third
before every backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten_with_path

from hf_poprisk.per_example.examples import NotSeparable
from hf_poprisk.per_example.layout import Rows, find, part_of, wide

Place = tuple[int, str]  # a call of the model within the loss, and where in its output
Outputs = dict[Place, Tensor]
_Edge = tuple[Any, int]  # a node of the graph, and which of its outputs
_NOTHING = 1e-4  # what counts as rounding, in units of what it stands beside
_COPY = "ToCopyBackward0"  # what accelerate gives in float32; a loss of the model's own is of the original
_SINK = "_DDPSinkBackward"  # of DDP, which hands the outputs through one node
_COMPARES = "the loss compares the examples with each other"


class NotASum(NotSeparable):
    """The loss is no sum over the examples of what the model gives for each; other layouts do not help."""


class OutputWeights:
    """Weights the examples in the backward of a loss.

    Args:
        model: not wrapped by DDP.
        rows_per_example: of a collated micro-batch; row j belongs to example j mod N.
    """

    def __init__(self, model: nn.Module, rows_per_example: int = 1) -> None:
        self.model, self._rows = model, rows_per_example
        self._axes: dict[Place, int] | None = None  # where the examples are in what the loss is computed from

    @property
    def learned(self) -> bool:
        """Whether ``learn`` has found the examples; single ones need not be found."""
        return self._axes is not None

    @contextmanager
    def recorded(self) -> Iterator[Outputs]:
        """What the model gives inside this block, where it is called with a graph."""
        outputs: Outputs = {}
        calls = 0

        def see(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal calls
            if not torch.is_grad_enabled():  # for a reference
                return
            for path, x in tree_flatten_with_path(output)[0]:
                if isinstance(x, Tensor) and x.dim() and x.grad_fn is not None:
                    outputs[calls, "".join(map(str, path))] = x
            calls += 1

        handle = self.model.register_forward_hook(see)
        try:
            yield outputs
        finally:
            handle.remove()

    def weigh(self, outputs: Outputs, loss: Tensor, weights: Tensor) -> None:
        """Let the backward of a loss, which has not run yet, weight its examples.

        Args:
            outputs: that were ``recorded`` while the loss was computed.
            loss: scalar.
            weights: one per example of the micro-batch, [N] float.

        Raises:
            NotASum: the loss reaches a parameter past them.
            NotSeparable: outputs of another shape.
        """
        if not loss.requires_grad:
            return  # the backward says what is wrong
        for place, edge in self._met(outputs, loss).items():
            factor, x = weights, outputs[place]
            if len(weights) > 1:
                if x.shape[self._axes[place]] % (len(weights) * self._rows):
                    raise NotSeparable(f"outputs{place[1]} is {list(x.shape)} for {len(weights)} examples")
                factor = self._along(x, self._axes[place], weights)
            edge.node.register_prehook(partial(_scaled, edge.output_nr, factor))

    def _along(self, x: Tensor, axis: int, weights: Tensor) -> Tensor:
        """Weights, [N], in a shape that broadcasts over ``x``, whose axis holds rows, or their tokens."""
        size, rows = x.shape[axis], len(weights) * self._rows
        factor = weights.to(x.device).repeat(self._rows).repeat_interleave(size // rows)
        return factor.view(-1, *(1,) * (x.dim() - axis - 1))

    def _met(self, outputs: Outputs, loss: Tensor) -> dict[Place, GradientEdge]:
        """The outputs that the graph of a loss, followed from its end, meets first.

        Raises:
            NotASum: it ends in a parameter without meeting one, or one is computed from another.
        """
        places: dict[_Edge, Place] = {}
        for place, x in outputs.items():
            if self._axes is None or place in self._axes:
                places.setdefault((x.grad_fn, x.output_nr), place)
                if x.grad_fn.name() == _COPY:
                    places.setdefault(x.grad_fn.next_functions[0], place)
        met, leaves = _follow([(loss.grad_fn, loss.output_nr)], places)
        if leaves:
            names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
            what = next((names[p] for p in leaves if p in names), "a tensor that is no parameter")
            raise NotASum(f"the loss reaches {what} by another way than the outputs of single examples")
        if len(met) > 1 and any(_follow(node.next_functions, met)[0] for node, _ in met):
            raise NotASum("the loss is computed from outputs of the model and from what they are made of")
        return {places[node, nr]: GradientEdge(node, nr) for node, nr in met}

    # -- once per run ------------------------------------------------------------------------------------

    def learn(self, two: Callable[[], Tensor], first: Callable[[], Tensor], tolerance: float) -> None:
        """Find out where the examples are in the outputs, and that weights can be put there.

        Nothing is found out if a loss is not finite.

        Args:
            two: computes the loss of two examples, in eval mode.
            first: of the first of them alone.
            tolerance: how far its outputs may be from those that it has alone, in units of their norm.

        Raises:
            NotASum: they cannot.
            NotSeparable: they cannot in a micro-batch of several examples.
        """
        with self.recorded() as outputs:
            loss = two()
        with self.recorded() as outputs_alone:
            loss_alone = first()
        if not (loss.isfinite() and loss_alone.isfinite()):
            return
        met, met_alone = self._met(outputs, loss), self._met(outputs_alone, loss_alone)
        if met.keys() != met_alone.keys():
            raise NotSeparable("the loss of an example alone is computed from other outputs")
        slopes = torch.autograd.grad(loss, list(met.values()), create_graph=True)
        slopes_alone = torch.autograd.grad(loss_alone, list(met_alone.values()))
        layout, axes = Rows(2, 2 * self._rows), {}
        for place, slope, slope_alone in zip(met, slopes, slopes_alone, strict=True):
            whole, one = outputs[place].detach(), outputs_alone[place].detach()
            slot = find(whole, one, layout)
            if slot.axis is None or whole.shape[slot.axis] % layout.num_rows:
                raise NotSeparable(
                    f"outputs{place[1]} is {list(whole.shape)} for two examples, not side by side"
                )
            if not (part_of(whole, slot, layout, 0) - one).norm() <= tolerance * one.norm():
                raise NotSeparable(f"outputs{place[1]} of an example depends on the others")
            mine = part_of(slope.detach(), slot, layout, 0)
            beside = mine[slope_alone == 0]  # alone there is nothing to compare with
            if beside.norm() > _NOTHING * mine.norm():
                raise NotASum(_COMPARES)
            axes[place] = slot.axis
        self._check_sum(list(met.values()), slopes, list(axes.values()))
        self._axes = axes

    def _check_sum(
        self, edges: Sequence[GradientEdge], slopes: Sequence[Tensor], axes: Sequence[int]
    ) -> None:
        """Is the slope at one example's outputs the same whatever the other's are?"""
        one, other = torch.eye(2)
        generator, probe = torch.Generator().manual_seed(0), torch.zeros(())
        for slope, axis in zip(slopes, axes, strict=True):
            direction = torch.randn(slope.shape, generator=generator).to(slope.device)
            probe = probe + (slope.float() * direction * self._along(slope, axis, one)).sum().to(probe.device)
        if not probe.requires_grad:
            return  # the loss is linear in the outputs
        try:
            second = torch.autograd.grad(probe, edges, allow_unused=True)
        except RuntimeError as error:
            raise NotSeparable(f"whether it is a sum over the examples cannot be seen: {error}") from error
        parts = [(x, axis) for x, axis in zip(second, axes, strict=True) if x is not None]
        own, mixed = (
            sum(float((x * self._along(x, axis, which)).norm()) for x, axis in parts)
            for which in (one, other)
        )
        if not mixed <= _NOTHING * own:
            raise NotASum(_COMPARES)


def _follow(start: Any, until: Any) -> tuple[list[_Edge], list[Tensor]]:
    """Walk a graph back: which edges of ``until`` are met first, and the leaves reached past them."""
    met: dict[_Edge, None] = {}
    leaves: list[Tensor] = []
    seen, left = set(), list(start)
    while left:
        node, nr = left.pop()
        if (node, nr) in until:
            met[node, nr] = None
        elif node is not None and node.name() == _SINK:
            left.append(_through_sink(node, nr))
        elif node is not None and node not in seen:
            seen.add(node)
            left += node.next_functions
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return list(met), leaves


def _through_sink(node: Any, nr: int) -> _Edge:
    """What output ``nr`` of DDP's sink is: the loss reaches no others through it."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return edges[sum(node.needs_input_grad[1 : nr + 1])]  # its first input is DDP itself


def _scaled(nr: int, factor: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    grad = grads[nr]
    if grad is None:
        return grads
    dtype = wide(grad.dtype)
    scaled = (grad.to(dtype) * factor.to(grad.device, dtype)).to(grad.dtype)
    return (*grads[:nr], scaled, *grads[nr + 1 :])
