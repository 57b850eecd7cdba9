"""Does training on population risk keep its promises? Runs the experiments and writes the results page.

    python recipes/evidence.py run recipes/claims/grokking-add.yaml --processes 2
    python recipes/evidence.py page

``run`` appends one line of JSON per training run to ``recipes/results/NAME.jsonl``, skips the runs that are
there, and prints the tables; an experiment of your own, a YAML file elsewhere, has its script and its results
beside it. ``page`` draws ``recipes/results/NAME.png`` and writes the generated parts of
``recipes/RESULTS.md`` and README. An experiment is a YAML file with these keys:

    title, claim, verdict: words for the page
    short:     the verdict in README: supported, supported only at equal learning rate, not supported here
    script:    the Python file beside it, with ``run(cell) -> dict``, and the names of its ``OPTIONS`` and of
               its ``RESULTS``
    settings:  options that all runs share
    arms:      name → options that make the arm; the first one is the baseline
    grid:      option → values, the same for every arm; ``select`` chooses the best point, on average
    facets:    option → values, reported one by one
    seeds:     one run each; they draw the data, the weights and the order, the same for every arm
    reports:   a table for each: select and report, results of validation and of test data, and which is
               better, lower or higher; ``ratio: true`` compares by quotients, as for "times sooner". The
               figure takes the first. A result may be None: never reached
    equal:     a point of the grid at which all arms are compared as well
    columns:   more results to print → their headings
    curve:     x and y, lists among the results or a facet and a result; dashed, one more of them; x_label,
               y_label; log, the axes that are
"""

import argparse
import importlib.util
import itertools
import math
import re
import sys
from collections import defaultdict
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common
import label_noise
import numpy as np
import yaml
from controls import OPTIONS, TAKEN
from sweep import Row, key, load_rows, mean_of, paired_difference, paired_quotient, run_cells

from hf_poprisk import PopRiskTrainingArguments

ROOT = Path(__file__).parent
FIELDS = ("arm", "options", "seed")
DICTIONARIES = ("arms", "curve", "settings", "grid", "facets", "equal", "columns")


