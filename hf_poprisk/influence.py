"""How far an example's own gradient carries itself: sums over its squared gradient in Adam's metric."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_poprisk import kernels_cpu

# Elements that are worked on together on a CPU: a few of these fit a core's cache.
_PIECE = 1 << 16


class Influence:
    """Two sums per example of one backward, over all parameters k that the optimizer holds.

    With h_i what example i adds to the accumulated gradient, ``scale·h_i`` what of it reaches the optimizer,
    Adam's preconditioner ``P = 1/(√v̂ + ε)`` and its momentum m̂, both of before this step:

    * ``energy[i] = Σ_k lr_k h_ik · clamp(scale·P_k h_ik, ±c)``: to first order, how much the step that is
      being collected lowers the accumulated loss by way of example i's own gradient;
    * ``agreement[i] = scale·Σ_k P_k m̂_k h_ik``: what the steps before taught, scored on this example.

    The bound ``c = √((1 − β₂ᵗ)/(1 − β₂))``, t counting this step, is what this step's v̂, which has the
    square of this very gradient in it, allows at most. It is reached where no example was seen before: rare
    tokens, and everything in the first step.

    Args:
        optimizer: of the Adam family (``exp_avg``, ``exp_avg_sq`` and ``step`` in its state).
        num_examples: N, the examples of the backward.
        scale: what the accumulated gradient is multiplied by until the optimizer sees it: 1/W where DDP
            averages over W ranks, the coefficient of clipping, one over the scale of a loss scaler.

    Attributes:
        energy: [N] float32 (float64 for float64 parameters).
        agreement: [N], the same dtype.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, num_examples: int, scale: Tensor | float = 1.0
    ) -> None:
        self._state = optimizer.state
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._num_examples = num_examples
        self._scale = scale
        self._sums: Tensor | None = None  # [2, N]
        self._key: tuple[int, int, int | None] | None = None
        self._metric: tuple[Tensor, Tensor, float, float]  # of the block that ``_key`` names

    @property
    def params(self) -> list[Tensor]:
        """The trainable parameters that the sums run over."""
        return [p for p in self._groups if p.requires_grad]

    @property
    def energy(self) -> Tensor:
        return self._result()[0]

    @property
    def agreement(self) -> Tensor:
        return self._result()[1]

    def _result(self) -> Tensor:
        return torch.zeros(2, self._num_examples) if self._sums is None else self._sums

    def add(self, param: Tensor, example: int, h: Tensor, start: int = 0) -> None:
        """One example's gradient of rows ``start`` … of a parameter; h: [rows, …]."""
        for offset, piece in _pieces(h):
            self.add_some(param, example, piece[None], start + offset)

    def add_some(self, param: Tensor, first: int, h: Tensor, start: int) -> None:
        """Gradients of the rows ``start`` … of consecutive examples from ``first`` on; h: [n, rows, …]."""
        rows = h.shape[1] if h.dim() > 1 else 1
        found = self._sums_of(self._of_block(param, start, rows), h.reshape(len(h), -1))
        sums = self._into(found)
        sums[:, first : first + len(h)] += found.to(sums.device)

    def add_all(self, param: Tensor, h: Tensor) -> None:
        """Every example's gradient of a whole parameter; h: [N, *shape]."""
        found = self._sums_of(self._of_block(param, 0, None), h.reshape(self._num_examples, -1))
        sums = self._into(found)
        sums.add_(found.to(sums.device))

    def add_rows(self, param: Tensor, rows: Tensor, examples: Tensor, h: Tensor) -> None:
        """Gradients of single rows of a table; rows and examples: [R] int64, h: [R, width]."""
        precondition, signal, *rest = self._of_block(param, 0, None)
        block = (precondition.view(param.shape)[rows], signal.view(param.shape)[rows], *rest)
        found = self._sums_of(block, h)
        sums = self._into(found)
        sums.index_add_(1, examples.to(sums.device), found.to(sums.device))

    def _sums_of(self, block: tuple[Tensor, Tensor, float, float], h: Tensor) -> Tensor:
        """h: [R, numbers]. Returns [2, R]."""
        precondition, signal, bound, lr = block
        h = h.to(precondition.dtype)
        if precondition.dim() == 1 and kernels_cpu.usable(h, precondition, signal):
            found = kernels_cpu.weigh(h, precondition, signal, bound)
            found[0] *= lr
            return found
        energy = (h * precondition).clamp_(-bound, bound).mul_(h).sum(1)
        return torch.stack([lr * energy, (h * signal).sum(1)])

    def _into(self, like: Tensor) -> Tensor:
        if self._sums is None:
            self._sums = like.new_zeros(2, self._num_examples)
        return self._sums

    def _of_block(self, param: Tensor, start: int, rows: int | None) -> tuple[Tensor, Tensor, float, float]:
        """``scale·P`` and ``scale·P·m̂`` of some rows of a parameter, flat, c and lr."""
        if self._key == (key := (id(param), start, rows)):
            return self._metric  # blocks come one example after the other
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        group, state = self._groups[param], self._state.get(param) or {}
        beta1, beta2 = group["betas"]
        step = float(state.get("step", 0))
        bound = math.sqrt((1 - beta2 ** (step + 1)) / (1 - beta2))
        moments = (state["exp_avg"], state["exp_avg_sq"]) if step else (torch.zeros_like(param),) * 2
        if param.dim() and rows is not None:
            moments = tuple(x[start : start + rows] for x in moments)
        first, second = (x.detach().reshape(-1).to(wide) for x in moments)
        step = max(step, 1.0)
        inverse = (second / (1 - beta2**step)).sqrt_().add_(group["eps"]).reciprocal_()
        inverse.mul_(self._scale)
        signal = (first * inverse).div_(1 - beta1**step)
        self._key, self._metric = key, (inverse, signal, bound, float(group["lr"]))
        return self._metric


def _pieces(h: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) that fit the cache; all at once where launches cost more than the cache saves."""
    if h.device.type != "cpu" or h.dim() == 0 or h.numel() <= _PIECE:
        yield 0, h
        return
    rows = max(1, _PIECE // math.prod(h.shape[1:]))
    for start in range(0, len(h), rows):
        yield start, h[start : start + rows]
