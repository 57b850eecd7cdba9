"""The printed report: how many labels are mislabeled, and which ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_poprisk.leave_one_out.data import TRUTH, example_text
from hf_poprisk.leave_one_out.table import Run
from hf_poprisk.user_errors import need

if TYPE_CHECKING:
    from datasets import Dataset

TOP = 10


def report(
    run: Run,
    data: Dataset | None = None,
    rows: np.ndarray | None = None,
    flips: np.ndarray | None = None,
) -> list[str]:
    """The lines.

    Args:
        data: the training data, for the texts.
        rows: as ``find_rows`` gives them, [n]; needed with data.
        flips: the labels known to be mislabeled, [n] bool; needs scikit-learn.
    """
    judged, what = int(run.judged.sum()), "preference pairs" if run.preferences else "examples"
    never = f" ({len(run.index) - judged} more were never judged)" * (judged < len(run.index))
    lines = [f"{run.folder}: {judged} {what}{never}", *rate(run)]
    if flips is not None:
        lines += _truth(run, flips)
    lines += ["", "The most suspicious:"]
    for place in run.suspicious[:TOP]:
        p = f", correct with probability {run.p_correct[place]:.3f}"
        known = "" if flips is None else f", {'mislabeled' if flips[place] else 'clean'}"
        lines += [f"  {run.index[place]}{p}{known}"]
        if data is not None and rows is not None:
            shown = example_text(data[int(rows[place])], data.features)
            lines += [f"      {name}: {text}" for name, text in shown.items()]
    return lines


def rate(run: Run) -> list[str]:
    """How many labels are mislabeled, in words."""
    p_correct, fit = run.p_correct[run.judged], run.fit
    below = p_correct < 0.5
    known = f"{fit.rate:.1%}, 95% interval {fit.low:.1%} to {fit.high:.1%}"
    lines = [f"Noise rate: {known}."]
    if run.doubt is not None:
        lines = [f"Noise rate: open ({known}). Look at the rows, but do not filter by it: {run.doubt}."]
    share = f"{below.sum():,} of {len(below):,} ({below.mean():.1%})"
    lines += [f"Labels right with a probability below .5: {share}."]
    if below.any() and run.doubt is None:  # which rests on the rate
        lines += [f"Precision at that cut: {1 - p_correct[below].mean():.0%} expected to be mislabeled."]
    return lines


def _truth(run: Run, flips: np.ndarray) -> list[str]:
    need("sklearn", f"a data set with the column {TRUTH}")
    from sklearn.metrics import precision_score, recall_score, roc_auc_score

    mislabeled, p_correct = flips[run.judged], run.p_correct[run.judged]
    line = f"Known to be mislabeled ({TRUTH}): {mislabeled.sum()} of {len(mislabeled)}."
    if not 0 < mislabeled.sum() < len(mislabeled):
        return [line]
    below = p_correct < 0.5
    precision, recall = (f(mislabeled, below, zero_division=0) for f in (precision_score, recall_score))
    auroc = roc_auc_score(mislabeled, -run.log_odds[run.judged])
    return [f"{line} Below .5: precision {precision:.1%}, recall {recall:.1%}; AUROC {auroc:.3f}."]
