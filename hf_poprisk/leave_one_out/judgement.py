"""What the rest of the data says about each label: which features, which λ, how many are mislabeled.

Everything is chosen by how well the leave-one-out log-odds predict the observed labels, the likelihood of the
two-part model of ``noise.py``: no validation set, no noise rate told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import expit

from hf_poprisk.leave_one_out.noise import NoiseFit, class_log_odds, fit_noise, likelihood, temperature
from hf_poprisk.leave_one_out.regression import Ridge, leave_one_out

# of pairs and of classes, the simplest first
RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
CLASS_RIDGES = (*RIDGES, 0.03, 0.01, 0.003, 0.001)
FEWEST = 50  # examples
MOST_DIMENSIONS = 4096  # of a regression, whose time grows with the square
MOST_NUMBERS = 1 << 27  # n · dimensions, a gigabyte
_NOTHING = 1e-3  # of the median length: what is shorter is rounding
_FOLDS = 5  # of the test whether a second round is a gain

# the examples to fit, λ, their weights → leave-one-out log-odds of these, and coefficients
_Fit = Callable[[np.ndarray, float, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


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
        dual: of pairs, the solution weighted by p_correct is ``Σ_i dual_i φ_i`` of each part, [n, parts]; of
            very many pairs nearly that.
    """

    log_odds: np.ndarray
    p_correct: np.ndarray
    fit: NoiseFit
    part: int | None
    ridge: float
    rounds: int
    num_copies: int
    dual: np.ndarray | None = None


