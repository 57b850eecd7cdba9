"""How many labels are mislabeled, and which: a two-part model of the leave-one-out log-odds.

An example with leave-one-out log-odds ζ has the label that the rest of the data would give it with
probability ``q = σ(τ(ζ + c) − c)``, ``c = log(K − 1)``, where τ corrects an over- or underconfident model
(τ = 1 is calibrated). If a rate ε of the labels was replaced by another label at random, the likelihood of
the observed one is ``(1 − ε) q + ε (1 − q)/(K − 1)``, and the posterior probability that it was not
replaced, ``p_correct``, is the first term over the sum.

ε̂ is the posterior median, with ε and log τ uniform between their bounds beforehand. The top of the
likelihood is not enough to go by: with 40 % of a few hundred pairs swapped it is so flat that it may lie
anywhere, also at ε = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, logsumexp
from torch import Tensor

MAX_RATE = 0.45  # beyond it mislabeled examples could be taken for clean ones
# With K > 2 the q of an example's K labels add up to one at τ = 1 only, so a τ without bound would take every
# label that is not the likeliest one for mislabeled. What learned from noise is underconfident: some room.
TAU_OF_CLASSES = (0.05, 3.0)
# With K = 2 τ may be anything, and is large where log-odds are small. In units of one over the median |ζ|:
# from "the labels are as good as open" to "the sign of ζ tells all".
TAU_OF_TWO = (0.05, 50.0)
OPEN_RATE = 0.43  # an upper end beyond it: a flat posterior has .439, no quantile lies quite at ``MAX_RATE``
_GRID = 32  # points along ε, and along log τ
_NEGLIGIBLE = 12.0  # nats below the top


@dataclass(frozen=True)
class NoiseFit:
    """One fit.

    Attributes:
        rate: ε̂, the estimated noise rate, its posterior median.
        low, high: its 95 % credible interval.
        tau: τ̂, the likeliest with this rate.
        num_labels: K.
        log_likelihood: at (ε̂, τ̂), mean over the examples, in nats: how well labels are predicted.
        num_examples: how many examples it is a fit to.
    """

    rate: float
    low: float
    high: float
    tau: float
    num_labels: int
    log_likelihood: float
    num_examples: int

    @property
    def open_ended(self) -> bool:
        """Whether the interval reaches the end of the range: the labels do not tell the rate."""
        return self.high > OPEN_RATE

    @property
    def explained(self) -> float:
        """How much of what can be known of the labels is predicted: 0 is chance.

        1 is a model that is sure of all labels, and wrong on the ε̂ of them that are mislabeled.
        """
        clean, noise = 1 - self.rate, self.rate
        best = clean * math.log(clean) + (noise * math.log(noise / (self.num_labels - 1)) if noise else 0.0)
        chance = -math.log(self.num_labels)
        return (self.log_likelihood - chance) / (best - chance)

    def p_correct(self, log_odds: Tensor) -> Tensor:
        """Probability that each label is correct, in [0, 1]; log_odds: ζ, any shape, floating point."""
        c = math.log(self.num_labels - 1)
        before = math.log((1 - self.rate) / self.rate) if self.rate else math.inf
        return torch.sigmoid(before + self.tau * (log_odds + c))  # Bayes' rule in log-odds


def fit_noise(log_odds: np.ndarray, num_labels: int = 2) -> NoiseFit:
    """The posterior of ε over [0, ``MAX_RATE``].

    Args:
        log_odds: ζ of the examples, [n], n ≥ 1, finite.
        num_labels: K ≥ 2; 2 for preference pairs.

    Raises:
        ValueError: no examples, or values that are not finite.
    """
    if not len(log_odds) or not np.isfinite(log_odds).all():
        raise ValueError("the noise rate needs at least one example, and finite log-odds.")
    z = np.asarray(log_odds, dtype=np.float64)
    scale = np.median(np.abs(z[z != 0])).clip(1e-30, 1e30) if z.any() else 1.0
    lowest, highest = TAU_OF_CLASSES if num_labels > 2 else (tau / scale for tau in TAU_OF_TWO)
    z, counts = _binned(z, scale)
    bounds = np.array([[0.0, MAX_RATE], [math.log(lowest), math.log(highest)]])
    for _ in range(3):  # closer and closer to where the posterior is
        rates, log_taus = (np.linspace(low, high, _GRID) for low, high in bounds)
        total = _log_likelihood(rates, np.exp(log_taus), z, counts, num_labels)
        for axis, values in enumerate((rates, log_taus)):
            near = np.flatnonzero((total > total.max() - _NEGLIGIBLE).any(1 - axis))
            bounds[axis] = values[max(near[0] - 1, 0)], values[min(near[-1] + 1, _GRID - 1)]
    density = np.exp(total - total.max()).sum(1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    low, rate, high = np.interp((0.025, 0.5, 0.975), below / below[-1], rates).tolist()
    here = total[np.abs(rates - rate).argmin()]
    return NoiseFit(
        rate=rate,
        low=low,
        high=high,
        tau=math.exp(log_taus[here.argmax()]),
        num_labels=num_labels,
        log_likelihood=float(here.max()) / len(log_odds),
        num_examples=len(log_odds),
    )


def likelihood(log_odds: np.ndarray, rate: float | None = None) -> tuple[float, np.ndarray]:
    """The likeliest τ of two-class log-odds, and the log-likelihood of each label there.

    Args:
        log_odds: [n].
        rate: ε; the estimated one by default.

    Returns:
        τ, and [n] in nats.
    """
    rate = fit_noise(log_odds).rate if rate is None else rate
    scale = np.median(np.abs(log_odds[log_odds != 0])).clip(1e-30, 1e30) if log_odds.any() else 1.0

    def of(log_tau: float) -> np.ndarray:
        q = expit(math.exp(log_tau) * log_odds)
        return np.log((1 - rate) * q + rate * (1 - q) + 1e-300)

    bounds = [math.log(tau / scale) for tau in TAU_OF_TWO]
    best = minimize_scalar(lambda log_tau: -of(log_tau).sum(), bounds=bounds, method="bounded").x
    return math.exp(best), of(best)


def class_log_odds(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``o_y − logsumexp_{k≠y} o_k`` of [n, K] logits and [n] int labels, [n]."""
    observed = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    others = logits.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, 1)
    return observed - logsumexp(others, axis=1)


