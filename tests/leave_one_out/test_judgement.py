"""Leave-one-out regressions against refitting, and labels judged that were drawn with a known noise rate."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from hf_poprisk.leave_one_out import judgement
from hf_poprisk.leave_one_out.judgement import judge_classes, judge_pairs
from hf_poprisk.leave_one_out.noise import class_log_odds, fit_noise, likelihood, temperature
from hf_poprisk.leave_one_out.regression import Ridge, leave_one_out
from hf_poprisk.leave_one_out.weights import doubt

K = 4


def drawn(n: int = 60, m: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, m))


def pairs(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of the observed label's log-odds, [n, 300], and which are mislabeled."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 300)) / np.sqrt(300)
    direction = rng.normal(size=300)
    x += 3.0 * rng.choice([-1, 1], n)[:, None] * direction / np.linalg.norm(direction)
    clean = np.sign(x @ direction)
    mislabeled = rng.permutation(n) < round(noise * n)
    return (x * (clean * np.where(mislabeled, -1, 1))[:, None]).astype(np.float32), mislabeled


def guesses(n: int, seed: int) -> np.ndarray:
    """The same with labels that nothing tells."""
    signs = np.random.default_rng(seed).choice([-1, 1], n)[:, None]
    return (pairs(n, 0.0)[0] * signs).astype(np.float32)


def clouds(rate: float, n: int = 400) -> tuple[np.ndarray, ...]:
    """Features [n, 12], observed labels of K classes, and which of them are mislabeled."""
    rng = np.random.default_rng(0)
    true = rng.integers(K, size=n)
    x = rng.normal(size=(n, 12)) + 4.0 * np.eye(12)[true]
    wrong = rng.permutation(n) < round(rate * n)
    labels = np.where(wrong, (true + rng.integers(1, K, size=n)) % K, true)
    return x.astype(np.float32), labels, wrong


# -- regressions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [30.0, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_regression_is_a_refit_without_the_example(ridge: float, weighted: bool) -> None:
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


@pytest.mark.parametrize(("n", "m"), [(40, 7), (20, 30)])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_regression_is_a_refit_without_the_example(n: int, m: int, weighted: bool) -> None:
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


def test_order_and_signs_of_pairs() -> None:
    x = drawn()
    log_odds, _ = leave_one_out(x, 3.0)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(leave_one_out(x[order], 3.0)[0], log_odds[order], atol=1e-9)
    np.testing.assert_allclose(leave_one_out(-x, 3.0)[0], log_odds, atol=1e-9)
    swapped = x.copy()
    swapped[7] *= -1
    one, other = (leave_one_out(each, 30.0)[0][7] for each in (x, swapped))
    assert one * other < 0 and abs(one + other) < 0.05 * abs(one)


@pytest.mark.parametrize("k", [5, 200])
def test_candidates_have_the_inner_products_of_the_parts_and_of_all(k: int) -> None:
    one, other = (drawn(30, k, seed).astype(np.float32) for seed in (0, 1))
    found = dict(judgement._candidates({0: one, 1: other}))
    assert found.keys() == {0, 1, None} and all(x.dtype == np.float64 for x in found.values())
    grams = {0: one @ one.T, 1: other @ other.T, None: (one @ one.T + other @ other.T) / 2}
    for part, x in found.items():
        assert x.shape[1] <= 30
        np.testing.assert_allclose(x @ x.T, grams[part], atol=1e-3)
    assert dict(judgement._candidates({1: one})).keys() == {1}


def test_many_examples_are_in_the_directions_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgement, "MOST_DIMENSIONS", 24)
    spectrum = np.concatenate([np.ones(10), np.full(30, 1e-2)])
    for n in (20, 50):
        parts = {p: (drawn(n, 40, p) * spectrum).astype(np.float32) for p in (0, 1)}
        for part, x in judgement._candidates(parts):
            used = list(parts.values()) if part is None else [parts[part]]
            gram = np.mean([y @ y.T for y in used], 0)  # of ten strong directions, or twenty
            assert x.shape == (n, min(n, 24)) and x.dtype == np.float64
            np.testing.assert_allclose(x @ x.T, gram, atol=1e-4 if n == 20 else 0.1)


# -- what is found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_mislabeled_pairs_are_found_and_counted(noise: float) -> None:
    features, mislabeled = pairs(300, noise)
    found = judge_pairs([features])
    assert found.fit.low < noise < found.fit.high and abs(found.fit.rate - noise) < 0.05
    assert roc_auc_score(mislabeled, -found.log_odds) > 0.98
    assert ((found.p_correct < 0.5) == mislabeled).mean() > 0.97


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("wide", [False, True])
def test_mislabeled_classes_are_found_and_counted(rate: float, wide: bool) -> None:
    x, labels, wrong = clouds(rate)
    parts = [x @ np.random.default_rng(1).normal(size=(12, 500)).astype(np.float32)] if wide else [x]
    found = judge_classes(parts, labels)
    assert found.fit.low < rate < found.fit.high and found.fit.num_labels == K
    assert (found.p_correct[wrong] < 0.5).mean() > 0.95 and (found.p_correct[~wrong] < 0.5).mean() < 0.02
    assert found.part == 0 and found.num_copies == 0
    other = judge_classes(parts, 7 * labels + 2)  # a head may have more classes than the data
    assert other.fit == found.fit and np.array_equal(other.p_correct, found.p_correct)
    one, other = (judge_classes([x], y) for y in (labels % 2, 1 - labels % 2))
    np.testing.assert_allclose(one.log_odds, other.log_odds, rtol=1e-6)


def test_clean_labels_are_left_alone() -> None:
    found = judge_pairs([pairs(300, 0.0)[0]])
    assert found.fit.rate < 0.01 and found.fit.low < 0.005 and (found.p_correct < 0.5).mean() <= 0.01
    found = judge_classes([clouds(0.0)[0]], clouds(0.0)[1])
    assert found.fit.rate < 0.02 and (found.p_correct < 0.5).mean() <= 0.01 and found.rounds == 1


def test_without_signal_the_interval_is_open_and_no_label_stands_out() -> None:
    found = judge_pairs([guesses(300, 3)])
    assert found.fit.open_ended and found.fit.low < 0.1
    assert (found.p_correct < 0.5).mean() < 0.1
    assert judge_pairs([guesses(300, 4)]).rounds == 1  # a second round is no gain


def test_of_several_parts_one_that_tells_is_taken() -> None:
    good, mislabeled = pairs(200, 0.2)
    bad = pairs(200, 0.0, seed=5)[0] * np.random.default_rng(4).choice([-1, 1], 200)[:, None]
    for parts, wrong in (([bad, good], 0), ([good, bad.astype(np.float32)], 1)):
        found = judge_pairs(parts)
        assert found.part != wrong
        assert roc_auc_score(mislabeled, -found.log_odds) > 0.97
    x, labels, _ = clouds(0.2)
    noise = 3 * np.random.default_rng(2).normal(size=(400, 30)).astype(np.float32)
    same = np.ones((400, 5), np.float32)
    assert judge_classes([noise, x], labels).part == 1
    assert judge_classes([x, noise], labels).part == 0
    assert judge_classes([same, x], labels).part == 1  # it does not tell them apart
    halves = [x[:, :2], np.concatenate([x[:, 2:4], np.ones((400, 1), np.float32)], 1)]
    assert judge_classes(halves, labels).part is None


def test_the_first_that_predicts_as_well_as_the_best_is_taken() -> None:
    rng = np.random.default_rng(0)
    good = rng.normal(size=200) + 2
    lucky, chance = good + 0.1 * rng.normal(size=200), rng.normal(size=200)

    def chosen(*log_odds: np.ndarray) -> int:
        return judgement._simplest([likelihood(each, fit_noise(each).rate)[1] for each in log_odds])

    assert chosen(good, lucky) == chosen(lucky, good) == 0
    assert chosen(chance, good) == 1 and chosen(good, chance) == 0
    for ridges in (judgement.RIDGES, judgement.CLASS_RIDGES):
        assert list(ridges) == sorted(ridges, reverse=True)  # the simplest first


def test_a_second_round_of_pairs_keeps_the_first_estimate_of_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    x, direction = rng.normal(size=(300, 40)), rng.normal(size=40)
    mislabeled = rng.permutation(300) < 60
    features = (x * (np.sign(x @ direction) * np.where(mislabeled, -1, 1))[:, None]).astype(np.float32)
    second = judge_pairs([features])
    monkeypatch.setattr(judgement, "_held_out", lambda *_: (np.ones(300), np.ones(300)))  # no gain
    first = judge_pairs([features])
    assert (first.rounds, second.rounds) == (1, 2)
    one, other = first.fit, second.fit
    assert (one.rate, one.low, one.high) == (other.rate, other.low, other.high)
    assert roc_auc_score(mislabeled, -second.log_odds) > roc_auc_score(mislabeled, -first.log_odds)


def test_a_second_round_of_classes_is_taken_where_it_is_a_gain() -> None:
    """Few examples and many mislabeled: without these the rest says more."""
    x, labels, wrong = clouds(0.3, n=300)
    x = np.concatenate([x, np.random.default_rng(3).normal(size=(300, 60)).astype(np.float32)], 1)
    found = judge_classes([x], labels)
    assert found.rounds == 2 and ((found.p_correct < 0.5) == wrong).mean() > 0.97


def test_an_example_without_a_gradient_is_not_judged_by_its_rounding() -> None:
    features, _ = pairs(200, 0.2)
    features[:5] = 1e-6 * np.random.default_rng(0).normal(size=features[:5].shape)
    nothing = np.zeros_like(features)  # a part of the model that has no gradient at all
    found = judge_pairs([nothing, features])
    np.testing.assert_allclose(found.log_odds[:5], 0, atol=1e-12)
    np.testing.assert_allclose(found.p_correct[:5], 1 - found.fit.rate)
    assert found.part == 1 and found.num_copies == 0


def test_copies_are_counted_and_doubted() -> None:
    features, _ = pairs(100, 0.3)
    found = judge_pairs([np.concatenate([features, features[:20]])])
    assert found.num_copies == 20
    assert doubt(found.fit, 20, "pairs").startswith("20 pairs are copies of others")
    assert "copies" not in (doubt(found.fit, 1, "pairs") or "")
    x, labels, _ = clouds(0.0)
    twice, next_class = np.concatenate([x, x[:20]]), (labels[:20] + 1) % K
    assert judge_classes([twice], np.concatenate([labels, labels[:20]])).num_copies == 20
    assert judge_classes([twice], np.concatenate([labels, next_class])).num_copies == 0


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.ones((49, 3)), None, "^49 examples are too few to judge labels by: it takes 50 or more"),
        (np.ones((60, 3)), None, "^all examples have the same gradients"),
        (np.full((60, 3), math.nan), None, "not finite: the model gives NaN or inf"),
        (drawn(60), np.ones(60, int), "^all labels are the same"),
    ],
    ids=["few", "same", "nan", "one class"],
)
def test_what_says_nothing_is_refused(x: np.ndarray, labels: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_classes([x], np.arange(len(x)) % 2 if labels is None else labels)
    if labels is None:
        with pytest.raises(ValueError, match=message):
            judge_pairs([x])


# -- scales -------------------------------------------------------------------------------------------------


def test_the_likeliest_scale_is_that_of_the_grid() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=500) * 3
    z = np.abs(z) * np.where(rng.random(500) < 1 / (1 + np.exp(-np.abs(2 * z))), 1, -1)  # τ = 2
    fit = fit_noise(z)
    tau, each = likelihood(z, fit.rate)
    assert each.mean() >= fit.log_likelihood - 1e-3 and abs(np.log(tau / fit.tau)) < 0.3


def test_the_temperature_is_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, K)) * 2
    labels = (np.exp(log_softmax(logits, 1)).cumsum(1) > rng.random((20_000, 1))).argmax(1)
    factor, each = temperature(logits / 5, labels, rate=0.0)
    assert factor == pytest.approx(5.0, rel=0.05)
    expected = log_softmax(factor * logits / 5, 1)[np.arange(20_000), labels]
    np.testing.assert_allclose(each, expected, rtol=1e-6)
    wrong = rng.random(20_000) < 0.3
    observed = np.where(wrong, (labels + rng.integers(1, K, size=20_000)) % K, labels)
    assert temperature(logits / 5, observed)[0] == pytest.approx(5.0, rel=0.1)  # the rate is found as well


def test_log_odds_are_those_of_the_softmax() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(50, K)) * 3, np.arange(50) % K
    p = np.exp(log_softmax(logits, 1))[np.arange(50), labels]
    np.testing.assert_allclose(class_log_odds(logits, labels), np.log(p / (1 - p)))
