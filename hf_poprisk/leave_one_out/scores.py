"""How good the scores are: against labels known to be wrong, and without any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from hf_poprisk.leave_one_out.run import Run

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Some examples of similar prediction.

    Attributes:
        count: how many.
        low, high: their smallest and largest value of what they were sorted by, a probability.
        predicted: mean probability of the event.
        observed: share of the examples for which it holds; None if that cannot be known.
    """

    count: int
    low: float
    high: float
    predicted: float
    observed: float | None

    @property
    def standard_error(self) -> float:
        """Of the observed share, if the prediction is right."""
        return math.sqrt(max(self.predicted * (1 - self.predicted), 0.0) / self.count)


@dataclass(frozen=True)
class Truth:
    """The scores of the visited examples against labels known to be wrong.

    Attributes:
        count: examples.
        num_wrong: of them with a wrong label.
        num_called: of them with a posterior of being right below 1/2.
        num_hit: of them both.
        auroc_suspicion, auroc_loss: of ``suspicion`` and of ``loss_mean``; NaN if all labels are right, or
            all wrong.
        bins: reliability of the posterior of being right; empty without a fit.
    """

    count: int
    num_wrong: int
    num_called: int
    num_hit: int
    auroc_suspicion: float
    auroc_loss: float
    bins: list[Bin]

    @property
    def precision(self) -> float:
        """Share of wrong labels among those called wrong; NaN if there are none."""
        return self.num_hit / self.num_called if self.num_called else math.nan

    @property
    def recall(self) -> float:
        """Share of those called wrong among the wrong labels; NaN if there are none."""
        return self.num_hit / self.num_wrong if self.num_wrong else math.nan


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores higher than a negative, a tie counting half (Mann and Whitney).

    Args:
        scores: [n].
        positive: [n] bool.

    Returns:
        NaN if there are no positives, or only positives.
    """
    positive = np.asarray(positive, dtype=bool)
    num_positive = int(positive.sum())
    pairs = num_positive * (len(positive) - num_positive)
    if not pairs:
        return math.nan
    above = rankdata(scores)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / pairs)


def reliability(
    by: np.ndarray, predicted: np.ndarray, happened: np.ndarray | None, bins: int = BINS
) -> list[Bin]:
    """Equally large bins, in ascending order of ``by``.

    Args:
        by: what to sort by, a probability, [n].
        predicted: probability of an event, [n].
        happened: whether it happened, [n] in [0, 1], or None where nobody knows.
        bins: how many; fewer if there are fewer examples.
    """
    parts = np.array_split(np.argsort(by, kind="stable"), min(bins, len(by))) if len(by) else []
    return [
        Bin(
            len(part),
            float(by[part[0]]),
            float(by[part[-1]]),
            float(predicted[part].mean()),
            None if happened is None else float(happened[part].mean()),
        )
        for part in parts
    ]


def expected_error(bins: Sequence[Bin]) -> float:
    """Mean over the examples of the distance between a bin's prediction and what was observed."""
    observed = [b for b in bins if b.observed is not None]
    if not observed:
        return math.nan
    total = sum(b.count * abs(b.predicted - b.observed) for b in observed)  # type: ignore[operator]
    return total / sum(b.count for b in observed)


def chance_error(bins: Sequence[Bin]) -> float:
    """What ``expected_error`` would be on average if every prediction were right, from the normal law."""
    spread = sum(b.count * b.standard_error for b in bins)
    return math.sqrt(2 / math.pi) * spread / sum(b.count for b in bins)


def calibration(run: Run, bins: int = BINS) -> list[Bin]:
    """Held-out predictions against the observed labels; no true label is needed.

    What is tested is the last estimate, at its own rate: it gives an observed label the probability
    ``(1 − ε) q + ε (1 − q)/(K − 1)``. Of two labels, the one that the model expects has the log-odds |ζ|, and
    whether it is the observed one is the sign of ζ: bins by its q, which is 1/2 or more, compare that
    probability with the share of labels as expected. Of more labels, the run has not kept which one was
    expected: bins by the q of the observed label, and no share.

    Raises:
        AuditError: the run has no fit.
    """
    run.posterior()  # says what is missing
    fit, heldout = run.fit, run.heldout[run.visited]
    assert fit is not None
    happened = None
    if fit.num_labels == 2:
        happened, heldout = (np.sign(heldout) + 1) / 2, np.abs(heldout)
    c = math.log(fit.num_labels - 1)
    q = torch.sigmoid(fit.tau * (torch.from_numpy(heldout) + c) - c).numpy()
    predicted = (1 - fit.rate) * q + fit.rate * (1 - q) / (fit.num_labels - 1)
    return reliability(q, predicted, happened, bins)


def compare_with_truth(run: Run, flips: np.ndarray, bins: int = BINS) -> Truth:
    """The visited examples' scores against the labels known to be wrong.

    Args:
        flips: of every example of the run, [n] bool.
        bins: of the reliability.
    """
    visited = run.visited
    wrong = flips[visited]
    called, found = np.zeros_like(wrong), []
    if run.fit is not None:
        posterior = run.posterior()[visited]
        called, found = posterior < 0.5, reliability(posterior, posterior, ~wrong, bins)
    return Truth(
        count=len(wrong),
        num_wrong=int(wrong.sum()),
        num_called=int(called.sum()),
        num_hit=int((called & wrong).sum()),
        auroc_suspicion=auroc(run.suspicion[visited], wrong),
        auroc_loss=auroc(run.loss_mean[visited], wrong),
        bins=found,
    )


def most_contradicted(run: Run, count: int) -> np.ndarray:
    """Where the visited examples of the highest suspicion stand in the table, [≤ count], highest first."""
    visited = np.flatnonzero(run.visited)
    return visited[np.argsort(-run.suspicion[visited], kind="stable")][:count]