def temperature(
    scores: np.ndarray, labels: np.ndarray, rate: float | None = None
) -> tuple[float, np.ndarray]:
    """The likeliest factor on the scores of K classes that makes them logits.

    Args:
        scores: [n, K].
        labels: the observed ones, [n] int.
        rate: ε; the likeliest by default.

    Returns:
        The factor, and the log-likelihood of each label with it, [n] in nats.
    """
    num_labels = scores.shape[1]
    rates = np.linspace(0.0, MAX_RATE, _GRID) if rate is None else np.array([rate])

    def of(log_tau: float) -> np.ndarray:
        q = expit(class_log_odds(math.exp(log_tau) * scores, labels))
        each = np.log(np.maximum(q + rates[:, None] * ((1 - q) / (num_labels - 1) - q), 1e-300))
        return each[each.sum(1).argmax()]

    # in units of one over how far an example's scores are apart: from as good as open to sure
    apart = float(np.ptp(scores, axis=1).mean()) or 1.0
    grid = np.log(np.geomspace(0.05, 50.0, _GRID) / apart)
    near = int(np.argmax([of(log_tau).sum() for log_tau in grid]))
    bounds = grid[max(near - 1, 0)], grid[min(near + 1, _GRID - 1)]
    best = minimize_scalar(lambda log_tau: -of(log_tau).sum(), bounds=bounds, method="bounded").x
    return math.exp(best), of(best)


def _binned(z: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A few hundred values in place of many, to 3 % of them, and how many examples each stands for."""
    _, where, counts = np.unique(
        np.round(np.arcsinh(50 * z / scale) / 0.03), return_inverse=True, return_counts=True
    )
    return np.bincount(where, z) / counts, counts


def _log_likelihood(
    rates: np.ndarray, taus: np.ndarray, z: np.ndarray, counts: np.ndarray, num_labels: int
) -> np.ndarray:
    """Of every ε with every τ, summed over the examples, [len(rates), len(taus)]."""
    c = math.log(num_labels - 1)
    margins = taus[:, None] * (z + c) - c
    q = np.exp(-np.logaddexp(0.0, -margins))  # [τ, bin]
    other = np.exp(-np.logaddexp(0.0, margins)) / (num_labels - 1)
    likelihood = q + rates[:, None, None] * (other - q)
    return np.log(np.maximum(likelihood, 1e-300)) @ counts
