"""What is kept of a judgement, what a label counts in training, and when an estimate means little."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_poprisk.leave_one_out.index import INDEX, Sample, first_difference
from hf_poprisk.leave_one_out.judgement import Judgement
from hf_poprisk.leave_one_out.leap import Leap
from hf_poprisk.leave_one_out.noise import NoiseFit
from hf_poprisk.leave_one_out.table import RULE, TABLE_NAME, ExampleTable, read_table

ALL_CLEAN = 0.01  # a lower end of the interval below it: there may be no mislabeled label at all
_OPEN_WIDTH = 0.3  # of an interval that tells little; that of a flat posterior is .43
_COPIES = 0.01  # of the examples: with more of them the rate comes out too low
# Of what can be known of the labels, how much must be predicted before they are followed. Of classes more:
# what is ambiguous looks mislabeled.
_EXPLAINED = {"pairs": 0.1, "examples": 0.75}


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
    return fit.explained > _EXPLAINED[what] and 2 * fit.num_examples * gain > 3.84


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
    if num_copies > _COPIES * fit.num_examples:
        return (
            f"{num_copies} {what} are copies of others, which confirm their labels whatever they "
            "are: judge the data without them"
        )
    if fit.open_ended or fit.high - fit.low > _OPEN_WIDTH:
        return f"the {what} leave the noise rate open ({fit.low:.3f} to {fit.high:.3f}): more {what} may tell"
    return None


class LabelNoise:
    """What is known of the labels of a training set.

    Args:
        mode: ``audit`` or ``weight``.
        preferences: an example is a preference pair.
        table: of the examples; kept up to date. All weights are 1 where too little is found to follow it.
        sample: of the training data, by which they are known again.

    Attributes:
        fit: the noise rate; None until labels were judged.
        weighted: whether weights other than 1 were found.
        step: after how many optimizer steps they were judged.
        leap: by how much the mean margin grew; None until it was tried.
    """

    def __init__(self, mode: str, preferences: bool, table: ExampleTable, sample: Sample) -> None:
        self.mode, self.preferences, self.table, self.sample = mode, preferences, table, sample
        self._what = "pairs" if preferences else "examples"
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.table.clear()
        self.fit: NoiseFit | None = None
        self.weighted, self._num_copies, self.step = False, 0, 0
        self.leap: Leap | None = None

    def take(self, index: np.ndarray, found: Judgement, step: int = 0) -> None:
        """Keep what was found of the examples of an index, [n], after so many optimizer steps."""
        rows = self.table.rows(torch.from_numpy(index))
        self.fit, self._num_copies, self.step = found.fit, found.num_copies, step
        self.weighted = competent(found.fit, self._what)
        self.table.judged[rows] = True
        self.table.log_odds[rows] = torch.from_numpy(found.log_odds).to(self.table.log_odds)
        if self.weighted:
            weight = torch.from_numpy(sample_weights(found.p_correct, self.preferences))
            self.table.weight[rows] = weight.to(self.table.weight)

    @property
    def leapt(self) -> bool:
        """Whether a leap has moved the weights."""
        return self.leap is not None and self.leap.reached != 0

    @property
    def doubt(self) -> str | None:
        """Why the estimate means little, a sentence without its end; there is a fit."""
        return doubt(self.fit, self._num_copies, self._what)

    def p_correct(self) -> np.ndarray:
        """Probability that each label is correct, [n] float64 in [0, 1].

        1 − ε where the example was not judged: nothing but the rate is known of it. NaN without a fit.
        """
        if self.fit is None:
            return np.full(len(self.table), np.nan)
        log_odds = self.table.log_odds.cpu().double()
        return np.where(self.table.judged.cpu(), self.fit.p_correct(log_odds), 1 - self.fit.rate)

    def logs(self) -> dict[str, float]:
        """The log entries."""
        fit = self.fit
        if fit is None:
            return {}
        logs = {"noise_rate": fit.rate, "noise_rate_low": fit.low, "noise_rate_high": fit.high}
        if self.weighted and self.mode == "weight":
            logs["weight_mean"] = self.table.weight.mean().item()
        if self.leap is not None:
            logs |= {"leap_predicted": self.leap.predicted, "leap_reached": self.leap.reached}
        return {f"poprisk/{name}": value for name, value in logs.items()}

    def found(self, model_step: int | None = None) -> str:
        """One clause on the labels; there is a fit.

        Args:
            model_step: which step the model is of: an earlier one where the best one was loaded at the end.
        """
        fit = self.fit
        weights = f", weights since step {self.step}" if self.weighted else ", nothing is weighted"
        if self.weighted and model_step is not None and 0 < model_step <= self.step:
            weights = f", weights since step {self.step}, but this model is of step {model_step}"
        weights *= self.mode == "weight"
        return (
            f"poprisk_label_noise={self.mode}: estimated noise rate {fit.rate:.3f} ({fit.low:.3f} to "
            f"{fit.high:.3f}){weights}"
        )

    def save(self, folder: str | Path) -> None:
        """Write ``judged.parquet``, which a resumed run goes on from."""
        state: dict[str, Any] = {
            "mode": self.mode,
            "preferences": self.preferences,
            "weighted": self.weighted,
            "num_copies": self._num_copies,
            "step": self.step,
            "doubt": self.doubt if self.fit else None,
            "rule": RULE,
            "fit": asdict(self.fit) if self.fit else None,
            "sample": self.sample,
            "leap": self.leap,
        }
        self.table.save(Path(folder, TABLE_NAME), self.p_correct(), state)

    def load(self, folder: str | Path) -> None:
        """Go on from where ``save`` was.

        Raises:
            ValueError: scores of an earlier version, or of other data.
        """
        columns, state = read_table(Path(folder))
        different = first_difference(state["sample"], self.sample)
        if different is not None:
            raise ValueError(
                f"the training data are not those of {folder}: example {different[0]} has another "
                f"{different[1]}. Give them in the same order, or with the column {INDEX} from the start."
            )
        self.table.load(columns)
        self.weighted, self._num_copies = state["weighted"], state["num_copies"]
        self.step = state.get("step", 0)
        self.fit = NoiseFit(**state["fit"]) if state["fit"] else None
        self.leap = Leap(*state["leap"]) if state.get("leap") else None
