"""The noise rate and its interval."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_poprisk.leave_one_out import NoiseFit, fit_noise
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.weights import competent, doubt
from leave_one_out.helpers import drawn


@pytest.mark.parametrize("labels", [2, 10])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.4])
def test_the_fit_finds_the_rate_and_the_scale(rate: float, labels: int) -> None:
    zeta, wrong = drawn(8000, rate, labels, tau=0.5)
    fit = fit_noise(zeta, labels)
    # with more than two labels the scale is bounded, not estimated, and what is ambiguous counts as wrong
    assert -0.02 < fit.rate - wrong.mean() < (0.02 if labels == 2 else 0.06)
    assert fit.tau == pytest.approx(0.5, rel=0.15) if labels == 2 else fit.tau <= 3.001
    assert fit.high - fit.low < 0.08 or rate == 0.4
    weight = fit.p_correct(torch.tensor(zeta)).numpy()
    assert weight.mean() == pytest.approx(1 - wrong.mean(), abs=0.03 if labels == 2 else 0.08)
    for low, high in ((0, 0.2), (0.4, 0.6), (0.8, 1.01)):  # calibrated
        inside = (weight >= low) & (weight < high)
        if inside.sum() > 300 and labels == 2:
            assert 1 - wrong[inside].mean() == pytest.approx(weight[inside].mean(), abs=0.06)


@pytest.mark.parametrize("labels", [2, 5])
def test_the_rate_is_the_posterior_median(labels: int) -> None:
    """Against plain sums over a fine grid that takes every example as it is."""
    zeta, _ = drawn(60, 0.3, labels)
    c, scale = math.log(labels - 1), 1 / np.median(np.abs(zeta)) if labels == 2 else 1.0
    taus = np.geomspace(0.05 * scale, 50 * scale if labels == 2 else 3.0, 200)
    rates = np.linspace(0, MAX_RATE, 200)
    q = 1 / (1 + np.exp(-(taus[:, None] * (zeta + c) - c)))
    total = np.array([np.log((1 - e) * q + e * (1 - q) / (labels - 1)).sum(1) for e in rates])
    posterior = np.exp(total - total.max()).sum(1)
    posterior /= posterior.sum()
    fit = fit_noise(zeta, labels)
    below = [posterior[rates <= end].sum() for end in (fit.low, fit.rate, fit.high)]
    assert below == pytest.approx([0.025, 0.5, 0.975], abs=0.015)
    here = total[np.abs(rates - fit.rate).argmin()]
    assert fit.log_likelihood == pytest.approx(here.max() / 60, abs=1e-3)
    assert fit.tau == pytest.approx(taus[here.argmax()], rel=0.2)


@pytest.mark.parametrize("rate", [0.002, 0.3])
def test_many_examples_are_fitted_as_few_are(rate: float) -> None:
    """In one go, although their ζ are binned; few mislabeled among many are found as well."""
    zeta, wrong = drawn(100_000, rate, 2)
    few, many = fit_noise(zeta[:2000]), fit_noise(zeta)
    assert many.low <= wrong.mean() <= many.high and many.rate == pytest.approx(wrong.mean(), rel=0.2)
    assert many.tau == pytest.approx(1.0, rel=0.05)
    if rate > 0.1:
        assert (few.high - few.low) / (many.high - many.low) == pytest.approx(50**0.5, rel=0.2)


@pytest.mark.parametrize(("rate", "off"), [(0.2, 0.02), (0.3, 0.03), (0.4, 0.07)])
def test_a_flat_likelihood_is_not_read_off_at_its_top(rate: float, off: float) -> None:
    """Of 512 pairs: over many draws the estimates lie around the rate, and none at zero."""
    fits = [fit_noise(drawn(512, rate, 2, seed=seed)[0]) for seed in range(40)]
    rates = np.array([fit.rate for fit in fits])
    assert rates.mean() == pytest.approx(rate, abs=off) and rates.min() > 0.1
    assert sum(fit.low <= rate <= fit.high for fit in fits) >= 36


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_no_scale_of_the_log_odds_is_too_small_or_too_large(size: float) -> None:
    zeta = (size * drawn(512, 0.3, 2)[0]).astype(np.float32)
    fit = fit_noise(zeta)
    assert fit.rate == pytest.approx(0.3, abs=0.06)
    weight = fit.p_correct(torch.from_numpy(zeta))
    assert weight.isfinite().all() and weight.min() < 0.1 < 0.9 < weight.max()
    assert fit_noise(np.full(3, 1e-38, np.float32)).open_ended


def test_p_correct_is_bayes_rule() -> None:
    fit = fit_noise(drawn(2000, 0.3, 4)[0], 4)
    zeta = torch.tensor([-30.0, -2.0, 0.0, 3.0, 500.0], dtype=torch.float64)
    q = torch.sigmoid(fit.tau * (zeta + math.log(3)) - math.log(3))
    right, wrong = (1 - fit.rate) * q, fit.rate * (1 - q) / 3
    torch.testing.assert_close(fit.p_correct(zeta), right / (right + wrong))


def test_the_ends_of_the_range() -> None:
    """Without a sign every rate is as likely; at a rate of zero every label is right."""
    fit = fit_noise(np.zeros(100))
    assert [fit.low, fit.rate, fit.high] == pytest.approx([0.025 * MAX_RATE, MAX_RATE / 2, 0.975 * MAX_RATE])
    assert fit.open_ended
    fit = NoiseFit(0.0, 0.0, 0.1, 1000.0, 2, -0.1, 100)
    assert fit.p_correct(torch.tensor([-300.0, 0.0, 5.0])).tolist() == [1.0] * 3
    assert replace(fit, log_likelihood=0.0).explained == 1.0


def test_where_no_label_is_contradicted_the_rate_is_next_to_nothing() -> None:
    fit = fit_noise(np.linspace(0.5, 4.0, 1000))
    assert fit.low < 1e-3 and fit.rate < 2e-3 and fit.high < 5e-3 and fit.tau > 5
    assert fit.p_correct(torch.tensor([0.5, 1.0, 4.0])).min() > 0.999


def test_nothing_to_learn_from_leaves_the_rate_open() -> None:
    fit = fit_noise(np.random.default_rng(0).choice([-1.0, 1.0], 4000))
    assert fit.low < 0.05 and fit.open_ended and fit.high <= MAX_RATE and not competent(fit, "pairs")
    with pytest.raises(ValueError, match="at least one example"):
        fit_noise(np.array([]))
    with pytest.raises(ValueError, match="finite"):
        fit_noise(np.array([1.0, math.nan]))


def test_what_is_explained_is_none_at_chance_and_all_where_every_label_is_sure() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 10):
        wrong = rng.random(4000) < 0.3
        sure = fit_noise(np.where(wrong, -1.0, 1.0) * rng.uniform(3, 60, 4000), classes)
        assert sure.explained == pytest.approx(1.0, abs=0.02)
        logits = rng.normal(size=(4000, classes))  # whatever the label is, which is the first
        guessed = fit_noise(logits[:, 0] - np.log(np.exp(logits[:, 1:]).sum(1)), classes)
        assert guessed.explained < 0.1 and competent(sure, "examples") and not competent(guessed, "pairs")
        by_luck = replace(sure, num_examples=2 if classes == 2 else 1)
        assert not competent(replace(by_luck, log_likelihood=-math.log(classes) + 0.5), "pairs")


def test_where_tau_ends_at_its_limit_there_is_an_interval() -> None:
    rng = np.random.default_rng(3)
    sure = fit_noise(3e-3 * np.where(rng.permutation(512) < 160, -1.0, 1.0) * np.geomspace(1e-3, 1, 512))
    assert sure.tau > 1e4 and sure.rate == pytest.approx(160 / 512, abs=0.05)
    assert 0.02 < sure.rate - sure.low < 0.1


CLOSED = NoiseFit(0.2, 0.1, 0.3, 1.5, 2, -0.5, 400)
OF_CLASSES = NoiseFit(0.2, 0.15, 0.25, 1.0, 10, -1.1, 400)
PREDICTED = "the model's gradients predict labels"
OPEN = "the pairs leave the noise rate open"


@pytest.mark.parametrize(
    ("fit", "copies", "what", "says"),
    [
        (CLOSED, 0, "pairs", None),
        (replace(CLOSED, log_likelihood=-math.log(2)), 0, "pairs", f"{PREDICTED} hardly better"),
        (replace(CLOSED, low=0.2, high=0.435), 0, "pairs", f"{OPEN} (0.200 to 0.435): more pairs may tell"),
        (replace(CLOSED, low=0.05, high=0.4), 0, "pairs", f"{OPEN} (0.050 to 0.400): more pairs may tell"),
        (replace(CLOSED, log_likelihood=-0.6), 0, "pairs", None),  # a seventh of what can be known
        (replace(CLOSED, log_likelihood=-0.6), 0, "examples", f"{PREDICTED} too badly, so the am"),
        (OF_CLASSES, 0, "examples", None),
        (OF_CLASSES, 5, "examples", "5 examples are copies of others, which confirm their labels"),
    ],
)
def test_an_estimate_that_means_little_is_doubted(fit: NoiseFit, copies: int, what: str, says: Any) -> None:
    found = doubt(fit, copies, what)
    assert found is None if says is None else found.startswith(says)
