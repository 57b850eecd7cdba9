"""What the estimates of a run amount to: what labels are judged by, and when they mean little.

Training, the audit of its folder and what is written by it answer from here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_poprisk.leave_one_out.noise import MAX_RATE, NoiseFit

FITS_NAME = "label_noise.json"
# Nats per example and epoch: while held-out labels are still predicted better by more than this, the model is
# not competent to judge, and what it has not learned yet would pass for wrong.
STILL_LEARNING = 0.01
OPEN_WIDTH = 0.3  # of an interval that tells little; that of a flat posterior is .43


def competent(fit: NoiseFit) -> bool:
    """Whether held-out labels are predicted better than by chance: else everybody would look wrong.

    By a tenth of what can be known, and beyond luck: a likelihood-ratio test at 5 %.
    """
    gain = fit.log_likelihood + math.log(fit.num_labels)
    return fit.explained > 0.1 and 2 * fit.num_examples * gain > 3.84


def judged_by(fits: Sequence[NoiseFit], preferences: bool) -> NoiseFit:
    """The last fit; of pairs with the rate and the interval of the first one if its rate is higher.

    The first visits are the only ones that are held out exactly, and no label becomes right later: what falls
    below their estimate has been learned by heart. τ is of the log-odds as they are now.
    """
    first, last = fits[0], fits[-1]
    if not (preferences and first.exact and first.rate > last.rate):
        return last
    return replace(last, rate=first.rate, low=first.low, high=first.high)


def doubt(fits: Sequence[NoiseFit], preferences: bool, judging_since: int | None) -> str | None:
    """Why the estimate means little, a sentence without its end; None if nothing speaks against it.

    Args:
        fits: one or more.
        judging_since: as in ``LabelNoise``.
    """
    first, last = fits[0], fits[-1]
    rate = judged_by(fits, preferences).rate
    if judging_since is None:
        higher = "" if competent(last) else " or learning_rate"
        why = _why_not_judged(fits, preferences)
        return f"no label was judged, because {why}: raise num_train_epochs{higher}"
    if not competent(last):
        return (
            "held-out labels are predicted hardly better than by chance, for want of training or of signal: "
            f"the estimate, {rate:.3f}, means little; a higher learning_rate or num_train_epochs may help"
        )
    if last.capped:
        return (
            f"the estimate is at its limit of {MAX_RATE}: the model has not learned the task, has learned "
            "wrong labels by heart, or nearly half of the labels are wrong"
        )
    known = competent(first) and not first.open_ended and first.high - first.low < OPEN_WIDTH
    if known or not (preferences and first.exact):
        return None
    what = f"leave the noise rate open ({first.low:.3f} to {first.high:.3f})"
    if not competent(first):
        what = "were predicted hardly better than by chance"
    return (
        f"the first visits of the pairs, the only ones that are held out exactly, {what}: the estimate, "
        f"{rate:.3f}, may be far off; more pairs, or another learning rate, may tell"
    )


def _why_not_judged(fits: Sequence[NoiseFit], preferences: bool) -> str:
    """What ``judging_since`` was waiting for, as the end of a sentence; there is a fit."""
    if not competent(fits[-1]):
        return "held-out labels were predicted hardly better than by chance"
    if fits[-1].epoch >= fits[0].epoch + 1 - 1e-6:
        return "held-out labels were predicted better and better until the end"
    if preferences:
        return (
            "pairs that the model had been trained on before are judged from the end of the second epoch on "
            "at the earliest"
        )
    return "classes are judged from the end of the second epoch on at the earliest"


def train_longer(preferences: bool) -> str:
    """How long it takes until weights can have an effect."""
    return f"set num_train_epochs to {'two' if preferences else 'three'} or more"


def last_rise(fits: Sequence[NoiseFit]) -> float:
    """Nats by which the held-out log-likelihood rose over the last epoch; 0 within the first two."""
    before = next((fit for fit in reversed(fits) if fit.epoch <= fits[-1].epoch - 1 + 1e-6), None)
    return 0.0 if before is None else fits[-1].log_likelihood - before.log_likelihood


def load_fits(folder: str | Path) -> list[NoiseFit]:
    """The estimates of a saved run, oldest first."""
    content = json.loads(Path(folder, FITS_NAME).read_text())
    return [NoiseFit(**fit) for fit in content["fits"]]
