"""How far an example's own gradient carries itself: sums over its squared gradient in Adam's metric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_poprisk import kernels_cpu

# An eighth of the rows or columns of a large matrix stands for all of them.
STRIDE = 8
# Of smaller ones more are taken, not fewer than this many.
FEWEST = 128
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

    Of a parameter as a matrix, [shape[0], rest], the sums run over one in s rows, or columns if those are not
    more, times s: what is estimated is a prediction to first order, and the examples' gradients need not
    be formed in full. Which ones follows from the number of the step: all take their turn, and neither the
    layout nor a resumed run changes it. s is ``STRIDE``, less where under ``FEWEST`` would be left, and 1 for
    vectors.

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
        self._steps: dict[Tensor, float] = {}
        self._parts: dict[Tensor, tuple[slice, slice]] = {}
        self._key: tuple[int, int, int] | None = None
        self._block: tuple[Tensor, Tensor, float, float]  # the metric of what ``_key`` names

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

    def part(self, param: Tensor) -> tuple[slice, slice]:
        """The rows and the columns of ``param`` as a matrix that the sums run over."""
        if param not in self._parts:
            rows, columns = _as_matrix(param).shape
            stride = self.stride(param)
            turn, fewer = int(self._step(param)) % stride, min(rows, columns)
            some = slice(turn * fewer // stride, (turn + 1) * fewer // stride)
            self._parts[param] = (some, slice(0, columns)) if rows < columns else (slice(0, rows), some)
        return self._parts[param]

    def stride(self, param: Tensor) -> int:
        """Of how many rows or columns one is taken."""
        return max(1, min(STRIDE, min(_as_matrix(param).shape) // FEWEST))

    def add(self, param: Tensor, example: int, h: Tensor, start: int = 0) -> None:
        """One example's gradient of rows ``start`` … of a parameter; h: [rows, …]."""
        self.add_some(param, example, h[None], start)

    def add_some(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        """Gradients of the rows ``start`` … of consecutive examples from ``first`` on; h: [n, rows, …]."""
        rows, columns = self.part(param)
        h = h.reshape(len(h), h.shape[1] if h.dim() > 1 else 1, -1)
        low, high = max(rows.start, start), min(rows.stop, start + h.shape[1])
        if low < high:
            self.add_part(param, first, h[:, low - start : high - start, columns], low - rows.start)

    def add_part(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        """The same of rows and columns of ``part`` alone.

        Args:
            h: [n, rows, columns].
            start: of the rows of ``part``.
        """
        rows = h.shape[1]
        if h.device.type == "cpu":  # elsewhere launches cost more than the cache saves
            rows = max(1, _PIECE // h.shape[2])
        for low in range(0, h.shape[1], rows):
            piece = h[:, low : low + rows]
            found = self._sums_of(self._of_block(param, start + low, piece.shape[1]), piece.flatten(1))
            sums = self._into(found)
            sums[:, first : first + len(h)] += found.to(sums.device)

    def add_rows(self, param: Tensor, rows: Tensor, examples: Tensor, h: Tensor) -> None:
        """Gradients of single rows of a table; rows and examples: [R] int64, h: [R, width]."""
        some, columns = self.part(param)
        if some.stop - some.start < len(param):
            taken = (rows >= some.start) & (rows < some.stop)
            rows, examples, h = rows[taken], examples[taken], h[taken]
        found = self._sums_of(self._metric(param, rows, columns), h[:, columns])
        sums = self._into(found)
        sums.index_add_(1, examples.to(sums.device), found.to(sums.device))

    def _sums_of(self, metric: tuple[Tensor, Tensor, float, float], h: Tensor) -> Tensor:
        """h: [R, numbers]. Returns [2, R]."""
        precondition, signal, bound, lr = metric
        h = h.to(precondition.dtype)
        if precondition.dim() == 1 and kernels_cpu.usable(h := h.contiguous(), precondition, signal):
            found = kernels_cpu.weigh(h, precondition, signal, bound)
            found[0] *= lr
            return found
        energy = (h * precondition).clamp_(-bound, bound).mul_(h).sum(1)
        return torch.stack([lr * energy, (h * signal).sum(1)])

    def _into(self, like: Tensor) -> Tensor:
        if self._sums is None:
            self._sums = like.new_zeros(2, self._num_examples)
        return self._sums

    def _of_block(self, param: Tensor, start: int, count: int) -> tuple[Tensor, Tensor, float, float]:
        """The metric of some rows of ``part``, flat."""
        if self._key != (key := (id(param), start, count)):  # blocks come one example after the other
            rows, columns = self.part(param)
            block = slice(rows.start + start, rows.start + start + count)
            precondition, signal, *rest = self._metric(param, block, columns)
            self._key, self._block = key, (precondition.flatten(), signal.flatten(), *rest)
        return self._block

    def _metric(
        self, param: Tensor, rows: slice | Tensor, columns: slice
    ) -> tuple[Tensor, Tensor, float, float]:
        """``scale·P`` and ``s·scale·P·m̂`` of some rows and columns, c and s·lr."""
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        group, state, step = self._groups[param], self._state.get(param) or {}, self._step(param)
        beta1, beta2 = group["betas"]
        bound = math.sqrt((1 - beta2 ** (step + 1)) / (1 - beta2))
        moments = (state["exp_avg"], state["exp_avg_sq"]) if step else (torch.zeros_like(param),) * 2
        first, second = (_as_matrix(x.detach())[rows][:, columns].to(wide) for x in moments)
        step = max(step, 1.0)
        inverse = (second / (1 - beta2**step)).sqrt_().add_(group["eps"]).reciprocal_()
        inverse.mul_(self._scale)
        signal = (first * inverse).div_(1 - beta1**step)
        stride = self.stride(param)
        return inverse, signal.mul_(stride), bound, float(group["lr"]) * stride

    def _step(self, param: Tensor) -> float:
        if param not in self._steps:  # once: it may be on another device
            self._steps[param] = float((self._state.get(param) or {}).get("step", 0))
        return self._steps[param]


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] if x.dim() else 1, -1)
