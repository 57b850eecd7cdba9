"""Does training on population risk keep its promises? Runs the experiments and writes the results page.

    python recipes/evidence.py run recipes/claims/grokking-add.yaml --processes 2
    python recipes/evidence.py page

``run`` appends one line of JSON per training run to ``recipes/results/NAME.jsonl`` and skips the runs that
are there; ``page`` draws ``recipes/results/NAME.png`` and writes the generated parts of
``recipes/RESULTS.md`` and README. An experiment is a YAML file with these keys:

    title, claim, verdict: words for the page
    script:    the Python file beside it, with ``run(cell) -> dict`` and the names of its ``OPTIONS``
    settings:  options that all runs share
    arms:      name → options that make the arm; the first one is the baseline
    grid:      option → values, the same for every arm; ``select`` chooses the best point, on average
    facets:    option → values, reported one by one
    seeds:     one run each; they draw the data, the weights and the order, the same for every arm
    reports:   a table for each: select and report, results of validation and of test data, and which is
               better, lower or higher; the figure takes the first
    equal:     a point of the grid at which all arms are compared as well
    columns:   more results to print → their headings
    curve:     x, y, and log axes, of the figure: lists among the results, or a facet and a result
"""

import argparse
import importlib.util
import itertools
import sys
from collections import defaultdict
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common
import numpy as np
import yaml
from controls import OPTIONS
from sweep import Row, key, load_rows, mean_of, paired_difference, run_cells

from hf_poprisk import PopRiskTrainingArguments

ROOT = Path(__file__).parent
FIELDS = ("arm", "options", "seed")


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    claim: str
    verdict: str
    script: str
    arms: dict[str, dict[str, Any]]
    grid: dict[str, list[Any]]
    seeds: list[int]
    reports: list[dict[str, str]]
    curve: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    facets: dict[str, list[Any]] = field(default_factory=dict)
    equal: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        """
        Raises:
            RecipeError: a missing or unknown key, an option that nothing reads, ``equal`` off the grid.
        """
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise common.RecipeError(f"{path} is not an experiment: see `python recipes/evidence.py --help`.")
        known = {f.name: f.default_factory is f.default for f in fields(cls)}
        needed = {name for name, required in known.items() if required} - {"name"}
        for wrong, message in (
            (set(content) - set(known) | {"name"} & set(content), "unknown"),
            (needed - set(content), "missing"),
        ):
            if wrong:
                raise common.RecipeError(f"{message} in {path}: {', '.join(sorted(wrong))}.")
        experiment = cls(name=path.stem, **content)
        for report in experiment.reports:
            if set(report) != {"select", "report", "better"} or report["better"] not in ("lower", "higher"):
                raise common.RecipeError(
                    f"a report in {path} needs select, report and better, which is lower or higher."
                )
        if not (ROOT / "claims" / experiment.script).is_file():
            raise common.RecipeError(f"script={experiment.script} is not beside {path}.")
        read = {*module(experiment.script).OPTIONS, *OPTIONS, *PopRiskTrainingArguments.__dataclass_fields__}
        given = {name for options in experiment.arms.values() for name in options}
        given |= {*experiment.settings, *experiment.grid, *experiment.facets}
        if given - read:
            raise common.RecipeError(f"nothing reads {', '.join(sorted(given - read))} of {path}.")
        for name, values in experiment.grid.items():
            if not all(isinstance(value, int | float) for value in values):  # YAML takes 1e-3 for text
                raise common.RecipeError(f"{name} in the grid of {path} must be numbers: write 1.0e-3.")
        for name, value in experiment.equal.items():
            if value not in experiment.grid.get(name, []):
                raise common.RecipeError(f"equal in {path} is not on the grid: {name}={value}.")
        return experiment

    def cells(self) -> list[Row]:
        """Seed by seed: an interrupted comparison is a balanced one."""
        points = [
            dict(zip(self.facets | self.grid, values, strict=True))
            for values in itertools.product(*self.facets.values(), *self.grid.values())
        ]
        return [
            {"arm": arm, "options": self.settings | options | point, "seed": seed}
            for seed in self.seeds
            for point in points
            for arm, options in self.arms.items()
        ]

    @property
    def results(self) -> Path:
        return ROOT / "results" / f"{self.name}.jsonl"

    def rows(self) -> list[Row]:
        """The finished runs of this experiment as it is written now."""
        asked = {key(cell, FIELDS) for cell in self.cells()}
        found = load_rows(self.results, FIELDS) if self.results.exists() else []
        return [row for row in found if key(row, FIELDS) in asked]


def module(script: str) -> Any:
    path = ROOT / "claims" / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def work(script: str, cell: Row) -> Row:
    """Run one cell in the experiment's script."""
    return module(script).run(cell["options"] | {"seed": cell["seed"]})


# -- tables -----------------------------------------------------------------------------------------------


def by(rows: list[Row], names: Any) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row["options"][name] for name in names)].append(row)
    return dict(groups)


