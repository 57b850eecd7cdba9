"""One accumulation window: micro-steps, ranks, and which backward holds which examples.

A tensor hook on a leaf parameter sees the gradient of *this* backward, before it is accumulated into
``.grad`` and before DDP reduces it. That is the example's contribution ``h_i``, exactly, for every
architecture; ``G`` needs no buffer, because it is what ``.grad`` holds when the window closes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from hf_poprisk.per_example.basis import Sides
from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.layers import BatchedGradients
from hf_poprisk.per_example.layout import Layout
from hf_poprisk.per_example.ranks import gathered
from hf_poprisk.per_example.squares import SquareSum

VERIFIED_EVERY = 100  # windows: a loss may change in the course of a run


class ExampleWindow:
    """Accumulates ``Q = Σ h_i²`` over the backwards of one optimizer step.

    Q is zero at every step boundary, so it is not part of any checkpoint.

    Args:
        params: the parameters whose squares are summed; plain dense tensors.
        names: parameter → name, only for messages.
        others: further ones, which ``no_example`` watches too.
        bases: parameter → basis in which its squares are summed.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        names: Mapping[Tensor, str] | None = None,
        others: Iterable[Tensor] = (),
        bases: Mapping[Tensor, Sides] | None = None,
    ) -> None:
        self.squares = SquareSum(params, bases)
        self.params = self._params = self.squares.params  # with a .grad; what autograd sees of them
        self._others = list(others)
        self.names: Mapping[Tensor, str] = names or {}
        self._fired: set[Tensor] = set()  # parameters seen by the backward in progress
        self._met: set[Tensor] = set()  # by those of this window
        self._stamp: tuple[object, ...] | None = None
        self._windows = 0  # that have ended
        self._verified = False  # of several examples in a backward: once in a while
        self.num_examples = 0  # on this rank
        self.shared: set[Tensor] = set()  # parameters whose gradient may hold a term of no example

    @contextmanager
    def example(self, num_examples: int = 1) -> Iterator[None]:
        """Capture the one backward inside this block as one example's contribution.

        Args:
            num_examples: more than one if they have no gradient.

        Raises:
            RuntimeError: the gradients changed since the last example (clipped, unscaled, or touched
                by a backward outside the block), none was produced, or a parameter's gradient came in
                several parts, whose squares do not add up to the square of their sum.
        """

        def square(param: Tensor, grad: Tensor) -> None:
            self._check_part(param, grad)
            self.squares.add(param, self.squares.rotated(param, grad[None]))

        with self._backward(square, self._params):
            yield
        self.num_examples += num_examples

    @contextmanager
    def no_example(self, allowed: Iterable[Tensor]) -> Iterator[set[Tensor]]:
        """Let the backward inside this block add to the gradients what belongs to no example.

        A penalty on the weights is of that kind. It goes into G, and not into Q.

        Args:
            allowed: the parameters that may get such a gradient.

        Yields:
            The parameters that got one, filled by the backward.

        Raises:
            RuntimeError: as ``example``; or another parameter got a gradient.
        """
        expected, met = set(allowed), set[Tensor]()

        def see(param: Tensor, grad: Tensor) -> None:
            met.add(param)

        with self._backward(see, self._params + self._others):
            self.shared = expected
            yield met
        if met - expected:
            names = ", ".join(self.describe(p) for p in list(met - expected)[:3])
            raise RuntimeError(
                f"the loss reaches {names} by another way than the model's outputs, which it did not at the "
                "start of the run: set per_device_train_batch_size=1 and accumulate."
            )

    @contextmanager
    def batch(self, layers: BatchedGradients, layout: Layout) -> Iterator[Capture]:
        """Capture the one forward and backward inside this block as those of several examples.

        Args:
            layers: of the model; its ``uncovered`` must be empty.
            layout: which part of the batch belongs to which example.

        Raises:
            RuntimeError: as ``example``; or a gradient that is not made of what was captured.
        """
        capture = Capture(layout, self.squares, self.describe, verify=not self._verified)

        def finish(param: Tensor, grad: Tensor) -> None:
            self._check_part(param, grad)
            capture.finish(param, grad)

        with layers.capture(capture), self._backward(finish, self._params):
            yield capture
        self._verified = True
        self.num_examples += layout.num_examples

    @contextmanager
    def _backward(self, hook: Callable[[Tensor, Tensor], None], params: list[Tensor]) -> Iterator[None]:
        """Call ``hook(param, grad)`` for each trainable parameter when this backward is through with it."""
        gradients = [g for g in self._gradients() if g is not None]
        if not gradients:
            self.reset()  # the accumulated gradient is gone, so is what was collected beside it
        elif self._stamp is not None:
            self._check_untouched()
        elif torch.nn.utils.get_total_norm(gradients):
            raise RuntimeError(
                "the first example of a step found gradients that are not zero: call "
                "optimizer.zero_grad() after optimizer.step()."
            )
        self._fired.clear()
        handles = [p.register_hook(partial(hook, p)) for p in params if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._stamp = self._grad_stamp()

    def _check_part(self, param: Tensor, grad: Tensor) -> None:
        if param in self._fired:
            raise RuntimeError(
                f"the gradient of {self.describe(param)} arrived in several parts within one backward, "
                "so the square of the example's gradient cannot be formed: use non-reentrant "
                "checkpointing (gradient_checkpointing_kwargs={'use_reentrant': False}) and one "
                "backward per example."
            )
        if grad.is_sparse:
            raise RuntimeError(
                f"{self.describe(param)} has sparse gradients, which the gate does not support: "
                "build its embedding with sparse=False."
            )
        self._fired.add(param)
        self._met.add(param)

    @torch.no_grad()
    def reduce(self) -> tuple[int, dict[Tensor, Tensor]]:
        """End the window: ``b`` and Q over all ranks, in the units of the reduced ``.grad``.

        DDP averages gradients over W ranks, so ``Q ← (Σ_ranks Q) / W²``. Every rank must call it.

        Returns:
            The number of examples over all ranks, and for every parameter with a gradient its Q (a
            buffer that the next window overwrites).

        Raises:
            RuntimeError: gradients without any captured example, or changed since the last one.
        """
        with_grad = [p for p in self.params if p.grad is not None]
        if with_grad and not self.num_examples:
            raise RuntimeError(
                "the gate is on but saw no example: run each example's backward inside "
                "`with optimizer.example():`, or train with PopRiskTrainer or one of its siblings."
            )
        self._check_untouched()
        sq_sums, num_examples = self._reduce_squares(with_grad), self.num_examples
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            count = torch.tensor(num_examples, device=with_grad[0].device if with_grad else None)
            dist.all_reduce(count)
            num_examples = int(count)
        return num_examples, sq_sums

    def _reduce_squares(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        return self.squares.reduce(params)

    def add_over_shards(self, sums: Tensor) -> Tensor:
        """Sums over what this rank holds of each parameter, [P, …], over all of it."""
        return sums

    def so_far(self) -> dict[Tensor, Tensor]:
        """Q before the window ends, in the units of ``.grad``, where its examples are of several ranks."""
        return self.squares.so_far()

    def never_seen(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that no example of this window reached, on any rank; all must ask."""
        asked = list(params)
        seen = zip(*gathered([self.leaf(p) in self._met for p in asked]), strict=True)
        return [p for p, ranks in zip(asked, seen, strict=True) if not any(ranks)]

    def leaf(self, param: Tensor) -> Tensor:
        """What autograd sees of a parameter."""
        return param

    def reset(self) -> None:
        """Forget the window; the buffers stay for the next one."""
        self.squares.reset()
        self.shared = set()
        self._met.clear()
        self._windows += self.num_examples > 0
        self._verified &= self._windows % VERIFIED_EVERY > 0
        self._stamp = None
        self.num_examples = 0

    def _gradients(self) -> Iterable[Tensor | None]:
        """What has been accumulated, wherever it is."""
        return (p.grad for p in self._params)

    def _grad_stamp(self) -> tuple[object, ...]:
        return tuple(None if g is None else (g.data_ptr(), g._version) for g in self._gradients())

    def _check_untouched(self) -> None:
        if self._stamp is not None and self._stamp != self._grad_stamp():
            raise RuntimeError(
                "gradients changed between an example's backward and the decision of the gate: call "
                "optimizer.close_window() before clipping or unscaling them, and run every backward "
                "inside `with optimizer.example():`."
            )

    def describe(self, param: Tensor) -> str:
        return self.names.get(param, f"a parameter of shape {tuple(param.shape)}")
