"""Ridge regression on the labels of classes, and each example's scores from a fit without it.

Over the coefficients a_c of ``f_ic = φ_iᵀ a_c``, with sample weights w and y_ic = 1 for the observed class,
else 0,

    min_a  Σ_i w_i |y_i − f_i|² + λ |a|²

has a closed form, and so has leaving example i out, exactly:

    (f_i − w_i h_i y_i) / (1 − w_i h_i),   h_i = φ_iᵀ (Φᵀ W Φ + λ I)⁻¹ φ_i.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh


class Ridge:
    """The regression for every λ, from one eigendecomposition.

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
