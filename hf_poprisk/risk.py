"""Population risk without a validation set: does the next batch confirm what the last ones taught?

To first order, the step made at time t − 1 lowers the loss of any batch with gradient G by
``lr · Σ_k P_k m̂_k G_k``, P = 1/(√v̂ + ε) being Adam's preconditioner. Put the *next* batch's gradient there,
which had no part in m̂, and the average over batches estimates how much one step lowers the population
loss; put the step's own gradient there and it is the empirical loss. Once the first vanishes and the second
does not, the model memorises. Source: arXiv:2605.01172, section on training on population risk; the
next-batch form is ours.

It is held out from the last steps, not from the weights: an example seen in an earlier epoch is not fresh.
And it is first order, at the end of the step: where steps are so large that they overshoot (a large learning
rate, late in training), it is below zero although nothing is memorised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POPULATION, EMPIRICAL, SPREAD = "poprisk/gain_population", "poprisk/gain_empirical", "poprisk/gain_spread"
TOTAL, RATIO = "poprisk/gain_total", "poprisk/gain_ratio"


@torch.no_grad()
def gains(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> Tensor | None:
    """What the last step is worth on the gradients at hand, and what they promise for themselves.

    Call it between the backward and the step, with gradients that are reduced over ranks and not clipped.

    Args:
        optimizer: any of the Adam family that keeps ``exp_avg`` and ``exp_avg_sq``.
        scale: what the gradients are multiplied by (a loss scaler's scale).

    Returns:
        [2] float32, in units of the loss per step: ``lr Σ P m̂ G`` (population) and ``lr Σ P G²``
        (empirical), with m̂, P and lr as the optimizer has them; None before the first step.

    Raises:
        ValueError: an optimizer without these moments.
    """
    total: Tensor | None = None
    for group in optimizer.param_groups:
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        for p in group["params"]:
            state = optimizer.state.get(p)
            if p.grad is None or not state:
                continue
            if "exp_avg" not in state or "exp_avg_sq" not in state:
                raise ValueError(
                    f"poprisk_risk needs the moments of Adam, which {type(optimizer).__name__} does not "
                    "keep: set poprisk_risk=false or another optim."
                )
            step = float(state["step"])
            grad = p.grad.float() / scale
            denom = state["exp_avg_sq"].float().sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            preconditioned = grad / denom
            signal = (preconditioned * state["exp_avg"]).sum() / (1 - beta1**step)
            both = float(group["lr"]) * torch.stack([signal, (preconditioned * grad).sum()]).float()
            total = both if total is None else total + both.to(total.device)
    return total


class RiskMeter:
    """Collects ``gains`` on the device and reads them once per logging interval."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def clear(self) -> None:
        self._seen.clear()

    def observe(self, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
        found = gains(optimizer, scale)
        if found is not None:
            self._seen.append(found)

    def pop(self, history: list[dict[str, float]]) -> dict[str, float]:
        """The log entries since the last call; empty if there was no step to judge.

        Args:
            history: the logs so far, which hold the running sum (and come back with a checkpoint).

        ``gain_population`` and ``gain_empirical`` are means over the interval's batches, ``gain_spread``
        the standard error of the first (from the spread over the batches; NaN for a single one),
        ``gain_ratio`` the first over the second, ``gain_total`` the sum of the first since the start.
        Batches whose gradient is not finite are left out, as their steps are.
        """
        if not self._seen:
            return {}
        seen = torch.stack(self._seen).double().cpu()
        self._seen.clear()
        seen = seen[seen.isfinite().all(1)]
        if not len(seen):
            return {}
        population, empirical = seen.mean(0).tolist()
        before = next((entry[TOTAL] for entry in reversed(history) if TOTAL in entry), 0.0)
        logs = {POPULATION: population, EMPIRICAL: empirical, TOTAL: before + seen[:, 0].sum().item()}
        logs[RATIO] = population / empirical if empirical else 0.0
        if len(seen) > 1:
            logs[SPREAD] = (seen[:, 0].std() / math.sqrt(len(seen))).item()
        return logs
