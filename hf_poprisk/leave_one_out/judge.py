"""The judge: a table with a row per example, the estimated noise rate, weights, logs and the file.

Every label is judged once, before the first step, and keeps its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_poprisk.leave_one_out.classes import judge_classes
from hf_poprisk.leave_one_out.index import INDEX, Sample, first_difference
from hf_poprisk.leave_one_out.judgement import Judgement, judge
from hf_poprisk.leave_one_out.log_odds import LogOddsError, LogOddsTap
from hf_poprisk.leave_one_out.noise import NoiseFit
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable, read_table
from hf_poprisk.leave_one_out.weights import competent, doubt, sample_weights

LABEL_NOISE_MODES = ("off", "audit", "weight")
RULE = 4  # of scores and estimates; raise it with either: a run cannot go on with others


@dataclass
class Visit:
    """Some examples in one forward and backward."""

    rows: Tensor  # [N] int64
    tap: LogOddsTap | None = None
    weight: Tensor | None = None  # [N], in [0, 1]


class LabelNoise:
    """Judges the labels of a training set, and weights its examples by what it finds.

    All weights are 1 where too little is found to follow it.

    Args:
        mode: ``audit`` or ``weight``.
        table: its rows are kept up to date.
        sample: of the training data, by which they are known again.

    Attributes:
        fit: the noise rate; None until labels were judged.
        weighted: whether weights other than 1 were found.
    """

    preferences: ClassVar[bool]  # an example is a preference pair
    _what: ClassVar[str]

    def __init__(self, mode: str, table: ExampleTable, sample: Sample | None = None) -> None:
        self.mode, self.table, self.sample = mode, table, sample or {}
        self.fit: NoiseFit | None = None
        self.weighted = False
        self._num_copies = 0
        self._pending: list[Visit] = []
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # visits, Σ weight, Σ weighted loss

    @property
    def weightless(self) -> bool:
        """Whether training goes on as if nothing was judged."""
        return self.mode == "audit"

    @property
    def doubt(self) -> str | None:
        """Why the estimate means little, a sentence without its end; there is a fit."""
        return doubt(self.fit, self._num_copies, self._what)

    # -- before the first step --------------------------------------------------------------------------

    def _take(self, index: np.ndarray, found: Judgement) -> Judgement:
        """Keep what was found of the examples of an index; [n] each."""
        rows = self.table.rows(torch.from_numpy(index))
        self.fit, self._num_copies = found.fit, found.num_copies
        self.weighted = competent(found.fit, self._what)
        weight = sample_weights(found.p_correct, self.preferences)
        values = {"log_odds": found.log_odds, "weight": weight if self.weighted else np.ones_like(weight)}
        self.table.visit(rows, **{name: torch.from_numpy(x).to(rows.device) for name, x in values.items()})
        return found

    # -- a visit ----------------------------------------------------------------------------------------

    def visit(self, rows: Tensor) -> LogOddsTap:
        """Begin the visit of N examples: enter the tap around their forward, then run their backward.

        Args:
            rows: of the table, [N] int64.
        """
        visit = Visit(rows)
        visit.tap = LogOddsTap(self.preferences, partial(self.sample_weight, visit))
        self._pending.append(visit)
        return visit.tap

    def abandon(self) -> None:
        """Forget the visit that was begun last: its backward did not run."""
        self._pending.pop()

    def sample_weight(self, visit: Visit, log_odds: Tensor) -> Tensor:
        """The factor on each example's gradient, [N] in [0, 1]; log_odds: of this very visit, [N].

        Raises:
            LogOddsError: the loss is not of one label per example.
        """
        if len(log_odds) != len(visit.rows):
            raise LogOddsError(f"it has {len(log_odds)} terms for {len(visit.rows)} examples")
        visit.weight = self.table.columns["weight"][visit.rows]
        return visit.weight.to(log_odds.device)  # of the head, where a model is spread over several

    def finish_step(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Add one optimizer step to the logs; every rank must call it.

        Args:
            gather: concatenates a [N, C] tensor over the ranks; N may differ.
        """
        visits, self._pending = self._pending, []
        columns = [(v.rows, v.tap.log_odds, v.weight) for v in visits]
        every = gather(
            torch.cat([torch.stack([x.to(self.table.device, torch.float64) for x in c], 1) for c in columns])
        )
        # padding copies of an example stand on several ranks; the first one counts
        rows, order = every[:, 0].sort(stable=True)
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows[1:] != rows[:-1]
        z, weight = every[order[first]][:, 1:].unbind(1)
        z, weight = z[z.isfinite()], weight[z.isfinite()]  # the loss ignores the others
        sums = [weight.new_tensor(len(z)), weight.sum(), (weight * F.softplus(-z)).sum()]
        self._sums += torch.stack(sums).cpu()

    def forget_step(self) -> None:
        """Of a step that was interrupted."""
        self._pending.clear()

    # -- what is found ----------------------------------------------------------------------------------

    def pop_logs(self) -> dict[str, float]:
        """The log entries since the last call."""
        logs: dict[str, float] = {}
        if fit := self.fit:
            logs |= {"noise_rate": fit.rate, "noise_rate_low": fit.low, "noise_rate_high": fit.high}
        visits, weight, loss = self._sums.tolist()
        if visits:
            logs["loss_weighted"] = loss / visits  # the trainer's own loss is without weights, and may rise
            if self.weighted:
                logs["weight_mean"] = weight / visits
        self._clear_interval()
        return {f"poprisk/{name}": value for name, value in logs.items()}

    def p_correct(self) -> np.ndarray:
        """Probability that each label is correct, [n] float64 in [0, 1].

        1 − ε where the example was not judged: nothing but the rate is known of it. NaN without a fit.
        """
        if self.fit is None:
            return np.full(len(self.table), np.nan)
        log_odds = self.table.columns["log_odds"].cpu().double()
        return np.where(self.table.visits.cpu() > 0, self.fit.p_correct(log_odds), 1 - self.fit.rate)

    def found(self) -> str:
        """One clause on the labels; there is a fit."""
        fit = self.fit
        weights = ", weights since step 0" * (self.weighted and self.mode != "audit")
        return (
            f"poprisk_label_noise={self.mode}: estimated noise rate {fit.rate:.3f} ({fit.low:.3f} to "
            f"{fit.high:.3f}){weights}"
        )

    # -- saving -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``judged.parquet``, which a resumed run goes on from."""
        self.table.save(Path(folder, TABLE_NAME), self.p_correct(), self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "preferences": self.preferences,
            "weighted": self.weighted,
            "num_copies": self._num_copies,
            "doubt": self.doubt if self.fit else None,
            "rule": RULE,
            "interval": self._sums.tolist(),
            "fit": asdict(self.fit) if self.fit else None,
            "sample": self.sample,
        }

    def load(self, folder: str | Path) -> None:
        """Go on from where ``save`` was.

        Raises:
            ValueError: scores by another rule or of an earlier version, or of other rows than those of the
                sample.
        """
        columns, state = read_table(Path(folder))
        if state["rule"] != RULE or state["preferences"] != self.preferences:
            raise ValueError(
                f"{folder} holds scores by another rule, of an earlier version, which this one cannot go on "
                "from: set poprisk_label_noise=off, or start over."
            )
        table = ExampleTable(self.table.ids.numpy(), self.table.device)
        table.load(columns)
        different = first_difference(state["sample"], self.sample)
        if different is not None:
            raise ValueError(
                f"the training data are not those of {folder}: example {different[0]} has another "
                f"{different[1]}. Give them in the same order, or with the column {INDEX} from the start."
            )
        self.table = table
        self.weighted, self._num_copies = state["weighted"], state["num_copies"]
        self._sums = torch.tensor(state["interval"], dtype=torch.float64)
        self.fit = NoiseFit(**state["fit"]) if state["fit"] else None


class PairNoise(LabelNoise):
    """Of preference pairs; an example counts by the probability that its label is correct."""

    preferences = True
    _what = "pairs"

    def judge_all(self, index: np.ndarray, parts: list[np.ndarray]) -> Judgement:
        """Judge pairs by their features.

        Args:
            index: ``example_index``, [n].
            parts: as ``label_features`` gives them, [n, k] each.

        Raises:
            ValueError: see ``judge``.
        """
        return self._take(index, judge(parts))


class ClassNoise(LabelNoise):
    """Of classes."""

    preferences = False
    _what = "examples"

    def judge_all(self, index: np.ndarray, parts: list[np.ndarray], labels: np.ndarray) -> Judgement:
        """Judge classes by the features of their examples.

        Args:
            index: ``example_index``, [n].
            parts: as ``label_features`` gives them, [n, k] each.
            labels: [n] int; a negative one is no label, and is not judged.

        Raises:
            ValueError: see ``judge_classes``.
        """
        known = labels >= 0
        return self._take(index[known], judge_classes([x[known] for x in parts], labels[known]))
