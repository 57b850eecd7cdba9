"""The factors of every linear layer's per-example gradients, without any parameter's gradient.

A linear layer's gradient is ``H_i = D_iᵀ A_i``, with A_i the layer's input of example i and D_i the gradient
of its output. A backward that only goes through the activations yields both, whether the weight is trained,
frozen, quantised or under an adapter, for about two thirds of the arithmetic of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_poprisk.per_example.layout import by_example

See = Callable[[str, Tensor, Tensor], None]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → layer, of all linear layers but for those of adapters."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name
    }


class LinearFactors:
    """The factors of some layers in one forward and backward.

    Args:
        model: its parameters are frozen during the forward.
        layers: of it, name → layer.
        see: is given a layer's name, A [N, tokens, in] and D [N, tokens, out], where z depends on it, in
            the dtype of the activations. The rows of an example, and the calls of a layer that is called
            several times, stand one after the other along the tokens.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], see: See) -> None:
        self._model, self._layers, self._see = model, layers, see
        self._inputs: dict[str, list[Tensor]] = {}
        self._grads: dict[str, dict[int, Tensor]] = {}
        self._num_examples = self._num_rows = 0
        self._lengths: set[int] = set()  # of the rows, in tokens

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run the model's forward inside this block."""
        with ExitStack() as stack:
            for p in self._model.parameters():
                stack.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(False)
            for name, module in self._layers.items():
                stack.enter_context(module.register_forward_hook(partial(self._after, name)))
            yield

    def backward(self, z: Tensor, rows_per_example: int = 1) -> None:
        """Backpropagate the examples' z, [N]; row j of what the layers see is of example j mod N.

        Raises:
            ValueError: a layer does not see the examples as rows.
        """
        self._num_examples, self._num_rows = len(z), len(z) * rows_per_example
        z.sum().backward()
        for name in list(self._grads):  # z does not depend on all calls of these
            self._show(name)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # of a reference model, say
        calls = self._inputs.setdefault(name, [])
        calls.append(args[0].detach())
        if args[0].dim() == 3:
            self._lengths.add(args[0].shape[1])
        if not output.requires_grad:  # all that comes before it is frozen
            output = output.detach().requires_grad_().clone()  # what follows may work in place
        output.register_hook(partial(self._before, name, len(calls) - 1))
        return output

    def _before(self, name: str, call: int, d: Tensor) -> None:
        grads = self._grads.setdefault(name, {})
        grads[call] = d
        if len(grads) == len(self._inputs[name]):
            self._show(name)

    def _show(self, name: str) -> None:
        grads, inputs = self._grads.pop(name), self._inputs.pop(name)
        # a call with one row of its own is of a table that all examples share: relative positions
        calls = [i for i in sorted(grads) if self._num_rows == 1 or inputs[i].shape[0] > 1]
        if not calls:
            return
        a, d = ([self._by_example(name, x[call]) for call in calls] for x in (inputs, grads))
        self._see(name, *(x[0] if len(x) == 1 else torch.cat(x, 1) for x in (a, d)))

    def _by_example(self, name: str, x: Tensor) -> Tensor:
        """[rows, …, width] as [N, tokens of all its rows, width]."""
        if x.dim() == 2 and x.shape[0] in {self._num_rows * length for length in self._lengths}:
            x = x.reshape(self._num_rows, -1, x.shape[-1])  # the tokens of all rows, one after the other
        if x.shape[0] != self._num_rows:
            raise ValueError(
                f"the gradients of {name} do not show single examples: its input is {list(x.shape)}, "
                f"which does not show the {self._num_rows} rows of the micro-batch."
            )
        return by_example(x, self._num_examples)