def best(rows: list[Row], names: Any, report: dict[str, str]) -> list[Row]:
    """The rows of the grid point that validation prefers, among those with the most seeds."""
    points = by(rows, names)
    most = max(map(len, points.values()))
    sign = 1 if report["better"] == "lower" else -1
    full = [points[point] for point in sorted(points) if len(points[point]) == most]
    return min(full, key=lambda at: sign * fmean(row[report["select"]] for row in at))


def digits(rows: list[Row], name: str) -> int:
    size = max((abs(row[name]) for row in rows if row.get(name) is not None), default=1.0)
    return 0 if size >= 100 else 1 if size >= 10 else 3


def with_error(rows: list[Row], name: str, places: int) -> str:
    values = [row[name] for row in rows]
    error = f" ± {stdev(values) / len(values) ** 0.5:.{places}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{places}f}{error}"


def settings(row: Row, names: Any, experiment: Experiment, starred: bool = True) -> str:
    """The grid point of a row; * where it lies at the end of the grid."""
    parts = []
    for name in names:
        value, values = row["options"][name], experiment.grid[name]
        edge = starred and len(values) > 2 and value in (values[0], values[-1])
        parts.append(f"{value:g}{'*' if edge else ''}")
    return " / ".join(parts)


def table(experiment: Experiment, rows: list[Row], report: dict[str, str]) -> str:
    """Markdown: an arm a row; with facets, a facet a row and an arm a column."""
    if experiment.facets:
        return facet_table(experiment, rows, report)
    name = report["report"]
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in experiment.arms}
    arms = {arm: part for arm, part in arms.items() if part}
    base_name, places = next(iter(experiment.arms)), digits(rows, name)
    base = best(arms[base_name], experiment.grid, report) if base_name in arms else []
    compared = partial(paired_difference, name=name, digits=places)

    def at_equal(part: list[Row]) -> list[Row]:
        return [r for r in part if all(r["options"][k] == v for k, v in experiment.equal.items())]

    header = ["arm", " / ".join(experiment.grid), report["select"], f"{name} ± s.e."]
    header += [f"against {base_name} [95 %]", *experiment.columns.values()]
    if experiment.equal:
        point = ", ".join(f"{k} {v:g}" for k, v in experiment.equal.items())
        header += [f"at {point}", f"against {base_name} there"]
    lines = []
    for arm, part in arms.items():
        chosen, same = best(part, experiment.grid, report), at_equal(part)
        entries = [arm, settings(chosen[0], experiment.grid, experiment)]
        entries += [mean_of(chosen, report["select"], places), with_error(chosen, name, places)]
        entries += ["" if arm == base_name else compared(chosen, base)]
        entries += [mean_of(chosen, more, digits(rows, more)) for more in experiment.columns]
        if experiment.equal:
            entries += [with_error(same, name, places) if same else "–"]
            entries += ["" if arm == base_name else compared(same, at_equal(arms.get(base_name, [])))]
        lines.append(entries)
    return markdown(header, lines)


