"""Regressions on features of the examples, and what a fit without an example says about its label.

Of pairs, logistic: over the coefficients a of ``f_i = φ_iᵀ a``, with sample weights w,

    min_a  Σ_i w_i log(1 + exp(−f_i)) + (λ/2) |a|²

is solved by Newton's method. To first order in leaving example i out (Rad and Maleki 2020, equation 9), the
others give its label the log-odds

    ζ_i = f_i − w_i p_i h_i / (1 − w_i p_i (1 − p_i) h_i),   p_i = σ(−f_i),   h_i = φ_iᵀ (Φᵀ W Φ + λ I)⁻¹ φ_i.

For λ → ∞ this is one step on the others.

Of classes, ridge: over the coefficients a_c of ``f_ic = φ_iᵀ a_c``, with y_ic = 1 for the observed class,
else 0,

    min_a  Σ_i w_i |y_i − f_i|² + λ |a|²

has a closed form, and so has leaving example i out, exactly: its scores are then

    (f_i − w_i h_i y_i) / (1 − w_i h_i),   with W = diag(w) in h_i.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve, eigh, solve_triangular
from scipy.special import expit

_NEWTON_STEPS = 50


def leave_one_out(
    features: np.ndarray, ridge: float, weights: np.ndarray | None = None, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the log-odds of the observed labels of pairs.

    Args:
        features: φ, [n, m] float64.
        ridge: λ.
        weights: w, [n]; 1 by default.
        start: coefficients to begin from, [m].

    Returns:
        Leave-one-out log-odds ζ [n], and the coefficients a of the fit to all [m].
    """
    n, m = features.shape
    w = np.ones(n) if weights is None else weights
    a = np.zeros(m) if start is None else start

    def objective(a: np.ndarray) -> tuple[float, np.ndarray]:
        f = features @ a
        return float(w @ np.logaddexp(0.0, -f) + 0.5 * ridge * a @ a), f

    value, f = objective(a)
    for _ in range(_NEWTON_STEPS):
        p = expit(-f)
        curvature = w * p * (1 - p)
        half = features * np.sqrt(curvature)[:, None]
        hessian = cho_factor(half.T @ half + ridge * np.eye(m), lower=True)
        gradient = ridge * a - features.T @ (w * p)
        step = cho_solve(hessian, gradient)
        decrement = gradient @ step
        if decrement < 1e-9 * max(1.0, abs(value)):
            break
        length = 1.0
        while (new := objective(a - length * step))[0] > value - 1e-4 * length * decrement and length > 1e-6:
            length /= 2  # the full step may overshoot far from the solution
        a, (value, f) = a - length * step, new
    h = np.square(solve_triangular(hessian[0], features.T, lower=True)).sum(0)
    return f - w * p * h / (1 - curvature * h), a


class Ridge:
    """The regression on classes for every λ, from one eigendecomposition.

    Args:
        features: φ, [n, m] float64.
        targets: y, [n, K] float64.
        weights: w, [n] in [0, 1]; 1 by default.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        self._weights = np.ones(len(features)) if weights is None else weights
        values, self._vectors = eigh((features.T * self._weights) @ features)
        self._values = values.clip(0)
        self._rotated = features @ self._vectors
        self._targets = targets
        self._moments = (self._rotated.T * self._weights) @ targets

    def leave_one_out(self, ridge: float) -> np.ndarray:
        """Scores of every example by the others, [n, K]; ridge: λ > 0."""
        inverse = 1.0 / (self._values + ridge)
        fitted = (self._rotated * inverse) @ self._moments
        own = (self._weights * (np.square(self._rotated) @ inverse))[:, None]
        return (fitted - own * self._targets) / (1.0 - own)

    def coefficients(self, ridge: float) -> np.ndarray:
        """a of the fit to all examples, [m, K]."""
        return self._vectors @ (self._moments / (self._values + ridge)[:, None])
