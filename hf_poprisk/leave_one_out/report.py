"""The report, as lines and tables for rich."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.leave_one_out import NoiseFit
from hf_poprisk.leave_one_out.common import TRUTH, percent
from hf_poprisk.leave_one_out.data import example_text, known_flips
from hf_poprisk.leave_one_out.noise import MAX_RATE, TAU_OF_CLASSES
from hf_poprisk.leave_one_out.run import Run
from hf_poprisk.leave_one_out.scores import (
    Bin,
    Truth,
    calibration,
    chance_error,
    compare_with_truth,
    expected_error,
    most_contradicted,
)
from hf_poprisk.leave_one_out.weights import STILL_LEARNING, doubt, last_rise

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import RenderableType
    from rich.table import Table

_HISTORY_ROWS = 20


def report(
    run: Run, data: Dataset | None = None, rows: np.ndarray | None = None, top: int = 20
) -> list[RenderableType]:
    """What there is to say, as lines and tables for ``rich``.

    Args:
        data: the training data, or None.
        rows: as ``find_rows`` gives them, [n]; needed with data.
        top: how many of the most contradicted examples are shown.
    """
    flips = None if data is None or rows is None else known_flips(data, rows)
    out: list[RenderableType] = [*_summary(run)]
    if run.fits:
        out += [_history(run.fits)]
    if flips is not None:
        out += _truth(run, compare_with_truth(run, flips))
    elif run.fits:
        out += _calibration(run)
    if top:
        out += [_contradicted(run, data, rows, flips, top)]
    return out


def _summary(run: Run) -> list[RenderableType]:
    from rich.text import Text

    visited, what = int(run.visited.sum()), "preference pairs" if run.preferences else "examples"
    never = "" if visited == len(run.ids) else f", {len(run.ids) - visited} of them never trained on"
    out = [Text(f"{run.folder}: {len(run.ids)} {what}{never}; poprisk_label_noise={run.mode}")]
    fit, by = run.fit, run.judged_by
    if fit is None or by is None:
        return out + [_warning("the noise rate was not estimated: training ended within its first epoch.")]
    called = int((run.posterior()[run.visited] < 0.5).sum())
    out += [
        Text(
            f"estimated share of wrong labels: {by.rate:.3f}, 95 % interval {by.low:.3f}–{by.high:.3f} "
            f"(τ = {fit.tau:.2f}, {fit.num_labels} labels, epoch {fit.epoch:.2f})",
            style="bold",
        ),
        *map(Text, _of_first_visits(run)),
        Text(
            f"more likely wrong than right (posterior below 0.5): {called} of {visited} "
            f"({percent(called, visited)})"
        ),
    ]
    if run.judging_since is not None:
        out += [Text(_since(run))]
    if (why := doubt(run.fits, run.preferences, run.judging_since)) is not None:
        out += [_warning(f"{why}.")]
    if fit.num_labels > 2 and fit.tau > 0.999 * TAU_OF_CLASSES[1]:
        out += [
            _warning(
                f"τ is at its limit of {TAU_OF_CLASSES[1]:g}: the model is much less sure than it is right, "
                "so the share may be off."
            )
        ]
    rise = last_rise(run.fits)
    if rise > STILL_LEARNING:
        out += [
            _warning(
                f"held-out labels were predicted better and better until the end (by {rise:.3f} nats over "
                "the last epoch): the model still learns, or memorises, and the estimate is not settled."
            )
        ]
    return out


def _of_first_visits(run: Run) -> list[str]:
    """Where the share is from, if not from the last estimate; there is a fit."""
    fit = run.fits[-1]
    if run.judged_by is fit:
        return []
    return [
        f"the share is that of the first visits (epoch {run.fits[0].epoch:.2f}), because the last one is "
        f"lower: {fit.rate:.3f}, {fit.low:.3f}–{fit.high:.3f}"
    ]


def _since(run: Run) -> str:
    """From when on weights were given, which they were."""
    epoch = next((f" (epoch {fit.epoch:.2f})" for fit in run.fits if fit.step == run.judging_since), "")
    step = f"from optimizer step {run.judging_since} on{epoch}"
    if run.judging_since == run.fits[-1].step:
        step += ": for less than a quarter of an epoch, if at all"
    if run.mode == "audit":
        return f"scored only; weights would have been given {step}"
    return f"weights were given {step}"


def _warning(sentence: str) -> RenderableType:
    from rich.text import Text

    return Text(f"warning: {sentence}", style="bold yellow")


def _history(fits: list[NoiseFit]) -> Table:
    title = "the estimate over training"
    if len(fits) > _HISTORY_ROWS:
        shown = np.linspace(0, len(fits) - 1, _HISTORY_ROWS).round().astype(int)
        title, fits = f"{title} ({_HISTORY_ROWS} of {len(fits)})", [fits[i] for i in shown]
    out = _table(title, "epoch", "step", "rate", "95 % interval", "τ", "log-likelihood (nats)")
    for fit in fits:
        out.add_row(
            f"{fit.epoch:.2f}",
            str(fit.step),
            f"{fit.rate:.3f}" + "*" * fit.capped,
            f"{fit.low:.3f}–{fit.high:.3f}",
            f"{fit.tau:.2f}",
            f"{fit.log_likelihood:.4f}",
        )
    if any(fit.capped for fit in fits):
        out.caption = f"* at its limit of {MAX_RATE}"
    return out


def _calibration(run: Run) -> list[RenderableType]:
    from rich.text import Text

    bins = calibration(run)
    if bins[0].observed is None:
        note = "There are no true labels, and the run has not kept which of the labels the model expected: "
        note += "this is what the fit implies, and nothing here tests it."
        title = "held-out probability of the observed labels, in equally large bins"
        out = _table(title, "examples", "q", "predicted (with ε)")
        for b in bins:
            out.add_row(str(b.count), f"{b.low:.3f}–{b.high:.3f}", f"{b.predicted:.3f}")
        return [out, Text(note)]
    title = "calibration of the held-out log-odds, by the observed labels"
    note = "There are no true labels: the last estimate predicts, the share is that of observed labels as "
    note += f"expected, and labels that the model has memorised look calibrated too. {_distance(bins)}"
    return [_reliability_table(title, "q of the expected label", "as expected", bins), Text(note)]


def _truth(run: Run, truth: Truth) -> list[RenderableType]:
    from rich.text import Text

    share = percent(truth.num_wrong, truth.count)
    out: list[RenderableType] = [
        Text(f"known to be wrong ({TRUTH}): {truth.num_wrong} of {truth.count} ({share})"),
        Text(
            f"AUROC for the wrong labels: suspicion {_number(truth.auroc_suspicion)}, mean loss "
            f"{_number(truth.auroc_loss)}"
        ),
    ]
    if run.fits:
        title = "reliability of the posterior, by the labels known to be wrong"
        out += [
            Text(
                f"posterior below 0.5: precision {_number(truth.precision)} ({truth.num_hit} of "
                f"{truth.num_called}), recall {_number(truth.recall)} ({truth.num_hit} of {truth.num_wrong})"
            ),
            _reliability_table(title, "posterior of being right", "right", truth.bins),
            Text(_distance(truth.bins)),
        ]
    return out


def _reliability_table(title: str, by: str, event: str, bins: list[Bin]) -> Table:
    out = _table(title, "examples", by, "predicted", f"{event} ± s.e.")
    for b in bins:
        assert b.observed is not None
        observed = f"{b.observed:.3f} ± {b.standard_error:.3f}"
        out.add_row(str(b.count), f"{b.low:.3f}–{b.high:.3f}", f"{b.predicted:.3f}", observed)
    return out


def _contradicted(
    run: Run, data: Dataset | None, rows: np.ndarray | None, flips: np.ndarray | None, top: int
) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    places = most_contradicted(run, top)
    posterior = run.posterior() if run.fits else None
    columns = [Column(name, justify="right") for name in ("index", "ζ", "P(right)", "visits", "loss")]
    columns += [Column("wrong")] * (flips is not None)
    columns += [Column("example", ratio=1)] * (data is not None)
    out = Table(*columns, title=f"the most contradicted labels ({len(places)})", expand=data is not None)
    out.show_lines, out.caption = data is not None, "ζ and mean loss in nats"
    for place in places:
        cells: list[Any] = [
            str(run.ids[place]),
            f"{run.heldout[place]:.2f}",
            "–" if posterior is None else f"{posterior[place]:.3f}",
            str(run.visits[place]),
            f"{run.loss_mean[place]:.2f}",
        ]
        if flips is not None:
            cells += ["yes" if flips[place] else "no"]
        if data is not None and rows is not None:
            shown = example_text(data[int(rows[place])], data.features)
            # text, because a string would be searched for markup
            parts = [((f"{name}: ", "bold"), f"{value}\n") for name, value in shown.items()]
            text = Text.assemble(*(part for pair in parts for part in pair))
            text.rstrip()
            cells += [text]
        out.add_row(*cells)
    return out


def _table(title: str, *columns: str) -> Table:
    from rich.table import Column, Table

    return Table(*(Column(name, justify="right") for name in columns), title=title)


def _distance(bins: list[Bin]) -> str:
    return f"Mean distance {expected_error(bins):.3f}; chance alone would make it {chance_error(bins):.3f}."


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
