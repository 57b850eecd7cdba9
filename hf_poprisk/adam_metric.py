"""The metric of Adam, from what an optimizer of its family keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_poprisk.per_example.layout import wide
from hf_poprisk.per_example.sinks import as_matrix


class AdamMetric:
    """``P = scale/(√v̂ + ε)`` of before the step that is being collected; for ``SelfInfluence``.

    The bound ``c = √((1 − β₂ᵗ)/(1 − β₂))``, t counting this step, is what this step's v̂, which has the square
    of this very gradient in it, allows at most. It is reached where no example was seen before: rare tokens,
    and everything in the first step.

    Args:
        optimizer: of the Adam family (``exp_avg_sq`` and ``step`` in its state).
        scale: what the accumulated gradient is multiplied by until the optimizer sees it: 1/W where DDP
            averages over W ranks, the coefficient of clipping, one over the scale of a loss scaler.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scale: Tensor | float = 1.0) -> None:
        self._state = optimizer.state
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._scale = scale
        self._steps: dict[Tensor, float] = {}
        self.params = set(self._groups)

    def of(self, param: Tensor, rows: slice | Tensor, columns: slice) -> tuple[Tensor, float, float]:
        group, step = self._groups[param], self._step(param)
        beta2 = group["betas"][1]
        bound = math.sqrt((1 - beta2 ** (step + 1)) / (1 - beta2))
        second = self._state[param]["exp_avg_sq"] if step else torch.zeros_like(param)
        inverse = as_matrix(second.detach())[rows][:, columns].to(wide(param.dtype))
        inverse = (inverse / (1 - beta2 ** max(step, 1.0))).sqrt_().add_(group["eps"]).reciprocal_()
        return inverse.mul_(self._scale), bound, float(group["lr"])

    def turn(self, param: Tensor) -> int:
        return int(self._step(param))

    def _step(self, param: Tensor) -> float:
        if param not in self._steps:  # once: it may be on another device
            self._steps[param] = float((self._state.get(param) or {}).get("step", 0))
        return self._steps[param]
