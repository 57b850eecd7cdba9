"""What the rest of the data says about each label of K classes: as ``judgement.py`` does for pairs.

The features do not know the label. The regression's leave-one-out scores, times a factor, are the logits of
the K labels; the factor, the features and λ are chosen by the likelihood of the observed ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from hf_poprisk.leave_one_out.judgement import FOLDS, Judgement, candidates, num_copies, unit_features
from hf_poprisk.leave_one_out.noise import class_log_odds, fit_noise, temperature
from hf_poprisk.leave_one_out.ridge import Ridge

RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


def judge_classes(parts: Sequence[np.ndarray], labels: np.ndarray, seed: int = 0) -> Judgement:
    """Judge every label by a regression on the features of all others.

    Args:
        parts: features of the examples, whatever their labels are, [n, k] each.
        labels: [n] int. K is how many different ones there are, of which a head may have more.
        seed: of the folds.

    Raises:
        ValueError: fewer than 50 examples, features that are not finite, or that do not differ; labels that
            are all the same.
    """
    units = unit_features(parts)
    if (labels == labels[0]).all():
        raise ValueError("all labels are the same, so none says anything about another.")
    known, labels = np.unique(labels, return_inverse=True)
    num_labels = len(known)
    targets = np.eye(num_labels)[labels]
    first = [
        (likelihood, part, features, ridge, log_odds)
        for part, plain in candidates(units)
        for features in [_with_constant(plain)]
        for likelihood, ridge, log_odds in _path(features, targets)
    ]
    _, part, features, ridge, log_odds = max(first, key=lambda found: found[0])
    fit, rounds = fit_noise(log_odds, num_labels), 1
    again = _second_round(features, targets, ridge, _p_correct(log_odds, num_labels), fit.rate, seed)
    if again is not None:
        ridge, log_odds = again
        # how well labels are predicted is honest of the first round only
        fit = replace(fit_noise(log_odds, num_labels), log_likelihood=fit.log_likelihood)
        rounds = 2
    p_correct = fit.p_correct(torch.from_numpy(log_odds)).numpy()
    copies = num_copies(next(iter(units.values())), labels)
    return Judgement(log_odds, p_correct, fit, part, ridge, rounds, copies)


def _with_constant(features: np.ndarray) -> np.ndarray:
    """For the classes' shares."""
    return np.concatenate([features, np.ones((len(features), 1))], 1)


def _path(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[float, float, np.ndarray]]:
    """The log-likelihood, λ and the leave-one-out log-odds, for every λ."""
    regression, labels, found = Ridge(features, targets, weights), targets.argmax(1), []
    for ridge in RIDGES:
        scores = regression.leave_one_out(ridge)
        factor, each = temperature(scores, labels)
        found.append((float(each.mean()), ridge, class_log_odds(factor * scores, labels)))
    return found


def _p_correct(log_odds: np.ndarray, num_labels: int) -> np.ndarray:
    return fit_noise(log_odds, num_labels).p_correct(torch.from_numpy(log_odds)).numpy()


def _second_round(
    features: np.ndarray, targets: np.ndarray, ridge: float, p_correct: np.ndarray, rate: float, seed: int
) -> tuple[float, np.ndarray] | None:
    """λ and log-odds of the regression weighted by p_correct, if that is a gain on examples left out of both.

    Cross-fitted: what is held out has no part in the weights either. A gain is more than its standard error.
    """
    labels, num_labels = targets.argmax(1), targets.shape[1]
    _, found, log_odds = max(_path(features, targets, p_correct), key=lambda each: each[0])
    folds = np.random.default_rng(seed).permutation(len(features)) % FOLDS
    scores = np.zeros((2, *targets.shape))
    for fold in range(FOLDS):
        rest, held = folds != fold, folds == fold
        plain = Ridge(features[rest], targets[rest])
        of_rest = plain.leave_one_out(ridge)
        of_rest = class_log_odds(temperature(of_rest, labels[rest])[0] * of_rest, labels[rest])
        weighted = Ridge(features[rest], targets[rest], _p_correct(of_rest, num_labels))
        scores[0, held] = features[held] @ plain.coefficients(ridge)
        scores[1, held] = features[held] @ weighted.coefficients(found)
    first, second = (temperature(score, labels, rate)[1] for score in scores)
    gain = second - first
    return (found, log_odds) if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)) else None
