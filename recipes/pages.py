"""The generated parts of ``recipes/RESULTS.md``, ``recipes/LABEL_NOISE.md`` and README, and their figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import yaml
from comparison import best, digits, markdown, mean_of, with_error
from experiment import Experiment, experiments
from figure import draw
from noisy_labels.cells import load_rows
from noisy_labels.figure import frontier
from noisy_labels.table import REPORT, aims, tables
from overview import overview
from report import missing, table
from sweep import Row

BEGIN, END = "<!-- generated: python recipes/evidence.py page, {} -->", "<!-- end of the generated part -->"
SHOWN = ("adamw", "hard", "soft", "random-mask")  # the arms in README, for the gate
SHOWN_OF_LABELS = ("adamw", "adamw-early", "soft", "drop-told", "weight+soft", "weight")  # of labels
CHOSEN = (
    "Each arm at the point of the same grid (* at its end) that is best on average on *clean* validation "
    "data, which nobody has in practice; paired over the seeds."
)


def write_pages() -> None:
    """Draw all figures, and write the pages.

    Raises:
        RecipeError: a bad experiment, or a page without its marks.
    """
    for path in experiments():
        experiment = Experiment.load(path)
        rows = experiment.rows()
        if rows:
            draw(experiment, rows, experiment.results.with_suffix(".png"))
    frontier(label_rows(), common.ROOT / "results" / "preferences.png")
    for path, content in pages().items():
        path.write_text(content)


def pages() -> dict[Path, str]:
    """What each page should be."""
    parts = {
        common.ROOT / "RESULTS.md": {
            "overview": overview(map(Experiment.load, experiments()), label_rows()),
            "experiments": "\n\n".join(map(section, experiments())),
        },
        common.ROOT / "LABEL_NOISE.md": {
            "aims": aims(label_rows()),
            "fresh": aims(load_rows(common.ROOT / "results" / "fresh_seeds.jsonl")),
            "tables": tables(label_rows()),
        },
        common.ROOT.parent / "README.md": {"summary": summary(), "labels": summary_of_labels()},
    }
    written = {}
    for path, contents in parts.items():
        written[path] = path.read_text()
        for name, content in contents.items():
            written[path] = replaced(written[path], name, content)
    return written


def replaced(page: str, name: str, content: str) -> str:
    """``page`` with ``content`` between the marks of that name."""
    before, begin, rest = page.partition(mark := BEGIN.format(name))
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise common.RecipeError(f"a page has lost the marks of its generated part: {mark} and {END}.")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


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


def summary() -> str:
    """The table of README: the first report of every experiment, each arm at its best settings."""
    lines = []
    for path in experiments():
        experiment = Experiment.load(path)
        report, grid, rows = experiment.reports[0], experiment.grid, experiment.rows()
        line = [experiment.title, report["report"].removeprefix("test_").replace("_", " ")]
        values = ["–"] * len(SHOWN) if experiment.facets else at_their_best(rows, grid, report)
        lines.append([*line, *values, experiment.short])
    for entry in in_readme("claims"):
        values = at_their_best(entry["rows"], ["learning_rate"], REPORT)
        lines.append([entry["title"], "accuracy", *values, entry["short"]])
    return markdown(["", "on test data", *SHOWN, "the claim is"], lines)


def summary_of_labels() -> str:
    """The table of README about judging labels: each arm at its best learning rate."""
    lines = []
    for entry in in_readme("labels"):
        arms = [[row for row in entry["rows"] if row["arm"] == arm] for arm in SHOWN_OF_LABELS]
        chosen = [best(rows, ["learning_rate"], REPORT) if rows else [] for rows in arms]
        seeds = max(map(len, chosen))
        values = [
            mean_of(rows, REPORT["report"]) + f" ({len(rows)})" * (0 < len(rows) < seeds) for rows in chosen
        ]
        lines.append([entry["title"], *values, mean_of(chosen[-1], "noise_rate", 2), str(seeds)])
    return markdown(["accuracy on clean test labels", *SHOWN_OF_LABELS, "its ε̂", "seeds (of an arm)"], lines)


def label_rows() -> list[Row]:
    """The runs on labels that may be wrong."""
    return load_rows(common.ROOT / "results" / "label_noise.jsonl")


def in_readme(part: str) -> list[dict[str, Any]]:
    """The lines of ``label_noise.yaml`` for one table of README, with the ``rows`` that they are about."""
    rows, lines = label_rows(), yaml.safe_load((common.ROOT / "label_noise.yaml").read_text())[part]
    return [
        line | {"rows": [row for row in rows if all(row[name] == line[name] for name in ("task", "noise"))]}
        for line in lines
    ]


def at_their_best(rows: list[Row], grid: Iterable[str], report: dict[str, Any]) -> list[str]:
    """The result of each arm that is shown; – for one that has not run."""
    arms = ([row for row in rows if row["arm"] == arm] for arm in SHOWN)
    places = digits(rows, report["report"])
    return [with_error(best(arm, grid, report), report["report"], places) if arm else "–" for arm in arms]
