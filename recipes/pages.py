"""The generated parts of ``recipes/RESULTS.md`` and README, and the figures that they show."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import yaml
from comparison import best, digits, markdown, with_error
from experiment import Experiment, experiments
from figure import draw
from noisy_labels.cells import load_rows
from noisy_labels.table import REPORT
from report import missing, table
from sweep import Row

BEGIN, END = "<!-- generated: python recipes/evidence.py page -->", "<!-- end of the generated part -->"
SHOWN = ("adamw", "hard", "soft", "random-mask")  # the arms in README
CHOSEN = (
    "Each arm at the point of the same grid (* at its end) that is best on average on *clean* validation "
    "data, which nobody has in practice; paired over the seeds."
)


def write_pages() -> None:
    """Draw all figures, and write both pages.

    Raises:
        RecipeError: a bad experiment, or a page without its marks.
    """
    for path in experiments():
        experiment = Experiment.load(path)
        rows = experiment.rows()
        if rows:
            draw(experiment, rows, experiment.results.with_suffix(".png"))
    for page, content in (
        (common.ROOT / "RESULTS.md", results_page()),
        (common.ROOT.parent / "README.md", readme()),
    ):
        page.write_text(content)


def results_page() -> str:
    """RESULTS.md with a section for every experiment."""
    return replaced((common.ROOT / "RESULTS.md").read_text(), "\n\n".join(map(section, experiments())))


def readme() -> str:
    """README with the summary."""
    return replaced((common.ROOT.parent / "README.md").read_text(), summary())


def replaced(page: str, content: str) -> str:
    """``page`` with ``content`` between the two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise common.RecipeError("the page has lost the marks of its generated part.")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


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
    rows = load_rows(common.ROOT / "results" / "label_noise.jsonl")
    for entry in yaml.safe_load((common.ROOT / "label_noise.yaml").read_text()):
        found = [row for row in rows if all(row[name] == entry[name] for name in ("task", "noise"))]
        values = at_their_best(found, ["learning_rate"], REPORT)
        lines.append([entry["title"], "accuracy", *values, entry["short"]])
    return markdown(["", "on test data", *SHOWN, "the claim is"], lines)


def at_their_best(rows: list[Row], grid: Iterable[str], report: dict[str, Any]) -> list[str]:
    """The result of each arm that is shown; – for one that has not run."""
    arms = ([row for row in rows if row["arm"] == arm] for arm in SHOWN)
    places = digits(rows, report["report"])
    return [with_error(best(arm, grid, report), report["report"], places) if arm else "–" for arm in arms]
