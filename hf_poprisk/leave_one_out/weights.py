"""From the estimates of a run to the weights: which estimate counts, and when it means little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hf_poprisk.leave_one_out.noise import MAX_RATE, NoiseFit

# Nats per example and epoch: while labels are still predicted better by more than this, the model is not
# competent to judge, and what it has not learned yet would pass for mislabeled.
STILL_LEARNING = 0.01
# Of what can be known of the labels, see ``NoiseFit.explained``: with less than that pairs are weighted, and
# not swapped. Swaps by a model that is not sure feed on their own mistakes.
SURE_ENOUGH_TO_SWAP = 0.5
OPEN_WIDTH = 0.3  # of an interval that tells little; that of a flat posterior is .43


def competent(fit: NoiseFit) -> bool:
    """Whether labels are predicted better than by chance: else everybody would look mislabeled.

    By a tenth of what can be known, and beyond luck: a likelihood-ratio test at 5 %.
    """
    gain = fit.log_likelihood + math.log(fit.num_labels)
    return fit.explained > 0.1 and 2 * fit.num_examples * gain > 3.84


def judged_by(fits: Sequence[NoiseFit], preferences: bool) -> NoiseFit:
    """The last fit; of pairs with the rate and the interval of the first one if its rate is higher.

    The first visits are the only ones that are left out exactly, and no label becomes right later: what falls
    below their estimate has been learned by heart. τ is of the log-odds as they are now.
    """
    first, last = fits[0], fits[-1]
    if not (preferences and first.exact and first.rate > last.rate):
        return last
    return replace(last, rate=first.rate, low=first.low, high=first.high)


def sure_enough_to_swap(first: NoiseFit) -> bool:
    """Whether the first visits predicted the labels well."""
    return first.exact and first.explained > SURE_ENOUGH_TO_SWAP and not first.open_ended


def last_rise(fits: Sequence[NoiseFit]) -> float:
    """Nats by which the log-likelihood rose over the last epoch; 0 within the first two."""
    before = next((fit for fit in reversed(fits) if fit.epoch <= fits[-1].epoch - 1 + 1e-6), None)
    return 0.0 if before is None else fits[-1].log_likelihood - before.log_likelihood


def doubt(fits: Sequence[NoiseFit], preferences: bool, judging_since: int | None) -> str | None:
    """Why the estimate means little, a sentence without its end; None if nothing speaks against it.

    Args:
        fits: one or more.
        judging_since: as in ``LabelNoise``.
    """
    first, last = fits[0], fits[-1]
    if judging_since is None:
        higher = "" if competent(last) else " or learning_rate"
        why = _why_not_judged(fits, preferences)
        return f"no label was judged, because {why}: raise num_train_epochs{higher}"
    if not competent(last):
        return "labels are predicted hardly better than by chance: raise learning_rate or num_train_epochs"
    if last.capped:
        return (
            f"the estimate is at its limit of {MAX_RATE}: the model has not learned the task, has learned "
            "mislabeled examples by heart, or nearly half of the labels are mislabeled"
        )
    known = competent(first) and not first.open_ended and first.high - first.low < OPEN_WIDTH
    if known or not (preferences and first.exact):
        return None
    what = f"leave the noise rate open ({first.low:.3f} to {first.high:.3f})"
    if not competent(first):
        what = "were predicted hardly better than by chance"
    return (
        f"the first visits of the pairs, the only ones that are left out exactly, {what}: more pairs, or "
        "another learning_rate, may tell"
    )


def caveat(fits: Sequence[NoiseFit]) -> str | None:
    """What else speaks against the estimate, a sentence without its end; None if nothing does."""
    if last_rise(fits) <= STILL_LEARNING:
        return None
    return (
        "labels were still predicted better and better at the end: the noise rate is not settled, and too "
        "low if labels are learned by heart"
    )


def _why_not_judged(fits: Sequence[NoiseFit], preferences: bool) -> str:
    """What ``judging_since`` was waiting for, as the end of a sentence; there is a fit."""
    if not competent(fits[-1]):
        return "labels were predicted hardly better than by chance"
    if fits[-1].epoch >= fits[0].epoch + 1 - 1e-6:
        return "labels were predicted better and better until the end"
    what = "pairs that the model had been trained on before" if preferences else "classes"
    return f"{what} are judged from the end of the second epoch on at the earliest"


def train_longer(preferences: bool) -> str:
    """How long it takes until weights can have an effect."""
    return f"set num_train_epochs to {'two' if preferences else 'three'} or more"
