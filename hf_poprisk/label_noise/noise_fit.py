"""How many labels are wrong, and which: a two-part model of the held-out log-odds.

An example with held-out log-odds ζ has the label that the rest of the data would give it with probability
``q = σ(τ(ζ + c) − c)``, ``c = log(K − 1)``, where τ corrects an over- or underconfident model (τ = 1 is
calibrated). If a share ε of the labels was replaced by another label at random, the likelihood of the
observed one is ``(1 − ε) q + ε (1 − q)/(K − 1)``. ε and τ maximise its product over the examples, and the
posterior probability that a label was not replaced is the first term over the sum.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

MAX_RATE = 0.45  # beyond it the wrong labels could be taken for the right ones
_LOG_TAU = (math.log(1e-3), math.log(1e3))
# With K > 2 the q of an example's K labels add up to one at τ = 1 only, so a τ without bound would take every
# label that is not the likeliest one for wrong. Models that learned from noise are underconfident: some room.
MAX_TAU_OF_CLASSES = 3.0
_STARTS = ((0.05, 0.0), (0.25, 0.0), (0.4, 1.0))


@dataclass(frozen=True)
class NoiseFit:
    """One fit.

    Attributes:
        rate: ε̂, the estimated share of wrong labels.
        low, high: its 95 % interval, from the curvature of the log-likelihood.
        tau: τ̂.
        num_labels: K.
        log_likelihood: mean over the examples, in nats: how well held-out labels are predicted.
        num_examples: how many examples it is a fit to.
        step, epoch: how far training was.
        exact: most examples had been visited once, by a model that had not been trained on them.
    """

    rate: float
    low: float
    high: float
    tau: float
    num_labels: int
    log_likelihood: float
    num_examples: int
    step: int = 0
    epoch: float = 0.0
    exact: bool = False

    @property
    def capped(self) -> bool:
        """Whether ε̂ lies at the end of its range: the model cannot tell the labels apart (yet)."""
        return self.rate > MAX_RATE - 0.01

    @property
    def explained(self) -> float:
        """How much of what can be known of held-out labels is predicted: 0 is chance.

        1 is a model that is wrong on the share ε̂ of the labels, and sure of all of them.
        """
        right, wrong = 1 - self.rate, self.rate
        best = right * math.log(right) + (wrong * math.log(wrong / (self.num_labels - 1)) if wrong else 0.0)
        chance = -math.log(self.num_labels)
        return (self.log_likelihood - chance) / (best - chance)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def probability_right(self, heldout: Tensor) -> Tensor:
        """Posterior probability that each label is right; heldout: ζ, any shape, floating point."""
        if not self.rate:
            return torch.ones_like(heldout)
        c = math.log(self.num_labels - 1)
        q = torch.sigmoid(self.tau * (heldout + c) - c)
        right, wrong = (1 - self.rate) * q, self.rate * (1 - q) / (self.num_labels - 1)
        return torch.where(right + wrong > 0, right / (right + wrong), 0.0)


def fit_noise(heldout: np.ndarray, num_labels: int = 2, step: int = 0, epoch: float = 0.0) -> NoiseFit:
    """Maximum likelihood of (ε, τ) over ε in [0, ``MAX_RATE``].

    Args:
        heldout: ζ of the examples, [n], n ≥ 1, finite.
        num_labels: K ≥ 2; 2 for preference pairs.
        step, epoch: copied into the result.

    Raises:
        ValueError: no examples, or values that are not finite.
    """
    if not len(heldout) or not np.isfinite(heldout).all():
        raise ValueError("the noise rate needs at least one example, and finite log-odds.")
    z = np.asarray(heldout, dtype=np.float64)
    best, starts = None, list(_STARTS)
    most = _LOG_TAU[1] if num_labels == 2 else math.log(MAX_TAU_OF_CLASSES)
    if num_labels == 2:  # τ may be anything, and is large where log-odds are small: early in training
        scale = min(max(-math.log(np.median(np.abs(z)) + 1e-9), _LOG_TAU[0]), most - 1)
        starts += [(rate, scale + log_tau) for rate, log_tau in _STARTS]
    for start in starts:
        found = optimize.minimize(
            _objective,
            start,
            args=(z, num_labels),
            jac=True,
            method="L-BFGS-B",
            bounds=((0.0, MAX_RATE), (_LOG_TAU[0], most)),
        )
        if best is None or found.fun < best.fun - 1e-9:
            best = found
    rate, log_tau = (float(x) for x in best.x)
    spread = 1.96 * _standard_error(rate, log_tau, z, num_labels, log_tau > most - 1e-6)
    return NoiseFit(
        rate=rate,
        low=max(0.0, rate - spread),
        high=min(MAX_RATE, rate + spread),
        tau=math.exp(log_tau),
        num_labels=num_labels,
        log_likelihood=-float(best.fun),
        num_examples=len(z),
        step=step,
        epoch=epoch,
    )


def _objective(x: np.ndarray, z: np.ndarray, num_labels: int) -> tuple[float, np.ndarray]:
    """Mean negative log-likelihood at (ε, log τ), and its gradient."""
    rate, tau, c = x[0], math.exp(x[1]), math.log(num_labels - 1)
    margin = tau * (z + c) - c
    q = np.exp(-np.logaddexp(0.0, -margin))
    not_q = np.exp(-np.logaddexp(0.0, margin))
    others = num_labels - 1
    likelihood = np.maximum((1 - rate) * q + rate * not_q / others, 1e-300)
    by_rate = (not_q / others - q) / likelihood
    by_log_tau = (1 - rate - rate / others) * q * not_q * tau * (z + c) / likelihood
    return -np.log(likelihood).mean(), -np.array([by_rate.mean(), by_log_tau.mean()])


def _standard_error(rate: float, log_tau: float, z: np.ndarray, num_labels: int, bound: bool) -> float:
    """Of ε̂, from the observed information; infinite where the likelihood is flat. ``bound``: τ is fixed."""
    h = 1e-4
    centre = np.array([min(max(rate, h), MAX_RATE - h), log_tau])
    rows = []
    for k in range(2):
        up, down = centre.copy(), centre.copy()
        up[k] += h
        down[k] -= h
        rows.append((_objective(up, z, num_labels)[1] - _objective(down, z, num_labels)[1]) / (2 * h))
    information = len(z) * (np.array(rows) + np.array(rows).T) / 2
    (a, b), (_, d) = information
    if bound or abs(d) < 1e-6 * a:  # the sign alone tells: τ does not matter
        return 1 / math.sqrt(a) if a > 0 else math.inf
    determinant = a * d - b * b
    return math.sqrt(d / determinant) if determinant > 0 and d > 0 else math.inf