def judge_pairs(parts: Sequence[np.ndarray]) -> Judgement:
    """Judge every label by a logistic regression on the features of all others.

    Args:
        parts: features of the observed label's log-odds, [n, k] each: a swapped pair has the opposite ones.

    Raises:
        ValueError: fewer than 50 examples, features that are not finite, or that do not differ.
    """
    units = _unit_features(parts)
    found = [
        (part, features, *each) for part, features in _candidates(units) for each in _pair_path(features)
    ]
    scores = [likelihood(log_odds, fit.rate)[1] for *_, log_odds, fit in found]
    part, features, ridge, log_odds, fit = found[_simplest(scores)]
    p_correct, rounds = _p_correct(fit, log_odds), 1

    def again(rows: np.ndarray, ridge: float, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return leave_one_out(features[rows], ridge, weights)

    second = max(_pair_path(features, p_correct), key=lambda each: each[2].log_likelihood)
    gain = np.subtract(*(likelihood(x)[1] for x in _held_out(features, again, (second[0], ridge))))
    if gain.mean() > 0:
        # its own likelihood is not held out, and its rate too low: its weights were computed with all labels
        (ridge, log_odds, _), rounds = second, 2
        fit = replace(fit, tau=likelihood(log_odds, fit.rate)[0])
        p_correct = _p_correct(fit, log_odds)
    fitted = features @ leave_one_out(features, ridge, p_correct)[1]
    dual = p_correct * expit(-fitted) / ridge
    used = units if part is None else (part,)
    duals = np.stack([dual / _lengths(x) if p in used else 0 * dual for p, x in enumerate(parts)], 1)
    return Judgement(log_odds, p_correct, fit, part, ridge, rounds, _num_copies(units), duals)


def judge_classes(parts: Sequence[np.ndarray], labels: np.ndarray) -> Judgement:
    """Judge every label by a ridge regression on the features of all others.

    Its leave-one-out scores, times a factor, are the logits of the K labels.

    Args:
        parts: features of the examples, whatever their labels are, [n, k] each.
        labels: [n] int. K is how many different ones there are, of which a head may have more.

    Raises:
        ValueError: as ``judge_pairs``; labels that are all the same.
    """
    units = _unit_features(parts)
    if (labels == labels[0]).all():
        raise ValueError("all labels are the same, so none says anything about another.")
    known, labels = np.unique(labels, return_inverse=True)
    num_labels, targets = len(known), np.eye(len(known))[labels]
    # a constant, for the classes' shares
    withs = ((part, np.concatenate([x, np.ones((len(x), 1))], 1)) for part, x in _candidates(units))
    found = [(part, features, *each) for part, features in withs for each in _class_path(features, targets)]
    part, features, ridge, log_odds, _ = max(found, key=lambda each: each[-1])
    fit, rounds = fit_noise(log_odds, num_labels), 1

    def again(rows: np.ndarray, ridge: float, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        regression = Ridge(features[rows], targets[rows], weights)
        scores = regression.leave_one_out(ridge)
        factor, _ = temperature(scores, labels[rows])
        return class_log_odds(factor * scores, labels[rows]), regression.coefficients(ridge)

    path = _class_path(features, targets, _p_correct(fit, log_odds))
    second = max(path, key=lambda each: each[-1])
    scores = _held_out(features, again, (second[0], ridge), num_labels)
    gain = np.subtract(*(temperature(x, labels, fit.rate)[1] for x in scores))
    if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
        (ridge, log_odds, _), rounds = second, 2
        # how well labels are predicted is honest of the first round only
        fit = replace(fit_noise(log_odds, num_labels), log_likelihood=fit.log_likelihood)
    p_correct = _p_correct(fit, log_odds)
    return Judgement(log_odds, p_correct, fit, part, ridge, rounds, _num_copies(units, labels))


def _pair_path(
    features: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[float, np.ndarray, NoiseFit]]:
    """λ, leave-one-out log-odds and their two-part model, for every λ."""
    found, a = [], None
    for ridge in RIDGES:
        log_odds, a = leave_one_out(features, ridge, weights, a)
        found.append((ridge, log_odds, fit_noise(log_odds)))
    return found


def _class_path(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[float, np.ndarray, float]]:
    """λ, leave-one-out log-odds and their log-likelihood, for every λ."""
    regression, labels, found = Ridge(features, targets, weights), targets.argmax(1), []
    for ridge in CLASS_RIDGES:
        scores = regression.leave_one_out(ridge)
        factor, each = temperature(scores, labels)
        found.append((ridge, class_log_odds(factor * scores, labels), float(each.mean())))
    return found


def _held_out(
    features: np.ndarray, fit: _Fit, ridges: tuple[float, float], num_labels: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores by a second, weighted round and by the first, of examples that were left out of both.

    Cross-fitted: what is held out has no part in the weights either.

    Args:
        ridges: λ of the second round and of the first.
        num_labels: K of classes.

    Returns:
        [n] each, or [n, K].
    """
    folds = np.random.default_rng(0).permutation(len(features)) % _FOLDS
    first, second = np.zeros((2, len(features), *([num_labels] if num_labels else [])))
    for fold in range(_FOLDS):
        rest, held = folds != fold, folds == fold
        log_odds, a = fit(rest, ridges[1], None)
        first[held] = features[held] @ a
        weights = _p_correct(fit_noise(log_odds, num_labels or 2), log_odds)
        second[held] = features[held] @ fit(rest, ridges[0], weights)[1]
    return second, first


def _p_correct(fit: NoiseFit, log_odds: np.ndarray) -> np.ndarray:
    return fit.p_correct(torch.from_numpy(log_odds)).numpy()


def _simplest(scores: Sequence[np.ndarray]) -> int:
    """The first whose mean is as high as the highest, but for a standard error of their difference; [n] each.

    The one-standard-error rule (Hastie, Tibshirani and Friedman 2009, section 7.10): of many, the likeliest
    one is often lucky.
    """
    best = max(scores, key=np.mean)
    gains = (best - score for score in scores)
    return next(i for i, d in enumerate(gains) if d.mean() <= d.std(ddof=1) / np.sqrt(len(d)))


def _unit_features(parts: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """The parts that tell examples apart, every example's features to length 1."""
    if len(parts[0]) < FEWEST:
        raise ValueError(
            f"{len(parts[0])} examples are too few to judge labels by: it takes {FEWEST} or more."
        )
    units = {part: unit for part, x in enumerate(parts) if (unit := _unit(x)) is not None}
    if not units:
        raise ValueError("all examples have the same gradients, so none says anything about another's label.")
    return units


def _unit(x: np.ndarray) -> np.ndarray | None:
    """Every example's features to length 1; None if they do not differ.

    Of an example without a gradient, such as a pair of twice the same text, they are zero, not its rounding.
    """
    if not np.isfinite(x).all():  # asked here, where every rank has all of them
        raise ValueError("the gradients of the labels' log-odds are not finite: the model gives NaN or inf.")
    if not x.any() or (x == x[0]).all():
        return None
    return x / _lengths(x)[:, None]


def _lengths(x: np.ndarray) -> np.ndarray:
    """[n]; infinite instead of what is rounding."""
    lengths = np.sqrt(np.einsum("nk,nk->n", x, x))
    return np.where(lengths > _NOTHING * np.median(lengths[lengths > 0]), lengths, np.inf)


def _candidates(units: Mapping[int, np.ndarray]) -> Iterator[tuple[int | None, np.ndarray]]:
    """All parts of the features together, and each of them, in no more than n dimensions; [n, m] float64.

    Of very many examples, in the directions of some, evenly spread (Nyström's approximation).
    """
    n = len(next(iter(units.values())))
    most = min(MOST_DIMENSIONS, MOST_NUMBERS // n)
    some = slice(None) if n <= most else np.linspace(0, n - 1, most).astype(int)
    grams: dict[int, np.ndarray] = {}
    for part in [None] * (len(units) > 1) + list(units):
        used = list(units) if part is None else [part]
        if sum(units[p].shape[1] for p in used) <= min(n, most):
            together = np.concatenate([units[p] for p in used], 1)
            yield part, together.astype(np.float64) / np.sqrt(len(used))
            continue
        for p in used:
            if p not in grams:
                grams[p] = units[p][some] @ units[p][some].T
        values, vectors = eigh(np.mean([grams[p] for p in used], 0).astype(np.float64))
        if n <= most:
            yield part, vectors * np.sqrt(values.clip(0))
            continue
        kept = values > 1e-6 * values[-1]  # of float32
        onto = (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32)
        yield part, np.mean([units[p] @ (units[p][some].T @ onto) for p in used], 0, np.float64)


def _num_copies(units: Mapping[int, np.ndarray], labels: np.ndarray | None = None) -> int:
    """Examples whose features, not zero, are those of an earlier one, up to rounding.

    Args:
        labels: [n], of classes, whose features do not know them: copies have the same one.
    """
    unit = next(iter(units.values()))
    drawn = unit @ np.random.default_rng(0).normal(size=(unit.shape[1], 4)).astype(np.float32)
    some = np.abs(drawn).any(1)
    rows = np.round(drawn[some], 3)
    if labels is not None:
        rows = np.column_stack([rows, labels[some]])
    return len(rows) - len(np.unique(rows, axis=0))
