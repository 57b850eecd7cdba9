"""When an estimate of the noise rate means little."""

from __future__ import annotations

import math

import numpy as np

from hf_poprisk.leave_one_out.noise import NoiseFit

OPEN_WIDTH = 0.3  # of an interval that tells little; that of a flat posterior is .43
COPIES = 0.01  # of the examples: with more of them the rate comes out too low
ALL_CLEAN = 0.01  # a lower end of the interval below it: there may be no mislabeled label at all
# Of what can be known of the labels, how much must be predicted before they are followed. Of classes more:
# what is ambiguous looks mislabeled.
EXPLAINED = {"pairs": 0.1, "examples": 0.75}


def sample_weights(p_correct: np.ndarray, preferences: bool) -> np.ndarray:
    """What a label counts in training, by the probability that it is correct; [n] each.

    A pair counts by p itself, an example of a class by how much likelier its label is correct than not,
    ``max(0, 2p − 1)``: of a small weight Adam makes the same step, and learns it by heart in many epochs.
    """
    return p_correct if preferences else (2 * p_correct - 1).clip(0)


def competent(fit: NoiseFit, what: str) -> bool:
    """Whether labels are predicted so well that they may be judged by it; what: "pairs" or "examples".

    And beyond luck: a likelihood-ratio test at 5 %.
    """
    gain = fit.log_likelihood + math.log(fit.num_labels)
    return fit.explained > EXPLAINED[what] and 2 * fit.num_examples * gain > 3.84


def doubt(fit: NoiseFit, num_copies: int, what: str) -> str | None:
    """Why an estimate means little, a sentence without its end; None if it does not.

    Args:
        num_copies: examples with the gradients of another one.
        what: "pairs" or "examples".
    """
    if not competent(fit, what):
        how = "hardly better than by chance" if what == "pairs" else "too badly, so the ambiguous look wrong"
        return (
            f"the model's gradients predict labels {how}: more {what}, or a model that knows the task "
            "better, may tell"
        )
    if num_copies > COPIES * fit.num_examples:
        return (
            f"{num_copies} {what} are copies of others, which confirm their labels whatever they "
            "are: judge the data without them"
        )
    if fit.open_ended or fit.high - fit.low > OPEN_WIDTH:
        return f"the {what} leave the noise rate open ({fit.low:.3f} to {fit.high:.3f}): more {what} may tell"
    return None