@dataclass(frozen=True)
class Experiment:
    path: Path
    title: str
    claim: str
    verdict: str
    short: str
    script: str
    arms: dict[str, dict[str, Any]]
    seeds: list[int]
    reports: list[dict[str, Any]]
    curve: dict[str, Any]
    grid: dict[str, list[Any]] = field(default_factory=dict)
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
        needed = {name for name, required in known.items() if required} - {"path"}
        for wrong, message in (
            (set(content) - set(known) | {"path"} & set(content), "unknown"),
            (needed - set(content), "missing"),
        ):
            if wrong:
                raise common.RecipeError(f"{message} in {path}: {', '.join(sorted(wrong))}.")
        experiment = cls(path=path, **content)
        for name, kind in (("seeds", list), ("reports", list), *dict.fromkeys(DICTIONARIES, dict).items()):
            value = getattr(experiment, name)
            if not isinstance(value, kind) or (name in ("seeds", "reports", "arms", "curve") and not value):
                what = "list" if kind is list else "mapping"
                raise common.RecipeError(f"{name} in {path} must be a {what} with something in it.")
        for report in experiment.reports:
            given = set(report) - {"ratio"}
            if given != {"select", "report", "better"} or report["better"] not in ("lower", "higher"):
                raise common.RecipeError(
                    f"a report in {path} needs select, report and better, which is lower or higher."
                )
        script = path.parent / str(experiment.script)
        if script.suffix != ".py" or not script.is_file():
            raise common.RecipeError(f"script={experiment.script} is not a Python file beside {path}.")
        experiment._check_options(path)
        experiment._check_results(path)
        for name, values in (experiment.grid | experiment.facets).items():
            numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
            if not values or not numbers:
                raise common.RecipeError(
                    f"{name} in the grid or the facets of {path} must be a list of numbers."
                )
        for name, value in experiment.equal.items():
            if value not in experiment.grid.get(name, []):
                raise common.RecipeError(f"equal in {path} is not on the grid: {name}={value}.")
        return experiment

    def _check_options(self, path: Path) -> None:
        """Nothing that is written has no effect."""
        if not all(isinstance(options, dict) for options in self.arms.values()):
            raise common.RecipeError(f"every arm of {path} needs options: {{poprisk_gate: none}} is AdamW.")
        for options in (self.settings, *self.arms.values()):
            for name, value in options.items():
                if isinstance(value, str) and re.fullmatch(r"[-+.\d]+e[-+]?\d+", value):
                    raise common.RecipeError(f"{name} in {path} is text to YAML: write 1.0e-3 for 1e-3.")
        shared = [*self.settings, *self.grid, *self.facets]
        arms = [name for options in self.arms.values() for name in options]
        arguments = set(PopRiskTrainingArguments.__dataclass_fields__) - set(TAKEN)
        read = {*module(path.parent / self.script).OPTIONS, *OPTIONS, *arguments}
        unread = {*shared, *arms} - read
        if unread:
            raise common.RecipeError(f"nothing reads {', '.join(sorted(unread))} of {path}.")
        twice = {name for name in shared if shared.count(name) > 1} | {*arms} & {*self.grid, *self.facets}
        if twice:
            raise common.RecipeError(f"{', '.join(sorted(twice))} is given in two places of {path}.")
        if self.facets and (self.equal or self.columns):
            raise common.RecipeError(f"equal and columns have no effect with the facets of {path}.")

    def _check_results(self, path: Path) -> None:
        """What tables and figure show is there, before it is computed."""
        if not all(type(seed) is int for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise common.RecipeError(f"seeds in {path} must be different whole numbers.")
        unknown = set(self.curve) - {"x", "y", "dashed", "x_label", "y_label", "log"}
        if unknown or not {"x", "y"} <= set(self.curve) or set(self.curve.get("log", "")) - {"x", "y"}:
            raise common.RecipeError(
                f"curve in {path} has x, y, dashed, x_label, y_label, and log: x, y or xy."
            )
        shown = {self.curve[name] for name in ("x", "y", "dashed") if name in self.curve} - set(self.facets)
        shown |= {*self.columns, *(report[name] for report in self.reports for name in ("select", "report"))}
        missing = shown - set(module(path.parent / self.script).RESULTS)
        if missing:
            raise common.RecipeError(
                f"{self.script} returns no {', '.join(sorted(missing))}, shown by {path}."
            )

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
        """Beside the experiment, if it is not one of the repository's."""
        own = self.path.resolve().parent == (ROOT / "claims").resolve()
        return ROOT / "results" / f"{self.path.stem}.jsonl" if own else self.path.with_suffix(".jsonl")

    def rows(self) -> list[Row]:
        """The finished runs of this experiment as it is written now."""
        asked = {key(cell, FIELDS) for cell in self.cells()}
        found = load_rows(self.results, FIELDS) if self.results.exists() else []
        return [row for row in found if key(row, FIELDS) in asked]


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def work(script: Path, cell: Row) -> Row:
    """Run one cell in the experiment's script; a result that is not finite counts as None."""
    found = module(script).run(cell["options"] | {"seed": cell["seed"]})
    lost = {name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)}
    return found | dict.fromkeys(lost)


# -- tables -----------------------------------------------------------------------------------------------


def by(rows: list[Row], names: Any) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row["options"][name] for name in names)].append(row)
    return dict(groups)


def best(rows: list[Row], names: Any, report: dict[str, Any]) -> list[Row]:
    """The rows of the grid point that validation prefers, among those with the most seeds.

    Where the result is reached on more seeds is better; then the mean of those decides.
    """
    points = by(rows, names)
    most = max(map(len, points.values()))
    sign = 1 if report["better"] == "lower" else -1

    def rank(point: tuple[Any, ...]) -> tuple[int, float]:
        values = [row[report["select"]] for row in points[point] if row[report["select"]] is not None]
        return -len(values), sign * fmean(values) if values else 0.0

    return points[min((point for point in sorted(points) if len(points[point]) == most), key=rank)]


