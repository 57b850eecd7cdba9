"""The tables of an experiment: one per report."""

from typing import Any

from comparison import (
    best,
    by,
    digits,
    markdown,
    mean_of,
    paired_difference,
    paired_quotient,
    starred,
    with_error,
)
from experiment import Experiment
from sweep import Row


def table(experiment: Experiment, rows: list[Row], report: dict[str, Any]) -> str:
    """A report in Markdown: an arm a row; with facets, a facet a row and an arm a column."""
    return (facet_table if experiment.facets else arm_table)(experiment, rows, report)


def arm_table(experiment: Experiment, rows: list[Row], report: dict[str, Any]) -> str:
    """Every arm at its best settings, and where the experiment asks for it at equal ones."""
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in experiment.arms}
    arms = {arm: part for arm, part in arms.items() if part}
    name, base_name, places = report["report"], next(iter(experiment.arms)), digits(rows, report["report"])
    base = best(arms[base_name], experiment.grid, report) if base_name in arms else []

    def at_equal(part: list[Row]) -> list[Row]:
        return [r for r in part if all(r["options"][k] == v for k, v in experiment.equal.items())]

    header = ["arm", *([" / ".join(experiment.grid)] * bool(experiment.grid)), report["select"]]
    header += [f"{name} ± s.e.", f"against {base_name} [95 %]", *experiment.columns.values()]
    if experiment.equal:
        equal = ", ".join(f"{k} {v:g}" for k, v in experiment.equal.items())
        header += [f"at {equal}", f"against {base_name} there"]
    lines = []
    for arm, part in arms.items():
        chosen, same = best(part, experiment.grid, report), at_equal(part)
        entries = [arm, *([point(experiment, chosen[0])] * bool(experiment.grid))]
        entries += [mean_of(chosen, report["select"], places), with_error(chosen, name, places)]
        entries += ["" if arm == base_name else compared(chosen, base, report, places)]
        entries += [mean_of(chosen, more, digits(rows, more)) for more in experiment.columns]
        if experiment.equal:
            entries += [with_error(same, name, places) if same else "–"]
            there = at_equal(arms.get(base_name, []))
            entries += ["" if arm == base_name else compared(same, there, report, places)]
        lines.append(entries)
    return markdown(header, lines)


def facet_table(experiment: Experiment, rows: list[Row], report: dict[str, Any]) -> str:
    """Every arm at the settings that are its best for a facet, and its difference to the first arm."""
    name, base_name, places = report["report"], next(iter(experiment.arms)), digits(rows, report["report"])
    header, lines = [" / ".join(experiment.facets), base_name], []
    for arm in list(experiment.arms)[1:]:
        header += [arm, "difference [95 %]"]
    for facet, part in sorted(by(rows, experiment.facets).items()):
        entries, base = [" / ".join(f"{value:g}" for value in facet)], []
        for arm in experiment.arms:
            mine = [row for row in part if row["arm"] == arm]
            chosen = best(mine, experiment.grid, report) if mine else []
            where = f" ({point(experiment, chosen[0])})" if chosen and experiment.grid else ""
            entries += [with_error(chosen, name, places) + where if chosen else "–"]
            if arm == base_name:
                base = chosen
            else:
                entries += [compared(chosen, base, report, places) if chosen and base else "–"]
        lines.append(entries)
    return markdown(header, lines)


def point(experiment: Experiment, row: Row) -> str:
    """Where on the grid a run is; * at an end."""
    return " / ".join(starred(row["options"][name], grid) for name, grid in experiment.grid.items())


def compared(rows: list[Row], base: list[Row], report: dict[str, Any], places: int) -> str:
    """Paired over the seeds; – where one of the runs never got there."""
    name = report["report"]
    if any(row[name] is None for row in (*rows, *base)):
        return "–"
    if report.get("ratio"):
        return paired_quotient(rows, base, name)
    return paired_difference(rows, base, name, places)


def missing(experiment: Experiment, rows: list[Row]) -> str:
    """How many runs are not there yet; empty for none."""
    count = len(experiment.cells()) - len(rows)
    return f"**{count} of {len(experiment.cells())} runs are missing.**" if count else ""
