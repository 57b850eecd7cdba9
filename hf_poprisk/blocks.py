"""The blocks in which an optimizer is shown the examples: one backward, or several, of the coming step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_poprisk.per_example import BatchedGradients, Capture, ExampleWindow, Layout
from hf_poprisk.per_example.basis import Sides
from hf_poprisk.per_example.sharded import ShardedModel, ShardedWindow


class ExampleBlocks(torch.optim.Optimizer):
    """The part of ``PopRiskAdamW`` that opens windows, on parameters which it can name."""

    gate: str
    estimator: str
    bases: Mapping[Tensor, Sides] = {}  # of the parameters that have one
    _names: dict[Tensor, str]
    _ungated: set[Tensor]
    _sharded: ShardedModel | None = None
    _window: ExampleWindow | None = None
    _openness: dict[Tensor, Tensor] | None = None  # q, once the window is closed

    @property
    def needs_examples(self) -> bool:
        """Whether backwards must run inside ``example()``."""
        return self.gate != "none"

    @property
    def gated_parameters(self) -> list[Tensor]:
        """The trainable parameters under the gate, in group order; empty when it is off."""
        trainable = (p for p in self._all_parameters() if p.requires_grad)
        return [p for p in trainable if self.gate != "none" and p not in self._ungated]

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Names for messages and records, if the optimizer was not given any."""
        self._names = {p: name for name, p in named_parameters}
        self._window = None

    @property
    def names(self) -> Mapping[Tensor, str]:
        """From ``name_parameters``, or as the optimizer was given them; records leave out what has none."""
        given = (zip(g["params"], g.get("param_names", ()), strict=False) for g in self.param_groups)
        return {p: name for named in given for p, name in named} | self._names

    def describe(self, param: Tensor) -> str:
        """A parameter's name, or else its shape."""
        return self.names.get(param, f"a parameter of shape {tuple(param.shape)}")

    def follow(self, model: nn.Module) -> None:
        """Collect the examples' squares where FSDP2 reduces the gradients of this model.

        Call it on every rank, between ``fully_shard`` and the first example. The squares take one more
        reduction, of 4 bytes per gated parameter, whenever FSDP2 reduces gradients.

        Args:
            model: on which ``fully_shard`` was called; holds all parameters of this optimizer.

        Raises:
            NotImplementedError: parameters that are sharded in another way, or not.
            ValueError: gradients that would not be summed in float32.
        """
        if not self.needs_examples:
            raise NotImplementedError(
                "without a gate, and with estimator='ema', there are no examples to follow."
            )
        self._sharded = ShardedModel(model, self._all_parameters(), self.describe)
        self._window = None

    def example(self, num_examples: int = 1) -> AbstractContextManager[None]:
        """Block around the backward of one example (of one micro-batch with ``estimator="group"``).

        Args:
            num_examples: more than one if they have no gradient.

        Raises:
            RuntimeError: see ``ExampleWindow.example``; or the window was closed and not stepped.
        """
        if not self.needs_examples:
            return nullcontext()
        return self._free_window().example(num_examples)

    def no_example(self, allowed: Iterable[Tensor]) -> AbstractContextManager[set[Tensor]]:
        """Block around a backward whose gradients belong to no example; see ``ExampleWindow.no_example``."""
        return self._free_window().no_example(allowed)

    def batch(self, layers: BatchedGradients, layout: Layout) -> AbstractContextManager[Capture | None]:
        """Block around the forward and the backward of several examples; the sums are those of ``example``.

        Args:
            layers: ``BatchedGradients(model, optimizer.gated_parameters)`` with nothing uncovered.
            layout: ``Rows(N, rows)`` if row j belongs to example j mod N; ``Packed(lengths)`` for sequences
                packed into one row.

        Raises:
            RuntimeError: see ``ExampleWindow.batch``.
            ValueError: with ``estimator="group"``, whose unit is the batch: use ``example``.
        """
        if self.estimator == "group":
            raise ValueError("estimator='group' takes a batch as one unit: use optimizer.example().")
        if not self.needs_examples:
            return nullcontext()
        return self._free_window().batch(layers, layout)

    def _free_window(self) -> ExampleWindow:
        """The window, not closed."""
        window = self._open_window()
        if self._openness is not None:
            if any(p.grad is not None for p in self.gated_parameters):
                raise RuntimeError("an example after close_window(): first call step() and zero_grad().")
            self._end_window()  # the step was skipped, by a loss scaler for instance
        return window

    def _open_window(self) -> ExampleWindow:
        if self._window is None:
            self._window = self.new_window()
        return self._window

    def new_window(self) -> ExampleWindow:
        """An empty window over the parameters, apart from the optimizer's own."""
        # with those that are frozen now: they may be trained later
        every = list(self._all_parameters())
        gated = dict.fromkeys(p for p in every if self.needs_examples and p not in self._ungated)
        others = [p for p in every if p not in gated]
        if self._sharded is not None:
            return ShardedWindow(gated, self._sharded, self.names, others)
        if any(isinstance(p, DTensor) for p in gated):
            raise NotImplementedError(
                "the gate must be told of the model that shards its parameters: call optimizer.follow(model) "
                "after fully_shard(model)."
            )
        return ExampleWindow(gated, self.names, others, self.bases)

    def _end_window(self) -> None:
        self._openness = None
        if self._window is not None:
            self._window.reset()

    def _all_parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])
