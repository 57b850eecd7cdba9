"""Both gates beside AdamW and beside a random mask as dense, in every experiment: a line for each."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from comparison import best, by, digits, markdown, paired, with_error
from experiment import Experiment
from noisy_labels.table import REPORT
from report import compared
from sweep import Row

GATES = {"hard": ("random-mask",), "soft": ("random-mask as soft", "random-mask-soft")}  # and their masks
PAIRS = [(gate, base) for gate in GATES for base in ("adamw", "its mask")]


def overview(experiments: Iterable[Experiment], label_rows: list[Row]) -> str:
    """Each arm at its own best settings, and how many of the intervals say that a gate is better or worse."""
    found = [
        line(name, rows, experiment.grid, report)
        for experiment in experiments
        for report in experiment.reports
        for name, rows in parts(experiment, report)
    ]
    for (task, _, noise), rows in sorted(by(label_rows, ("task", "epochs", "noise")).items()):
        if set(GATES) & {row["arm"] for row in rows}:
            found += [line(f"{task}, {100 * noise:g} % wrong: accuracy", rows, ["learning_rate"], REPORT)]
    counts = []
    for column in range(len(PAIRS)):
        signs = [verdicts[column] for _, verdicts in found if verdicts[column] is not None]
        counts.append(f"{len(signs)}, {signs.count(1)} better, {signs.count(-1)} worse")
    header = ["", "adamw", *(f"{gate} against {base} [95 %]" for gate, base in PAIRS), "seeds"]
    return markdown(header, [*(entries for entries, _ in found), ["intervals", "", *counts, ""]])


def parts(experiment: Experiment, report: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """The runs of an experiment, facet by facet, with a heading."""
    what = f"{experiment.path.stem}: {report['report'].removeprefix('test_').replace('_', ' ')}"
    what += "" if experiment.grid else " at one learning rate"
    for facet, rows in sorted(by(experiment.rows(), experiment.facets).items()):
        where = [f"{name} {value:g}" for name, value in zip(experiment.facets, facet, strict=True)]
        yield ", ".join([what, *where]), rows


def line(
    name: str, rows: list[Row], grid: Iterable[str], report: dict[str, Any]
) -> tuple[list[str], list[int | None]]:
    """One line of the table, and what its intervals say."""
    places, result = digits(rows, report["report"]), report["report"]

    def at_its_best(*arms: str) -> list[Row]:
        part = [row for row in rows if row["arm"] in arms]
        return best(part, grid, report) if part else []

    adamw = at_its_best("adamw")
    entries, verdicts, seeds = [], [], set()
    for gate, masks in GATES.items():
        chosen = at_its_best(gate)
        for base in (adamw, at_its_best(*masks)):
            entries.append(compared(chosen, base, report, places))
            verdicts.append(verdict(chosen, base, report))
            seeds.add(len({row["seed"] for row in chosen} & {row["seed"] for row in base}))
    seeds = sorted(seeds - {0})
    few = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(*seeds)
    found = with_error(adamw, result, places) if adamw else "–"
    return [name, found, *entries, few], verdicts


def verdict(rows: list[Row], base: list[Row], report: dict[str, Any]) -> int | None:
    """1 for better and -1 for worse beyond the interval, 0 for neither; None for fewer than three seeds."""
    name = report["report"]
    common = {row["seed"] for row in rows} & {row["seed"] for row in base}
    if len(common) < 3 or any(row[name] is None for row in (*rows, *base)):
        return None
    values = paired(rows, base, name, math.log if report.get("ratio") else float)
    if values[1] <= 0 <= values[2]:
        return 0
    return 1 if (values[0] > 0) == (report["better"] == "higher") else -1
