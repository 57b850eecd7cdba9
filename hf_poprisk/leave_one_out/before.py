"""Preference pairs are judged before training, by a regression on the model's own gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_poprisk.leave_one_out.judge import LabelNoise, Visit
from hf_poprisk.leave_one_out.judgement import Judgement, judge
from hf_poprisk.leave_one_out.weights import competent, doubt_before


class PairNoise(LabelNoise):
    """Judges preference pairs once, before the first step; they keep the weights that they are given then.

    All weights are 1 if the labels are predicted no better than by chance.
    """

    preferences = True
    _num_copies = 0

    def judge_all(self, index: np.ndarray, parts: Sequence[np.ndarray]) -> Judgement:
        """Judge pairs by their features.

        Args:
            index: ``example_index``, [n].
            parts: as ``label_features`` gives them, [n, k] each.

        Raises:
            ValueError: see ``judge``.
        """
        found = judge(parts)
        rows = self.table.rows(torch.from_numpy(index))
        log_odds, weight = torch.from_numpy(found.log_odds), torch.from_numpy(found.p_correct)
        self.fits, self._num_copies = [found.fit], found.num_copies
        if competent(found.fit):
            self.judging_since = 0
        else:  # by chance
            weight = torch.ones_like(weight)
        self.table.visit(rows, log_odds=log_odds.to(rows.device), weight=weight.to(rows.device))
        return found

    @property
    def weightless(self) -> bool:
        return self.mode == "audit"

    @property
    def doubt(self) -> str | None:
        return doubt_before(self.fit, self._num_copies)

    def _judge(self, visit: Visit, log_odds: Tensor) -> None:
        visit.log_odds = self.table.columns["log_odds"][visit.rows]
        visit.weight = self.table.columns["weight"][visit.rows]

    def finish_step(self, gather: Callable[[Tensor], Tensor], open_share: Tensor | float = 1.0) -> None:
        visits, self._pending = self._pending, []
        columns = [
            torch.stack(
                [x.to(self.table.device, torch.float64) for x in (v.rows, v.tap.log_odds, v.weight)], 1
            )
            for v in visits
        ]
        kept = self._gathered(gather, torch.cat(columns))
        if kept is not None:
            self._count(*kept[:, 1:].unbind(1))

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "num_copies": self._num_copies}

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        self._num_copies = state["num_copies"]
