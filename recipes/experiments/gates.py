"""Both gates beside AdamW and beside a random mask as dense, in every experiment: a line for each."""

from collections.abc import Iterator, Sequence

import pandas as pd
from experiment import NAMES, Experiment, Report, load, read, results_of
from tables import best, difference, digits, markdown, paired, with_error

GATES = {"hard": "random-mask", "soft": "random-mask-soft"}  # and their masks
PAIRS = [(gate, base) for gate in GATES for base in ("adamw", "its mask")]


def overview(names: Sequence[str] = NAMES) -> str:
    """Each arm at its own best settings, and how many of the intervals say that a gate is better or worse."""
    found = [
        line(title, rows, experiment, report)
        for name, experiment in zip(names, map(load, names), strict=True)
        for report in experiment.reports
        if set(GATES) <= set(experiment.arms)
        for title, rows in parts(name, experiment, report)
        if rows["arm"].isin(GATES).any()
    ]
    counts = []
    for column in range(len(PAIRS)):
        signs = [verdicts[column] for _, verdicts in found if verdicts[column] is not None]
        counts.append(f"{len(signs)}, {signs.count(1)} better, {signs.count(-1)} worse")
    header = ["", "adamw", *(f"{gate} against {base} [95 %]" for gate, base in PAIRS), "seeds"]
    return markdown(header, [*(entries for entries, _ in found), ["intervals", "", *counts, ""]])


def parts(name: str, experiment: Experiment, report: Report) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of an experiment, facet by facet, with a heading."""
    rows = experiment.declared(read(experiment, results_of(name)))
    what = report.result.removeprefix("test_").replace("_", " ")
    what += "" if experiment.grid else " at one learning rate"
    if not experiment.facets:
        yield f"{name}: {what}", rows
        return
    for values, part in rows.groupby(list(experiment.facets)):
        facet = dict(zip(experiment.facets, values, strict=True))
        where = f"{facet['data']}, {100 * facet['noise']:g} % mislabeled" if "data" in facet else name
        where += "".join(f", {k} {v:g}" for k, v in facet.items() if k not in ("data", "noise"))
        yield f"{where}: {what}", part


def line(
    title: str, rows: pd.DataFrame, experiment: Experiment, report: Report
) -> tuple[list[str], list[int | None]]:
    """One line of the table, and what its intervals say."""
    places, name = digits(rows, report.result), report.result
    arms = ("adamw", *GATES, *GATES.values())
    at_best = {arm: best(rows[rows["arm"] == arm], experiment.grid, report) for arm in arms}
    pairs = [(at_best[gate], at_best[base]) for gate, mask in GATES.items() for base in ("adamw", mask)]
    entries = [difference(*pair, name, places, report.ratio) for pair in pairs]
    seeds = sorted({len(set(chosen["seed"]) & set(base["seed"])) for chosen, base in pairs} - {0})
    few = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(*seeds)
    verdicts = [verdict(*pair, report) for pair in pairs]
    return [title, with_error(at_best["adamw"], name, places), *entries, few], verdicts


def verdict(rows: pd.DataFrame, base: pd.DataFrame, report: Report) -> int | None:
    """1 for better and -1 for worse beyond the interval, 0 for neither; None for fewer than three seeds."""
    values = paired(rows, base, report.result, report.ratio)
    if len(set(rows["seed"]) & set(base["seed"])) < 3 or not values:
        return None
    if values[1] <= 0 <= values[2]:
        return 0
    return 1 if (values[0] > 0) == (report.better == "higher") else -1
