"""Ridge regression on the labels of classes, and leaving an example out of it."""

import numpy as np
import pytest

from hf_poprisk.leave_one_out.ridge import Ridge


@pytest.mark.parametrize(("n", "m"), [(40, 7), (20, 30)])
@pytest.mark.parametrize("weighted", [False, True])
def test_leaving_one_out_is_a_fit_without_it(n: int, m: int, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(n, m)), np.eye(3)[rng.integers(3, size=n)]
    weights = rng.random(n) if weighted else np.ones(n)
    weights[4] = 0.0 if weighted else 1.0
    ridge = Ridge(features, targets, weights if weighted else None)
    got = ridge.leave_one_out(0.5)
    for i in range(n):
        rest = np.arange(n) != i
        gram = (features[rest].T * weights[rest]) @ features[rest] + 0.5 * np.eye(m)
        a = np.linalg.solve(gram, (features[rest].T * weights[rest]) @ targets[rest])
        np.testing.assert_allclose(got[i], features[i] @ a, rtol=1e-7, atol=1e-9)
    gram = (features.T * weights) @ features + 0.5 * np.eye(m)
    expected = np.linalg.solve(gram, (features.T * weights) @ targets)
    np.testing.assert_allclose(ridge.coefficients(0.5), expected, rtol=1e-7, atol=1e-9)
