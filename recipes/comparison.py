"""Arms side by side: everyone's best settings, means with their errors, differences paired over the seeds."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats
from sweep import Row


def by(rows: Iterable[Row], names: Iterable[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some settings: fields of a row, or where it has them of its ``options``."""
    names, groups = list(names), defaultdict(list)
    for row in rows:
        groups[tuple(row.get("options", row)[name] for name in names)].append(row)
    return dict(groups)


def best(rows: Iterable[Row], names: Iterable[str], report: dict[str, Any]) -> list[Row]:
    """The rows of the settings that validation prefers, among those with the most seeds.

    Where the result is reached on more seeds is better; then the mean of those decides.

    Args:
        names: the settings that are chosen.
        report: ``select``, the result that chooses, and ``better``, lower or higher.
    """
    points = by(rows, names)
    most = max(map(len, points.values()))
    sign = 1 if report["better"] == "lower" else -1

    def rank(point: tuple[Any, ...]) -> tuple[int, float]:
        values = [row[report["select"]] for row in points[point] if row[report["select"]] is not None]
        return -len(values), sign * fmean(values) if values else 0.0

    return points[min((point for point in sorted(points) if len(points[point]) == most), key=rank)]


def starred(value: float, grid: Iterable[float]) -> str:
    """A setting; * where it lies at the end of its grid, beyond which a better one may be."""
    values = set(grid)
    return f"{value:g}{'*' if len(values) > 1 and value in (min(values), max(values)) else ''}"


def digits(rows: Iterable[Row], name: str) -> int:
    """Decimal places for a result of this size."""
    size = max((abs(row[name]) for row in rows if row.get(name) is not None), default=1.0)
    return 0 if size >= 100 else 1 if size >= 10 else 3


def mean_of(rows: Iterable[Row], name: str, places: int = 3) -> str:
    """Mean over the runs that have the result; – for none."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):.{places}f}" if values else "–"


def with_error(rows: Sequence[Row], name: str, places: int = 3) -> str:
    """Mean ± standard error; if some never got there, how many did, and the mean of those."""
    values = [row[name] for row in rows if row[name] is not None]
    if len(values) < len(rows):
        return f"{len(values)} of {len(rows)}" + (f", at {fmean(values):.{places}f}" if values else "")
    return f"{fmean(values):.{places}f}" + (f" ± {error(values):.{places}f}" if len(values) > 1 else "")


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value, of which it is not known."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def paired(rows: Iterable[Row], base: Iterable[Row], name: str, of: Callable[[float], float]) -> list[float]:
    """Mean over the seeds of ``of`` of ``rows`` minus that of ``base``, and the ends of its 95 % t interval.

    Empty without a common seed; of a single one the mean alone.
    """
    before = {row["seed"]: of(row[name]) for row in base}
    deltas = [of(row[name]) - before[row["seed"]] for row in rows if row["seed"] in before]
    if len(deltas) < 2:
        return deltas
    mean, half = fmean(deltas), stats.t.ppf(0.975, len(deltas) - 1) * error(deltas)
    return [mean, mean - half, mean + half]


def paired_difference(rows: Iterable[Row], base: Iterable[Row], name: str, places: int = 3) -> str:
    """Mean over the seeds of ``rows`` minus ``base``, and its 95 % t interval."""
    return in_brackets([f"{value:+.{places}f}" for value in paired(rows, base, name, float)])


def paired_quotient(rows: Iterable[Row], base: Iterable[Row], name: str) -> str:
    """Geometric mean over the seeds of ``rows`` over ``base``, and its 95 % t interval."""
    found = in_brackets([f"{math.exp(value):.2f}" for value in paired(rows, base, name, math.log)])
    return found if found == "–" else f"×{found}"


def in_brackets(values: Sequence[str]) -> str:
    """A value, its interval in brackets if there is one; – for none."""
    return values[0] + (f" [{', '.join(values[1:])}]" if values[1:] else "") if values else "–"


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
