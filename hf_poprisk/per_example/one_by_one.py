"""The examples of a micro-batch backpropagated one by one, each with the weight that the loss gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from hf_poprisk.per_example.examples import NotSeparable, num_rows, take
from hf_poprisk.per_example.fsdp2 import kept_gathered
from hf_poprisk.per_example.layout import Layout, Rows, Slot, find, joined, part_of
from hf_poprisk.per_example.undisturbed import random_state, same_random_numbers, set_random_state

_Outputs = list[tuple[nn.Module, Any]]  # modules and what they gave, in the order of the calls


@dataclass
class _Call:
    """One call of the model within the loss."""

    layout: Layout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[_Outputs] = field(default_factory=list)  # of each example, with the graph behind them
    state: Any = None  # of the random generators, before the last example
    modules: list[nn.Module] = field(default_factory=list)  # of the cut, in the order of their calls
    slots: list[list[Slot]] = field(default_factory=list)  # of what each of them gave


class OneByOne:
    """The gradients of a micro-batch's loss, example by example, whatever the loss makes of them.

    As in the gradient cache of Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup" (arXiv:2101.06983), with chunks of one example, whose graphs are kept. Inside ``cached`` the model
    is run on each example alone, and the loss is computed from the outputs put side by side. Its backward
    ends at these outputs and leaves its slope there. ``backward`` then sends an example's part of the slope
    back through the example. So each keeps the weight that the loss gives it, and the sum over the examples
    is the gradient of the loss. Time is that of the examples alone, memory that of the micro-batch.

    Where a model computes its loss itself, the cut is at the outputs of its parts instead of its own: see
    ``refine``.

    Args:
        model: the model, not wrapped by DDP.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cut: list[nn.Module] = [model]  # whose outputs are cached
        self._slots: dict[tuple[int, int, Any], Slot] = {}  # call, output, path in it → the examples
        self._calls: list[_Call] = []
        self._kept = ExitStack()  # as long as there are graphs

    @contextmanager
    def cached(self, layout: Layout, learn: bool = False) -> Iterator[None]:
        """Run the loss, and its backward, on a micro-batch inside this block.

        Args:
            layout: of the micro-batch.
            learn: find out where the examples are in the outputs: once, in eval mode.
        """
        self.release()
        self._kept.enter_context(kept_gathered(self._model))
        if learn:
            self._slots = {}
        answer = partial(self._answer, self._model.forward, layout, learn)
        with _replaced({self._model: answer}):
            yield

    def check(self) -> None:
        """After the loss's backward: was its slope at outputs that belong to examples?

        Raises:
            NotSeparable: it was at others, too.
        """
        if modules := self._entangled():
            raise NotSeparable(
                f"the loss depends on an output of {type(modules[0]).__name__} that no example owns"
            )

    def backward(self, example: int, through: Callable[..., Any] | None = None) -> None:
        """Backpropagate one example of the last micro-batch.

        Args:
            example: its index.
            through: DDP, which must see the forward of a backward that it is to synchronise: the example,
                the last one, is run again.
        """
        tensors, slopes = [], []
        for call in self._calls:
            outputs, call.outputs[example] = call.outputs[example], []
            if through is not None:
                args, kwargs = self._piece(call, example)
                with same_random_numbers(), self._recorded() as outputs:
                    set_random_state(call.state)
                    through(*args, **kwargs)
            for (_, output), slots in zip(outputs, call.slots, strict=True):
                for (_, tensor), slot in zip(_leaves(output), slots, strict=True):
                    if slot.slope is not None and slot.axis is not None and tensor.requires_grad:
                        tensors.append(tensor)
                        slopes.append(part_of(slot.slope, slot, call.layout, example).to(tensor.dtype))
        if tensors:
            torch.autograd.backward(tensors, slopes)
        if not any(outputs for call in self._calls for outputs in call.outputs):
            self._kept.close()

    def release(self) -> None:
        """Let go of the last micro-batch."""
        self._calls = []
        self._kept.close()

    # -- once per run ------------------------------------------------------------------------------------

    def check_rows(self, layout: Layout, run: Callable[[], Any]) -> None:
        """If the model was called on other rows: were the first example's those that it has alone?

        Args:
            layout: of the micro-batch.
            run: computes the loss of the first example alone.

        Raises:
            NotSeparable: the loss lays out the rows of its examples in another way.
        """
        if all(call.layout == layout for call in self._calls):
            return
        expected, original, seen = [self._piece(call, 0) for call in self._calls], self._model.forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                seen.append((args, kwargs))
            return original(*args, **kwargs)

        with _replaced({self._model: forward}):
            run()
        for ours, its_own in zip(expected, seen, strict=True):
            for (_, x), (_, y) in zip(_leaves(ours), _leaves(its_own), strict=False):
                comparable = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
                if comparable and not torch.equal(x, y):
                    raise NotSeparable("the rows that the model is called on are not example after example")

    def refine(self) -> bool:
        """Move the cut into the modules at whose outputs the loss has a slope that no example owns.

        Such an output is a loss that a module computed itself, from the labels it was given.

        Returns:
            Whether there was such a module.
        """
        slots = [slot for call in self._calls for of_module in call.slots for slot in of_module]
        # of a loss without a gradient where it would have one is all there is to see
        flat = not any(slot.slope is not None and bool(slot.slope.any()) for slot in slots)
        entangled = self._entangled(flat)
        if entangled:
            kept = [module for module in self._cut if module not in entangled]
            self._cut = list(dict.fromkeys([*kept, *self._parts(entangled)]))
        return bool(entangled)

    def _entangled(self, flat: bool = False) -> list[nn.Module]:
        """The modules of the cut with a slope, or ``flat`` one, at an output that belongs to no example."""
        return [
            module
            for call in self._calls
            for module, slots in zip(call.modules, call.slots, strict=True)
            if any(
                slot.axis is None and slot.slope is not None and (flat or bool(slot.slope.any()))
                for slot in slots
            )
        ]

    def _parts(self, modules: list[nn.Module]) -> list[nn.Module]:
        """The submodules that these call, and not one another; found out on the first example."""
        cut = self._cut
        self._cut = [part for module in modules for part in module.modules() if part is not module]
        try:
            called: list[nn.Module] = []
            for call in self._calls:
                with torch.no_grad():
                    called += [module for module, _ in self._run(call, 0)]
            return called
        finally:
            self._cut = cut

    # -- the micro-batch ---------------------------------------------------------------------------------

    def _answer(
        self, original: Callable[..., Any], layout: Layout, learn: bool, /, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's answer to the whole micro-batch, from its answers to the examples."""
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        with _replaced({self._model: original}):
            call = _Call(self._layout_of(layout, args, kwargs), args, kwargs)
            self._run_examples(call, learn)
            answers = [
                self._join((len(self._calls), k), [output for _, output in parts], call)
                for k, parts in enumerate(zip(*call.outputs, strict=True))
            ]
            self._calls.append(call)
            with self._answered(call.modules, answers):
                return self._model.forward(*args, **kwargs)

    def _layout_of(self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """Of a call of the model, which may have other rows than the micro-batch."""
        if not isinstance(layout, Rows):
            return layout
        main_input = getattr(self._model, "main_input_name", "input_ids")
        rows = num_rows(kwargs if main_input in kwargs else (args, kwargs), main_input)
        if rows is None or rows % layout.num_examples:
            raise NotSeparable(f"the model is called on {rows} rows for {layout.num_examples} examples")
        return Rows(layout.num_examples, rows)

    def _run_examples(self, call: _Call, learn: bool) -> None:
        for example in range(call.layout.num_examples):
            if example == call.layout.num_examples - 1:
                call.state = random_state()
            call.outputs.append(self._run(call, example))
        call.modules = [module for module, _ in call.outputs[0]]
        if any([module for module, _ in outputs] != call.modules for outputs in call.outputs):
            raise NotSeparable("the model's parts are called in another order for some of the examples")
        if learn:
            with torch.no_grad(), self._recorded() as whole:
                self._model.forward(*call.args, **call.kwargs)
            self._learn(len(self._calls), whole, call)

    def _run(self, call: _Call, example: int) -> _Outputs:
        args, kwargs = self._piece(call, example)
        with self._recorded() as outputs:
            self._model.forward(*args, **kwargs)
        return outputs

    def _piece(self, call: _Call, example: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """An example's arguments."""
        config = getattr(self._model, "config", None)
        args = tuple(take(x, call.layout, [example], config) for x in call.args)
        return args, take(call.kwargs, call.layout, [example], config)

    @contextmanager
    def _recorded(self) -> Iterator[_Outputs]:
        """What the modules of the cut give inside this block, in the order of their calls."""
        outputs: _Outputs = []
        inside = False

        def watched(module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a part that another one shares
                return forward(*args, **kwargs)
            inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                inside = False
            outputs.append((module, output))
            return output

        with _replaced({module: partial(watched, module, module.forward) for module in self._cut}):
            yield outputs

    @contextmanager
    def _answered(self, modules: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
        """Let the modules of the cut give these outputs, in order, without being run."""
        left = list(zip(modules, outputs, strict=True))

        def answer(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if not left or left[0][0] is not module:
                raise NotSeparable("the model's parts are called in another order for a single example")
            return left.pop(0)[1]

        with _replaced({module: partial(answer, module) for module in self._cut}):
            yield

    # -- outputs -----------------------------------------------------------------------------------------

    def _learn(self, index: int, whole: _Outputs, call: _Call) -> None:
        if [module for module, _ in whole] != call.modules:
            raise NotSeparable("the model's parts are called in another order for a single example")
        for k, ((_, all_), (_, one)) in enumerate(zip(whole, call.outputs[0], strict=True)):
            for (path, x), (_, y) in zip(*map(_leaves, (all_, one)), strict=True):
                if isinstance(x, Tensor):
                    self._slots[index, k, path] = find(x, y, call.layout)

    def _join(self, key: tuple[int, int], outputs: Sequence[Any], call: _Call) -> Any:
        """The examples' outputs of one module side by side; slots for the loss's slope there."""
        leaves, slots = [], []
        for found in zip(*map(_leaves, outputs), strict=True):
            path, parts = found[0][0], [part for _, part in found]
            slots.append(slot := replace(self._slots.get((*key, path), Slot(None))))
            if not isinstance(parts[0], Tensor):
                leaves.append(parts[0])
                continue
            anchor = torch.zeros((), requires_grad=parts[0].is_floating_point())
            leaves.append(_Joined.apply(anchor, slot, call.layout, *(part.detach() for part in parts)))
        call.slots.append(slots)
        return tree_unflatten(leaves, tree_flatten_with_path(outputs[0])[1])


class _Joined(Function):
    """The examples' tensors as one, without a graph behind it; backward leaves the slope in the slot."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, slot: Slot, layout: Layout, *parts: Tensor) -> Tensor:
        ctx.slot, ctx.parts = slot, len(parts)
        return joined(parts, slot, layout)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        ctx.slot.slope = slope if ctx.slot.slope is None else ctx.slot.slope + slope
        return (None,) * (3 + ctx.parts)


def _leaves(output: Any) -> list[tuple[Any, Any]]:
    """What is in a module's output, and where."""
    return [(tuple(map(str, path)), leaf) for path, leaf in tree_flatten_with_path(output)[0]]


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run something else inside this block."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]
