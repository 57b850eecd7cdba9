"""Leave-one-out regression against refitting, and the judgement of labels drawn with a known noise rate."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from hf_poprisk.leave_one_out.judgement import RIDGES, _simplest, candidates, judge
from hf_poprisk.leave_one_out.noise import fit_noise, likelihood
from hf_poprisk.leave_one_out.regression import leave_one_out
from hf_poprisk.leave_one_out.weights import doubt


def drawn(n: int = 60, m: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, m))


@pytest.mark.parametrize("ridge", [30.0, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_form_is_a_refit_without_the_example(ridge: float, weighted: bool) -> None:
    x = drawn()
    w = np.random.default_rng(1).uniform(0.1, 1, len(x)) if weighted else np.ones(len(x))
    log_odds, a = leave_one_out(x, ridge, w if weighted else None)
    fitted = minimize(
        lambda a: w @ np.logaddexp(0, -x @ a) + ridge / 2 * a @ a, np.zeros(x.shape[1]), tol=1e-10
    )
    np.testing.assert_allclose(a, fitted.x, atol=1e-4)
    without = np.array(
        [x[i] @ leave_one_out(x, ridge, w * (np.arange(len(x)) != i))[1] for i in range(len(x))]
    )
    in_sample = np.abs(x @ a - without).mean()
    assert np.abs(log_odds - without).mean() < 0.05 * in_sample  # to first order, and far from the fit itself
    np.testing.assert_allclose(leave_one_out(x, ridge, w, start=a + 3)[1], a, atol=1e-4)


def test_order_and_common_sign_do_not_matter() -> None:
    x = drawn()
    log_odds, _ = leave_one_out(x, 3.0)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(leave_one_out(x[order], 3.0)[0], log_odds[order], atol=1e-9)
    np.testing.assert_allclose(leave_one_out(-x, 3.0)[0], log_odds, atol=1e-9)


def test_a_swapped_pair_has_the_opposite_log_odds_from_the_same_others() -> None:
    x = drawn()
    swapped = x.copy()
    swapped[7] *= -1
    one, other = (leave_one_out(each, 30.0)[0][7] for each in (x, swapped))
    assert one * other < 0 and abs(one + other) < 0.05 * abs(one)


@pytest.mark.parametrize("k", [5, 200])
def test_candidates_have_the_inner_products_of_the_parts_and_of_all(k: int) -> None:
    one, other = (drawn(30, k, seed).astype(np.float32) for seed in (0, 1))
    found = dict(candidates({0: one, 1: other}))
    assert found.keys() == {0, 1, None} and all(x.dtype == np.float64 for x in found.values())
    grams = {0: one @ one.T, 1: other @ other.T, None: (one @ one.T + other @ other.T) / 2}
    for part, x in found.items():
        assert x.shape[1] <= 30
        np.testing.assert_allclose(x @ x.T, grams[part], atol=1e-3)
    assert dict(candidates({1: one})).keys() == {1}


def labelled(n: int, noise: float, signal: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of the observed label's log-odds, [n, 300], and which are mislabeled."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 300)) / np.sqrt(300)
    direction = rng.normal(size=300)
    x += signal * rng.choice([-1, 1], n)[:, None] * direction / np.linalg.norm(direction)
    clean = np.sign(x @ direction)
    mislabeled = rng.permutation(n) < round(noise * n)
    return (x * (clean * np.where(mislabeled, -1, 1))[:, None]).astype(np.float32), mislabeled


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_mislabeled_examples_are_found_and_counted(noise: float) -> None:
    features, mislabeled = labelled(300, noise)
    found = judge([features])
    assert found.fit.low < noise < found.fit.high and abs(found.fit.rate - noise) < 0.05
    assert roc_auc_score(mislabeled, -found.log_odds) > 0.98
    assert ((found.p_correct < 0.5) == mislabeled).mean() > 0.97


def test_clean_labels_are_left_alone() -> None:
    found = judge([labelled(300, 0.0)[0]])
    assert found.fit.rate < 0.01 and found.fit.low < 0.005 and (found.p_correct < 0.5).mean() <= 0.01


def test_without_signal_the_interval_is_open_and_no_label_stands_out() -> None:
    features = labelled(300, 0.0)[0] * np.random.default_rng(3).choice([-1, 1], 300)[:, None]
    found = judge([features])
    assert found.fit.open_ended and found.fit.low < 0.1
    assert (found.p_correct < 0.5).mean() < 0.1


def test_a_part_that_predicts_nothing_does_no_harm() -> None:
    good, mislabeled = labelled(200, 0.2)
    bad = labelled(200, 0.0, seed=5)[0] * np.random.default_rng(4).choice([-1, 1], 200)[:, None]
    for parts, wrong in (([bad, good], 0), ([good, bad.astype(np.float32)], 1)):
        found = judge(parts)
        assert found.part != wrong
        assert roc_auc_score(mislabeled, -found.log_odds) > 0.97


def test_the_first_that_predicts_as_well_as_the_best_is_taken() -> None:
    rng = np.random.default_rng(0)
    good = rng.normal(size=200) + 2
    lucky, chance = good + 0.1 * rng.normal(size=200), rng.normal(size=200)

    def chosen(*log_odds: np.ndarray) -> float:
        none = np.empty(0)
        return _simplest([(None, none, i, each, fit_noise(each)) for i, each in enumerate(log_odds)])[2]

    assert chosen(good, lucky) == chosen(lucky, good) == 0
    assert chosen(chance, good) == 1 and chosen(good, chance) == 0
    assert list(RIDGES) == sorted(RIDGES, reverse=True)  # the simplest first


def test_a_second_round_keeps_the_first_estimate_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x, direction = rng.normal(size=(300, 40)), rng.normal(size=40)
    mislabeled = rng.permutation(300) < 60
    features = (x * (np.sign(x @ direction) * np.where(mislabeled, -1, 1))[:, None]).astype(np.float32)
    second = judge([features])
    monkeypatch.setattr("hf_poprisk.leave_one_out.judgement._second_round", lambda *_: None)
    first = judge([features])
    assert (first.rounds, second.rounds) == (1, 2)
    assert (first.fit.rate, first.fit.low, first.fit.high) == (
        second.fit.rate,
        second.fit.low,
        second.fit.high,
    )
    assert roc_auc_score(mislabeled, -second.log_odds) > roc_auc_score(mislabeled, -first.log_odds)


def test_a_second_round_that_is_no_gain_is_not_taken() -> None:
    features = labelled(300, 0.0)[0] * np.random.default_rng(4).choice([-1, 1], 300)[:, None]
    assert judge([features]).rounds == 1


def test_the_likeliest_scale_is_that_of_the_grid() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=500) * 3
    z = np.abs(z) * np.where(rng.random(500) < 1 / (1 + np.exp(-np.abs(2 * z))), 1, -1)  # τ = 2
    fit = fit_noise(z)
    tau, each = likelihood(z, fit.rate)
    assert each.mean() >= fit.log_likelihood - 1e-3 and abs(np.log(tau / fit.tau)) < 0.3


def test_an_example_without_a_gradient_is_not_judged_by_its_rounding() -> None:
    features, _ = labelled(200, 0.2)
    features[:5] = 1e-6 * np.random.default_rng(0).normal(size=features[:5].shape)
    nothing = np.zeros_like(features)  # a part of the model that has no gradient at all
    found = judge([nothing, features])
    np.testing.assert_allclose(found.log_odds[:5], 0, atol=1e-12)
    np.testing.assert_allclose(found.p_correct[:5], 1 - found.fit.rate)
    assert found.part == 1 and found.num_copies == 0


def test_copies_are_counted_and_doubted() -> None:
    features, _ = labelled(100, 0.3)
    found = judge([np.concatenate([features, features[:20]])])
    assert found.num_copies == 20
    assert doubt(found.fit, 20, "pairs").startswith("20 pairs are copies of others")
    assert "copies" not in (doubt(found.fit, 1, "pairs") or "")


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="49 examples are too few to judge labels by: it takes 50 or more"):
        judge([drawn(49)])
    with pytest.raises(ValueError, match="all examples have the same gradients"):
        judge([np.ones((60, 8), np.float32)])
    unfinished = drawn(60)
    unfinished[3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite: the model gives NaN or inf"):
        judge([drawn(60), unfinished])
