"""Arms side by side: everyone's best settings, means with their errors, differences paired over the seeds."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from experiment import Experiment, Report
from scipy import stats


def best(rows: pd.DataFrame, grid: Iterable[str], report: Report, arm: str | None = None) -> pd.DataFrame:
    """The rows of the settings that validation prefers, among those with the most seeds; empty for no rows.

    Where the result is reached on more seeds is better; then the mean of those decides.

    Args:
        grid: the axes on which a point is chosen.
        arm: only its rows.
    """
    rows = rows if arm is None else rows[rows["arm"] == arm]
    if not len(rows) or not list(grid):
        return rows
    points = [part for _, part in rows.groupby(list(grid))]
    most, sign = max(map(len, points)), 1 if report.better == "lower" else -1

    def rank(part: pd.DataFrame) -> tuple[int, float]:
        values = part[report.select].dropna()
        return -len(values), sign * fmean(values) if len(values) else 0.0

    return min((part for part in points if len(part) == most), key=rank)


def digits(rows: pd.DataFrame, name: str) -> int:
    """Decimal places for a result of this size."""
    size = rows[name].abs().max()
    return 0 if size >= 100 else 1 if size >= 10 else 3


def mean(rows: pd.DataFrame, name: str, places: int = 3) -> str:
    """Mean over the runs that have the result; – for none."""
    values = rows[name].dropna() if len(rows) else ()
    return f"{fmean(values):.{places}f}" if len(values) else "–"


def with_error(rows: pd.DataFrame, name: str, places: int = 3) -> str:
    """Mean ± standard error; if some never got there, how many did, and the mean of those; – for no rows."""
    if not len(rows):
        return "–"
    values, middle = rows[name].dropna(), mean(rows, name, places)
    if len(values) < len(rows):
        return f"{len(values)} of {len(rows)}" + f", at {middle}" * (len(values) > 0)
    return middle + (f" ± {error(values):.{places}f}" if len(values) > 1 else "")


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value, of which it is not known."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def paired(rows: pd.DataFrame, base: pd.DataFrame, name: str, ratio: bool = False) -> list[float]:
    """Mean over the common seeds of ``rows`` minus ``base``, and the ends of its 95 % t interval.

    Args:
        ratio: of the logarithms.

    Returns:
        Empty without a common seed, or where a run has no result; of a single seed the mean alone.
    """
    if not (len(rows) and len(base)) or rows[name].isna().any() or base[name].isna().any():
        return []
    mine, before = (part.set_index("seed")[name].map(math.log if ratio else float) for part in (rows, base))
    deltas = (mine - before).dropna()
    if len(deltas) < 2:
        return list(deltas)
    middle, half = fmean(deltas), stats.t.ppf(0.975, len(deltas) - 1) * error(deltas)
    return [middle, middle - half, middle + half]


def difference(
    rows: pd.DataFrame, base: pd.DataFrame, name: str, places: int = 3, ratio: bool = False
) -> str:
    """``paired`` as text: the mean, and the interval in brackets; quotients behind a ×; – for none."""
    values = paired(rows, base, name, ratio)
    if not values:
        return "–"
    first, *ends = (f"{math.exp(x):.2f}" if ratio else f"{x:+.{places}f}" for x in values)
    return f"{'×' * ratio}{first}" + (f" [{', '.join(ends)}]" if ends else "")


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def point(rows: pd.DataFrame, every: pd.DataFrame, grid: dict[str, list[Any]]) -> str:
    """The settings of ``rows``; * where one lies at the end of those that were run, ``every``."""
    out = []
    for name in grid:
        value, values = rows[name].iloc[0], set(every[name])
        out.append(f"{value:g}{'*' if len(values) > 1 and value in (min(values), max(values)) else ''}")
    return " / ".join(out)


def table(experiment: Experiment, rows: pd.DataFrame, report: Report) -> str:
    """A report in Markdown: an arm a line; with facets, a facet a line and an arm a column."""
    if experiment.facets:
        return facet_table(experiment, rows, report, list(experiment.arms))
    return arm_table(experiment, rows, report)


def arm_table(experiment: Experiment, rows: pd.DataFrame, report: Report) -> str:
    """Every arm at its best settings, and where the experiment asks for it at equal ones."""
    grid, equal, first, lines = experiment.grid, experiment.equal, next(iter(experiment.arms)), []
    name, places = report.result, digits(rows, report.result)
    same = rows[(rows[list(equal)] == list(equal.values())).all(axis=1)]
    base, base_there = best(rows, grid, report, first), same[same["arm"] == first]
    header = ["arm", " / ".join(grid), f"{name} ± s.e.", f"against {first} [95 %]"]
    header += experiment.columns.values()
    if equal:
        header += [f"at {', '.join(f'{k} {v:g}' for k, v in equal.items())}", f"against {first} there"]
    for arm in [arm for arm in experiment.arms if arm in set(rows["arm"])]:
        chosen, there = best(rows, grid, report, arm), same[same["arm"] == arm]
        line = [arm, point(chosen, rows[rows["arm"] == arm], grid), with_error(chosen, name, places)]
        line += ["" if arm == first else difference(chosen, base, name, places, report.ratio)]
        line += [mean(chosen, more, digits(rows, more)) for more in experiment.columns]
        if equal:
            against = "" if arm == first else difference(there, base_there, name, places, report.ratio)
            line += [with_error(there, name, places), against]
        lines.append(line)
    return markdown(header, lines)


def facet_table(experiment: Experiment, rows: pd.DataFrame, report: Report, arms: Sequence[str]) -> str:
    """The first arm's mean, and the others' differences to it; the settings that are best for a facet."""
    name, grid, places, lines = report.result, experiment.grid, digits(rows, report.result), []
    for facet, part in rows.groupby(list(experiment.facets)):
        base, line = best(part, grid, report, arms[0]), [in_words(facet)]
        for arm in arms:
            chosen = best(part, grid, report, arm)
            against = difference(chosen, base, name, places, report.ratio)
            where = f" ({point(chosen, part[part['arm'] == arm], grid)})" if grid and len(chosen) else ""
            line.append((with_error(base, name, places) if arm == arms[0] else against) + where)
        lines.append(line)
    header = [" / ".join(experiment.facets), f"{arms[0]} ± s.e.", *(f"{arm} [95 %]" for arm in arms[1:])]
    return markdown(header, lines)


def in_words(facet: Sequence[Any]) -> str:
    """The values of a facet."""
    return " / ".join(value if isinstance(value, str) else f"{value:g}" for value in facet)
