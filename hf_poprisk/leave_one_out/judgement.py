"""What the rest of the data says about each pair: which features, which λ, how many labels are mislabeled.

Everything is chosen by how well the leave-one-out log-odds predict the observed labels, the likelihood of the
two-part model of ``noise.py``: no validation set, no noise rate told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_poprisk.leave_one_out.noise import NoiseFit, fit_noise, likelihood
from hf_poprisk.leave_one_out.regression import compact, leave_one_out

RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
FEWEST = 50  # examples
NOTHING = 1e-3  # of the median length: what is shorter is rounding
FOLDS = 5  # of the test whether a second round is a gain


# part, features, λ, leave-one-out log-odds, and their two-part model
_Fitted = tuple[int | None, np.ndarray, float, np.ndarray, NoiseFit]


@dataclass(frozen=True)
class Judgement:
    """Of n labels.

    Attributes:
        log_odds: leave-one-out, in nats, [n].
        p_correct: probability that each label is correct, [n].
        fit: the noise rate with its interval.
        part: which features were used: an index into those given, or None for all of them together.
        ridge: λ.
        rounds: 2 if the regression was weighted by what a first one gave.
        num_copies: examples that others have the same features as.
    """

    log_odds: np.ndarray
    p_correct: np.ndarray
    fit: NoiseFit
    part: int | None
    ridge: float
    rounds: int
    num_copies: int


def judge(parts: Sequence[np.ndarray], seed: int = 0) -> Judgement:
    """Judge every label by a regression on the features of all others.

    Args:
        parts: features of the observed label's log-odds, [n, k] each: a swapped pair has the opposite ones.
        seed: of the folds.

    Raises:
        ValueError: fewer than 50 examples, features that are not finite, or that do not differ.
    """
    units = unit_features(parts)
    part, features, ridge, log_odds, fit = _simplest(
        [
            (part, features, ridge, log_odds, fit)
            for part, features in candidates(units)
            for ridge, log_odds, fit in _path(features)
        ]
    )
    p_correct, rounds = _p_correct(fit, log_odds), 1
    again = _second_round(features, ridge, p_correct, seed)
    if again is not None:
        # its own likelihood is not held out, and its rate too low: its weights were computed with all labels
        ridge, log_odds, second = again
        fit, rounds = replace(fit, tau=likelihood(log_odds, fit.rate)[0]), 2
        p_correct = _p_correct(fit, log_odds)
    return Judgement(log_odds, p_correct, fit, part, ridge, rounds, num_copies(next(iter(units.values()))))


def _simplest(found: list[_Fitted]) -> _Fitted:
    """The first of those that predict the labels as well as the best does, but for a standard error."""
    return found[simplest([likelihood(log_odds, fit.rate)[1] for *_, log_odds, fit in found])]


def simplest(scores: Sequence[np.ndarray]) -> int:
    """The first whose mean is as high as the highest, but for a standard error of their difference; [n] each.

    The one-standard-error rule (Hastie, Tibshirani and Friedman 2009, section 7.10): of many, the likeliest
    one is often lucky.
    """
    best = max(scores, key=np.mean)
    gains = (best - score for score in scores)
    return next(i for i, d in enumerate(gains) if d.mean() <= d.std(ddof=1) / np.sqrt(len(d)))


def unit_features(parts: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """The parts that tell examples apart, every example's features to length 1.

    Raises:
        ValueError: as ``judge``.
    """
    n = len(parts[0])
    if n < FEWEST:
        raise ValueError(f"{n} examples are too few to judge labels by: it takes {FEWEST} or more.")
    units = {part: unit for part, x in enumerate(parts) if (unit := _unit(x)) is not None}
    if not units:
        raise ValueError("all examples have the same gradients, so none says anything about another's label.")
    return units


def candidates(units: Mapping[int, np.ndarray]) -> Iterator[tuple[int | None, np.ndarray]]:
    """All parts of the features together, and each of them, in no more than n dimensions; [n, m] float64."""
    n, widths = len(next(iter(units.values()))), [x.shape[1] for x in units.values()]
    grams = {part: x @ x.T for part, x in units.items()} if sum(widths) > n else {}
    if len(units) > 1 and grams:
        yield None, compact(np.mean(list(grams.values()), 0))
    elif len(units) > 1:
        yield None, np.concatenate(list(units.values()), 1).astype(np.float64) / np.sqrt(len(units))
    for part, x in units.items():
        yield part, compact(grams[part]) if x.shape[1] > n else x.astype(np.float64)


def _unit(x: np.ndarray) -> np.ndarray | None:
    """Every example's features to length 1; None if they do not differ.

    Of an example without a gradient, such as a pair of twice the same text, they are zero, not its rounding.
    """
    if not np.isfinite(x).all():  # asked here, where every rank has all of them
        raise ValueError("the gradients of the labels' log-odds are not finite: the model gives NaN or inf.")
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.any() or (x == x[0]).all():
        return None
    return x / np.where(lengths > NOTHING * np.median(lengths[lengths > 0]), lengths, np.inf)


def num_copies(unit: np.ndarray, labels: np.ndarray | None = None) -> int:
    """Examples whose features, not zero, are those of an earlier one, up to rounding.

    Args:
        labels: [n], of classes, whose features do not know them: copies have the same one.
    """
    drawn = unit @ np.random.default_rng(0).normal(size=(unit.shape[1], 4)).astype(np.float32)
    some = np.abs(drawn).any(1)
    rows = np.round(drawn[some], 3)
    if labels is not None:
        rows = np.column_stack([rows, labels[some]])
    return len(rows) - len(np.unique(rows, axis=0))


def _path(
    features: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[float, np.ndarray, NoiseFit]]:
    """λ, leave-one-out log-odds and their two-part model, for every λ."""
    found, a = [], None
    for ridge in RIDGES:
        log_odds, a = leave_one_out(features, ridge, weights, a)
        found.append((ridge, log_odds, fit_noise(log_odds)))
    return found


def _p_correct(fit: NoiseFit, log_odds: np.ndarray) -> np.ndarray:
    return fit.p_correct(torch.from_numpy(log_odds)).numpy()


def _second_round(
    features: np.ndarray, ridge: float, p_correct: np.ndarray, seed: int
) -> tuple[float, np.ndarray, NoiseFit] | None:
    """The regression weighted by p_correct, if that is better on examples that were left out of both rounds.

    Cross-fitted: what is held out has no part in the weights either.
    """
    found = max(_path(features, p_correct), key=lambda each: each[2].log_likelihood)
    folds = np.random.default_rng(seed).permutation(len(features)) % FOLDS
    scores = np.zeros((2, len(features)))
    for fold in range(FOLDS):
        rest, held = features[folds != fold], features[folds == fold]
        log_odds, a = leave_one_out(rest, ridge)
        weights = _p_correct(fit_noise(log_odds), log_odds)
        scores[0, folds == fold] = held @ a
        scores[1, folds == fold] = held @ leave_one_out(rest, found[0], weights)[1]
    first, second = (likelihood(score)[1] for score in scores)
    return found if second.mean() > first.mean() else None