def digits(rows: list[Row], name: str) -> int:
    size = max((abs(row[name]) for row in rows if row.get(name) is not None), default=1.0)
    return 0 if size >= 100 else 1 if size >= 10 else 3


def with_error(rows: list[Row], name: str, places: int) -> str:
    """Mean ± standard error; if some never got there, how many did, and the mean of those."""
    values = [row[name] for row in rows if row[name] is not None]
    if len(values) < len(rows):
        return f"{len(values)} of {len(rows)}" + (f", at {fmean(values):.{places}f}" if values else "")
    error = f" ± {stdev(values) / len(values) ** 0.5:.{places}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{places}f}{error}"


def compared(rows: list[Row], base: list[Row], report: dict[str, Any], places: int) -> str:
    """Paired over the seeds; – where one of the runs never got there."""
    name = report["report"]
    if any(row[name] is None for row in (*rows, *base)):
        return "–"
    if report.get("ratio"):
        return paired_quotient(rows, base, name)
    return paired_difference(rows, base, name, places)


def settings(row: Row, names: Any, experiment: Experiment) -> str:
    """The grid point of a row; * where it lies at the end of the grid."""
    parts = []
    for name in names:
        value, values = row["options"][name], experiment.grid[name]
        edge = len(values) > 1 and value in (min(values), max(values))
        parts.append(f"{value:g}{'*' if edge else ''}")
    return " / ".join(parts)


def table(experiment: Experiment, rows: list[Row], report: dict[str, Any]) -> str:
    """Markdown: an arm a row; with facets, a facet a row and an arm a column."""
    if experiment.facets:
        return facet_table(experiment, rows, report)
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in experiment.arms}
    arms = {arm: part for arm, part in arms.items() if part}
    name, base_name, places = report["report"], next(iter(experiment.arms)), digits(rows, report["report"])
    base = best(arms[base_name], experiment.grid, report) if base_name in arms else []

    def at_equal(part: list[Row]) -> list[Row]:
        return [r for r in part if all(r["options"][k] == v for k, v in experiment.equal.items())]

    header = ["arm", *([" / ".join(experiment.grid)] * bool(experiment.grid)), report["select"]]
    header += [f"{name} ± s.e.", f"against {base_name} [95 %]", *experiment.columns.values()]
    if experiment.equal:
        point = ", ".join(f"{k} {v:g}" for k, v in experiment.equal.items())
        header += [f"at {point}", f"against {base_name} there"]
    lines = []
    for arm, part in arms.items():
        chosen, same = best(part, experiment.grid, report), at_equal(part)
        entries = [arm, *([settings(chosen[0], experiment.grid, experiment)] * bool(experiment.grid))]
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
    name, base_name, places = report["report"], next(iter(experiment.arms)), digits(rows, report["report"])
    chosen_by = partial(best, names=experiment.grid, report=report)
    header, lines = [" / ".join(experiment.facets), base_name], []
    for arm in list(experiment.arms)[1:]:
        header += [arm, "difference [95 %]"]
    for facet, part in sorted(by(rows, experiment.facets).items()):
        entries, base = [" / ".join(f"{value:g}" for value in facet)], []
        for arm in experiment.arms:
            mine = [row for row in part if row["arm"] == arm]
            chosen = chosen_by(mine) if mine else []
            point = (
                f" ({settings(chosen[0], experiment.grid, experiment)})" if chosen and experiment.grid else ""
            )
            entries += [with_error(chosen, name, places) + point if chosen else "–"]
            if arm == base_name:
                base = chosen
            else:
                entries += [compared(chosen, base, report, places) if chosen and base else "–"]
        lines.append(entries)
    return markdown(header, lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def missing(experiment: Experiment, rows: list[Row]) -> str:
    count = len(experiment.cells()) - len(rows)
    return f"**{count} of {len(experiment.cells())} runs are missing.**" if count else ""


CHOSEN = (
    "Each arm at the point of the same grid (* at its end) that is best on average on *clean* validation "
    "data, which nobody has in practice; paired over the seeds."
)


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
        CHOSEN * bool(experiment.grid),
        *(table(experiment, rows, report) for report in experiment.reports),
        f"![{experiment.title}](results/{path.stem}.png)",
        "Each arm at its best settings; bands are standard errors.",
    ]
    return "\n\n".join(filter(None, out))