def facet_table(experiment: Experiment, rows: list[Row], report: dict[str, str]) -> str:
    base_name, places = next(iter(experiment.arms)), digits(rows, report["report"])
    header, lines = [" / ".join(experiment.facets)], []
    for arm in experiment.arms:
        header += [f"{arm} ({' / '.join(experiment.grid)})"]
        header += [] if arm == base_name else [f"{arm} against {base_name} [95 %]"]
    for facet, part in sorted(by(rows, experiment.facets).items()):
        entries = [" / ".join(f"{value:g}" for value in facet)]
        base = [row for row in part if row["arm"] == base_name]
        for arm in experiment.arms:
            mine = [row for row in part if row["arm"] == arm]
            if not mine:
                entries += ["–"] * (1 + (arm != base_name))
                continue
            chosen = best(mine, experiment.grid, report)
            point = settings(chosen[0], experiment.grid, experiment)
            entries += [f"{with_error(chosen, report['report'], places)} ({point})"]
            if arm != base_name:
                entries += [
                    paired_difference(chosen, best(base, experiment.grid, report), report["report"], places)
                    if base
                    else "–"
                ]
        lines.append(entries)
    return markdown(header, lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def missing(experiment: Experiment, rows: list[Row]) -> str:
    count = len(experiment.cells()) - len(rows)
    return f"**{count} of {len(experiment.cells())} runs are missing.**" if count else ""


def section(path: Path) -> str:
    """The part of the page about one experiment."""
    experiment = Experiment.load(path)
    rows = experiment.rows()
    out = [f"### {experiment.title}", f"*{experiment.claim.strip()}*", experiment.verdict.strip()]
    if not rows:
        return "\n\n".join([*out, "**Not run yet.**"])
    versions = ", ".join(sorted({f"{n} {v}" for row in rows for n, v in row["versions"].items()}))
    seeds = len({row["seed"] for row in rows})
    minutes = sum(row["seconds"] for row in rows) / 60
    out += [
        f"`python recipes/evidence.py run recipes/claims/{path.name}` — {len(rows)} runs, {seeds} seeds, "
        f"{minutes:.0f} minutes of one core; {versions}.",
        missing(experiment, rows),
        *(table(experiment, rows, report) for report in experiment.reports),
        f"![{experiment.title}](results/{experiment.name}.png)",
    ]
    return "\n\n".join(filter(None, out))


# -- figures ----------------------------------------------------------------------------------------------


def draw(experiment: Experiment, rows: list[Row], path: Path) -> None:
    """The curve of every arm at its best settings: the mean over seeds, and two standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    x_name, y_name = experiment.curve["x"], experiment.curve["y"]
    chosen_by = partial(best, names=experiment.grid, report=experiment.reports[0])
    for arm in experiment.arms:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        if x_name in experiment.facets:
            parts = sorted(by(mine, [x_name]).items())
            x = np.array([facet[0] for facet, _ in parts])
            chosen = [chosen_by(part) for _, part in parts]
            mean = np.array([fmean(r[y_name] for r in part) for part in chosen])
            error = np.array(
                [
                    np.std([r[y_name] for r in part], ddof=1) / len(part) ** 0.5 if len(part) > 1 else 0.0
                    for part in chosen
                ]
            )
        else:
            chosen = chosen_by(mine)
            length = min(len(row[x_name]) for row in chosen)
            x = np.array(chosen[0][x_name][:length])
            values = np.array([row[y_name][:length] for row in chosen])
            mean = values.mean(0)
            error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * mean
        line = axis.plot(x, mean, label=arm)[0]
        axis.fill_between(x, mean - 2 * error, mean + 2 * error, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel=experiment.curve.get("x_label", x_name), ylabel=experiment.curve.get("y_label", y_name))
    for which in experiment.curve.get("log", ""):
        getattr(axis, f"set_{which}scale")("log")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# -- the page ---------------------------------------------------------------------------------------------


BEGIN, END = "<!-- generated: python recipes/evidence.py page -->", "<!-- end of the generated part -->"


def experiments() -> list[Path]:
    return sorted((ROOT / "claims").glob("*.yaml"))


def replaced(page: str, content: str) -> str:
    """``page`` with ``content`` between the two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise common.RecipeError("the page has lost the marks of its generated part.")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def results_page() -> str:
    return replaced((ROOT / "RESULTS.md").read_text(), "\n\n".join(map(section, experiments())))


def summary() -> str:
    """The table of README: the first report of every experiment, each arm at its best settings."""
    arms, lines = ("adamw", "hard", "soft"), []
    for path in experiments():
        experiment = Experiment.load(path)
        report, rows = experiment.reports[0], experiment.rows()
        places = digits(rows, report["report"])
        entries = [experiment.title, report["report"].removeprefix("test_")]
        for arm in arms:
            mine = [row for row in rows if row["arm"] == arm]
            shown = mine and not experiment.facets
            chosen = best(mine, experiment.grid, report) if shown else []
            entries.append(with_error(chosen, report["report"], places) if shown else "–")
        lines.append([*entries, experiment.verdict.split(".")[0].strip("* ").lower()])
    return markdown(["", "measured on test data", *arms, "the claim is"], lines)


def readme() -> str:
    return replaced((ROOT.parent / "README.md").read_text(), summary())


def write_page() -> None:
    for path in experiments():
        experiment = Experiment.load(path)
        rows = experiment.rows()
        if rows:
            draw(experiment, rows, ROOT / "results" / f"{experiment.name}.png")
    for page, content in ((ROOT / "RESULTS.md", results_page()), (ROOT.parent / "README.md", readme())):
        page.write_text(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train, and append to the results")
    training.add_argument("experiment", type=Path, help="a YAML file of recipes/claims")
    training.add_argument("--seeds", nargs="+", type=int, help="default: those of the experiment")
    training.add_argument("--arms", nargs="+", help="default: all")
    training.add_argument("--processes", type=int, default=1, choices=(1, 2))
    commands.add_parser("page", help="write the results page")
    args = parser.parse_args()
    try:
        if args.command == "page":
            write_page()
            return
        experiment = Experiment.load(args.experiment)
        arms, seeds = args.arms or list(experiment.arms), args.seeds or experiment.seeds
        for name, wrong in (
            ("--arms", set(arms) - set(experiment.arms)),
            ("--seeds", set(seeds) - set(experiment.seeds)),
        ):
            if wrong:
                raise common.RecipeError(f"{name} {' '.join(map(str, wrong))}: not in {args.experiment}.")
        cells = [c for c in experiment.cells() if c["arm"] in arms and c["seed"] in seeds]
        sys.exit(run_cells(cells, partial(work, experiment.script), experiment.results, args.processes))
    except (common.RecipeError, OSError, yaml.YAMLError, BrokenExecutor) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: finished runs are kept, and the same command goes on.\n")


if __name__ == "__main__":
    main()
