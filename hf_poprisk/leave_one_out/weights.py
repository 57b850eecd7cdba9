"""When an estimate of the noise rate means little."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_poprisk.leave_one_out.noise import MAX_RATE, NoiseFit

# Nats per example and epoch: while labels are still predicted better by more than this, the model is not
# competent to judge, and what it has not learned yet would pass for mislabeled.
STILL_LEARNING = 0.01
OPEN_WIDTH = 0.3  # of an interval that tells little; that of a flat posterior is .43
COPIES = 0.01  # of the pairs: with more of them the rate comes out too low
ALL_CLEAN = 0.01  # a lower end of the interval below it: there may be no mislabeled label at all
TRAIN_LONGER = "set num_train_epochs to three or more"


def competent(fit: NoiseFit) -> bool:
    """Whether labels are predicted better than by chance: else everybody would look mislabeled.

    By a tenth of what can be known, and beyond luck: a likelihood-ratio test at 5 %.
    """
    gain = fit.log_likelihood + math.log(fit.num_labels)
    return fit.explained > 0.1 and 2 * fit.num_examples * gain > 3.84


def doubt_before(fit: NoiseFit, num_copies: int = 0) -> str | None:
    """Why an estimate before training means little, a sentence without its end; None if it does not."""
    if not competent(fit):
        return (
            "the model's gradients predict labels hardly better than by chance: more pairs, or a model that "
            "knows the task better, may tell"
        )
    if num_copies > COPIES * fit.num_examples:
        return (
            f"{num_copies} pairs are copies of others, which confirm their labels whatever they are: judge "
            "the data without them"
        )
    if fit.open_ended or fit.high - fit.low > OPEN_WIDTH:
        return f"the pairs leave the noise rate open ({fit.low:.3f} to {fit.high:.3f}): more pairs may tell"
    return None


def last_rise(fits: Sequence[NoiseFit]) -> float:
    """Nats by which the log-likelihood rose over the last epoch; 0 within the first two."""
    before = next((fit for fit in reversed(fits) if fit.epoch <= fits[-1].epoch - 1 + 1e-6), None)
    return 0.0 if before is None else fits[-1].log_likelihood - before.log_likelihood


def doubt(fits: Sequence[NoiseFit], judging_since: int | None) -> str | None:
    """Why an estimate of training means little, a sentence without its end; None if it does not.

    Args:
        fits: one or more.
        judging_since: as in ``LabelNoise``.
    """
    if judging_since is None:
        higher = "" if competent(fits[-1]) else " or learning_rate"
        return f"no label was judged, because {_why_not_judged(fits)}: raise num_train_epochs{higher}"
    if not competent(fits[-1]):
        return "labels are predicted hardly better than by chance: raise learning_rate or num_train_epochs"
    if fits[-1].capped:
        return (
            f"the estimate is at its limit of {MAX_RATE}: the model has not learned the task, has learned "
            "mislabeled examples by heart, or nearly half of the labels are mislabeled"
        )
    return None


def caveat(fits: Sequence[NoiseFit]) -> str | None:
    """What else speaks against the estimate, a sentence without its end; None if nothing does."""
    if last_rise(fits) <= STILL_LEARNING:
        return None
    return (
        "labels were still predicted better and better at the end: the noise rate is not settled, and too "
        "low if labels are learned by heart"
    )


def _why_not_judged(fits: Sequence[NoiseFit]) -> str:
    """What ``judging_since`` was waiting for, as the end of a sentence; there is a fit."""
    if not competent(fits[-1]):
        return "labels were predicted hardly better than by chance"
    if fits[-1].epoch >= fits[0].epoch + 1 - 1e-6:
        return "labels were predicted better and better until the end"
    return "classes are judged from the end of the second epoch on at the earliest"
