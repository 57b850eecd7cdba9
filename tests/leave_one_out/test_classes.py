"""Labels of classes, judged by features that do not know them."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from hf_poprisk.leave_one_out.classes import judge_classes
from hf_poprisk.leave_one_out.noise import class_log_odds, temperature

K = 4


def clouds(rate: float, n: int = 400, apart: float = 4.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Features [n, 12], observed labels, and which of them are mislabeled."""
    rng = np.random.default_rng(seed)
    true = rng.integers(K, size=n)
    x = rng.normal(size=(n, 12)) + apart * np.eye(12)[true]
    wrong = rng.permutation(n) < round(rate * n)
    labels = np.where(wrong, (true + rng.integers(1, K, size=n)) % K, true)
    return x.astype(np.float32), labels, wrong


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("wide", [False, True])
def test_mislabeled_examples_are_found(rate: float, wide: bool) -> None:
    x, labels, wrong = clouds(rate)
    parts = [x @ np.random.default_rng(1).normal(size=(12, 500)).astype(np.float32)] if wide else [x]
    found = judge_classes(parts, labels)
    assert found.fit.low < rate < found.fit.high and found.fit.num_labels == K
    assert (found.p_correct[wrong] < 0.5).mean() > 0.95 and (found.p_correct[~wrong] < 0.5).mean() < 0.02
    assert found.part == 0 and found.num_copies == 0


def test_a_head_may_have_more_classes_than_the_data() -> None:
    x, labels, _ = clouds(0.3)
    one, other = judge_classes([x], labels), judge_classes([x], 7 * labels + 2)
    assert other.fit == one.fit and np.array_equal(other.p_correct, one.p_correct)


def test_copies_have_the_same_label() -> None:
    x, labels, _ = clouds(0.0)
    twice, next_class = np.concatenate([x, x[:20]]), (labels[:20] + 1) % K
    assert judge_classes([twice], np.concatenate([labels, labels[:20]])).num_copies == 20
    assert judge_classes([twice], np.concatenate([labels, next_class])).num_copies == 0


def test_two_classes_are_judged_alike_whichever_is_called_first() -> None:
    x, labels, _ = clouds(0.2)
    one, other = (judge_classes([x], y) for y in (labels % 2, 1 - labels % 2))
    np.testing.assert_allclose(one.log_odds, other.log_odds, rtol=1e-6)


def test_hardly_a_clean_label_is_called_mislabeled() -> None:
    found = judge_classes([clouds(0.0)[0]], clouds(0.0)[1])
    assert found.fit.rate < 0.02 and (found.p_correct < 0.5).mean() <= 0.01


def test_of_several_parts_the_one_that_tells_is_taken() -> None:
    x, labels, _ = clouds(0.2)
    noise = 3 * np.random.default_rng(2).normal(size=(400, 30)).astype(np.float32)
    same = np.ones((400, 5), np.float32)
    assert judge_classes([noise, x], labels).part == 1
    assert judge_classes([x, noise], labels).part == 0
    assert judge_classes([same, x], labels).part == 1  # it does not tell them apart
    halves = [x[:, :2], np.concatenate([x[:, 2:4], np.ones((400, 1), np.float32)], 1)]
    assert judge_classes(halves, labels).part is None


def test_a_second_round_is_taken_where_it_is_a_gain() -> None:
    """Few examples and many mislabeled: without these the rest says more."""
    x, labels, wrong = clouds(0.3, n=300)
    x = np.concatenate([x, np.random.default_rng(3).normal(size=(300, 60)).astype(np.float32)], 1)
    found = judge_classes([x], labels)
    assert found.rounds == 2 and ((found.p_correct < 0.5) == wrong).mean() > 0.97
    x, labels, _ = clouds(0.0)
    assert judge_classes([x], labels).rounds == 1


def test_the_temperature_is_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, K)) * 2
    labels = (np.exp(log_softmax(logits, 1)).cumsum(1) > rng.random((20_000, 1))).argmax(1)
    factor, each = temperature(logits / 5, labels, rate=0.0)
    assert factor == pytest.approx(5.0, rel=0.05)
    np.testing.assert_allclose(
        each, log_softmax(factor * logits / 5, 1)[np.arange(20_000), labels], rtol=1e-6
    )
    wrong = rng.random(20_000) < 0.3
    observed = np.where(wrong, (labels + rng.integers(1, K, size=20_000)) % K, labels)
    assert temperature(logits / 5, observed)[0] == pytest.approx(5.0, rel=0.1)  # the rate is found as well


def test_log_odds_are_those_of_the_softmax() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(50, K)) * 3, np.arange(50) % K
    p = np.exp(log_softmax(logits, 1))[np.arange(50), labels]
    np.testing.assert_allclose(class_log_odds(logits, labels), np.log(p / (1 - p)))


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.ones((49, 3)), np.arange(49) % 2, "^49 examples are too few to judge labels by"),
        (np.ones((60, 3)), np.arange(60) % 2, "^all examples have the same gradients"),
        (np.full((60, 3), math.nan), np.arange(60) % 2, "not finite"),
        (np.random.default_rng(0).normal(size=(60, 3)), np.ones(60, int), "^all labels are the same"),
    ],
    ids=["few", "same", "nan", "one class"],
)
def test_what_says_nothing_is_refused(x: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_classes([x], labels)
