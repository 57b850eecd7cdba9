"""The authors' streaming form (``estimator="ema"``), which needs no per-example gradients.

The noise of a gradient is estimated from the surprises ``G − m`` of earlier steps instead of from the
examples of this one (Algorithm 1 of arXiv:2605.01172).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_poprisk.finite import all_finite
from hf_poprisk.gated_adamw import Row
from hf_poprisk.optimizer import PopRiskAdamW

EMA_DECAY = 0.99  # ρ of the noise estimate, as published


def streaming_openness(signal: Tensor, noise: Tensor, alpha: float, gate: str) -> Tensor:
    """The authors' streaming rule, which needs no per-example gradients (their Algorithm 1).

    Args:
        signal: bias-corrected squared first moment ``m̂²``, any shape.
        noise: bias-corrected running mean ``ŝ`` of ``(G − m_prev)²``, same shape.
        alpha: the threshold, and the factor of the shrinkage. 1 is as published; as m̂ averages the
            noise of G down by (1−β₁)/(1+β₁) and ŝ does not, that value restores the scale.
        gate: ``hard``: ``1{m̂² > α ŝ}``; ``soft``: ``(m̂² − αŝ)₊ / ((m̂² − αŝ)₊ + αŝ)``.

    Returns:
        ``q`` in [0, 1], shape and dtype of ``signal``.
    """
    evidence = signal - alpha * noise
    if gate == "hard":
        return (evidence > 0).to(signal.dtype)
    return (evidence / signal).nan_to_num_(nan=0.0).clamp_(0.0, 1.0)


def streaming_null_openness(alpha: float, beta1: float, gate: str) -> float:
    """Stationary mean of ``streaming_openness`` on white Gaussian gradients with zero mean.

    There m̂² has the variance ``a = (1−β₁)/(1+β₁)`` of a gradient, and ŝ the mean ``1 + a``, so the
    rule is ``z² > c`` with ``c = α (1 + a) / a`` for a standard normal z.
    """
    from scipy import special

    a = (1.0 - beta1) / (1.0 + beta1)
    c = alpha * (1.0 + a) / a
    tail = 2.0 * float(special.ndtr(-math.sqrt(c)))
    if gate == "hard":
        return tail
    density = math.exp(-c / 2.0) / math.sqrt(2.0 * math.pi)
    inverse_square = 2.0 * density / math.sqrt(c) - tail  # E[z⁻²; z² > c], by parts
    return tail - c * inverse_square


class StreamingPopRiskAdamW(PopRiskAdamW):
    """What ``PopRiskAdamW(..., estimator="ema")`` gives. Its state holds one more buffer, ``noise``."""

    needs_examples = False

    def _prepare_step(self) -> None:
        self._skip_step = not all_finite(p.grad for p in self._all_parameters())
        if self._none_finite is None:  # close_window, which this form does not ask for, was not called
            self._none_finite = self._is_never_finite()

    def _update(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        super()._update()
        if self._sums:
            sums = torch.stack(list(self._sums.values()))
            beta1 = self.param_groups[0]["betas"][0]
            null = streaming_null_openness(self._alpha(beta1), beta1, self.gate)
            self.statistics.add(list(self._sums), sums, null, None)
            self._sums = {}

    def _openness_of(self, group: dict[str, Any], row: Row) -> Tensor | None:
        param, grad, exp_avg, _, step = row
        if param in self._ungated:
            return None
        beta1, t = group["betas"][0], step.item() + 1
        noise = self._track_noise(param, grad - exp_avg)
        signal = (torch.lerp(exp_avg, grad, 1 - beta1) / (1 - beta1**t)).square_()
        q = streaming_openness(signal, noise, self._alpha(beta1), self.gate)
        live = noise > 0
        opened, count = q.mul(live).sum().float(), live.sum().float()
        self._sums[param] = torch.stack([opened, count, count * 0, count * 0])
        return q

    def _track_noise(self, param: Tensor, surprise: Tensor) -> Tensor:
        """``s ← ρ s + (1−ρ)(G − m_prev)²``; returns it bias-corrected."""
        state = self.state[param]
        if "noise" not in state:  # counts its own steps: AdamW's moments may be older
            state["noise"], state["noise_steps"] = torch.zeros_like(param), 0
        state["noise_steps"] += 1
        state["noise"].lerp_(surprise.square_(), 1 - EMA_DECAY)
        return state["noise"] / (1 - EMA_DECAY ** state["noise_steps"])

    def _alpha(self, beta1: float) -> float:
        return (1 - beta1) / (1 + beta1) if self.ema_alpha is None else self.ema_alpha