# -- figures ----------------------------------------------------------------------------------------------


def draw(experiment: Experiment, rows: list[Row], path: Path) -> None:
    """Mean and standard error over the seeds of every arm at its best settings.

    A run that ended before the longest one stays where it was.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    curve, grid = experiment.curve, experiment.grid
    chosen_by = partial(best, names=grid, report=experiment.reports[0])
    for arm in experiment.arms:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        color = None
        for name, style in ((curve["y"], "-"), (curve.get("dashed"), ":")):
            if name is None:
                continue
            if curve["x"] in experiment.facets:
                parts = sorted(by(mine, [curve["x"]]).items())
                x = [facet[0] for facet, _ in parts]
                chosen = [chosen_by(part) for _, part in parts]
                count = min(map(len, chosen))
                values = np.array([[row[name] for row in part[:count]] for part in chosen]).T
            else:
                chosen = chosen_by(mine)
                x = max((row[curve["x"]] for row in chosen), key=len)
                values = np.array([row[name] + row[name][-1:] * (len(x) - len(row[name])) for row in chosen])
            mean, n = values.mean(0), len(values)
            line = axis.plot(x, mean, style, color=color, label=arm if style == "-" else None)[0]
            color = line.get_color()
            if n > 1 and style == "-":
                half = values.std(0, ddof=1) / n**0.5
                axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, lw=0)
    axis.set(xlabel=curve.get("x_label", curve["x"]), ylabel=curve.get("y_label", curve["y"]))
    for which in curve.get("log", ""):
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
    lines = []
    for path in experiments():
        experiment = Experiment.load(path)
        report, grid, rows = experiment.reports[0], experiment.grid, experiment.rows()
        line = [experiment.title, report["report"].removeprefix("test_").replace("_", " ")]
        values = ["–"] * len(SHOWN) if experiment.facets else at_their_best(rows, grid, report)
        lines.append([*line, *values, experiment.short])
    rows = label_noise.load_rows(ROOT / "results" / "label_noise.jsonl")
    report = {"select": "validation_accuracy", "report": "test_accuracy", "better": "higher"}
    for entry in yaml.safe_load((ROOT / "label_noise.yaml").read_text()):
        found = [row for row in rows if all(row[name] == entry[name] for name in ("task", "noise"))]
        found = [row | {"options": {"learning_rate": row["learning_rate"]}} for row in found]
        line = [entry["title"], "accuracy", *at_their_best(found, ["learning_rate"], report), entry["short"]]
        lines.append(line)
    return markdown(["", "on test data", *SHOWN, "the claim is"], lines)


SHOWN = ("adamw", "hard", "soft", "random-mask")


def at_their_best(rows: list[Row], grid: Any, report: dict[str, Any]) -> list[str]:
    arms = ([row for row in rows if row["arm"] == arm] for arm in SHOWN)
    places = digits(rows, report["report"])
    return [with_error(best(arm, grid, report), report["report"], places) if arm else "–" for arm in arms]


def readme() -> str:
    return replaced((ROOT.parent / "README.md").read_text(), summary())


def write_page() -> None:
    for path in experiments():
        experiment = Experiment.load(path)
        rows = experiment.rows()
        if rows:
            draw(experiment, rows, experiment.results.with_suffix(".png"))
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
        script = experiment.path.resolve().parent / experiment.script
        code = run_cells(cells, partial(work, script), experiment.results, args.processes)
        rows = experiment.rows()
        if rows:
            print("", missing(experiment, rows), sep="\n")
            print(*(table(experiment, rows, report) for report in experiment.reports), sep="\n\n")
        sys.exit(code)
    except (common.RecipeError, OSError, yaml.YAMLError, BrokenExecutor) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: finished runs are kept, and the same command goes on.\n")


if __name__ == "__main__":
    main()
