"""Writes the generated parts of RESULTS.md, LABEL_NOISE.md, README and the guide to output space.

    python recipes/experiments/page.py

A part stands between two marks, of which the first names it. All else on a page is written by hand.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes

import common
import figure
import gates
import labels_tables
import output_space
import pandas as pd
from experiment import HERE, NAMES, Experiment, load, read, results_of
from tables import arm_or_facet_table, best, digits, markdown, with_error

ROOT = HERE.parents[1]
GUIDE = ROOT / "hf_poprisk" / "output_space" / "README.md"
PAGES = (HERE / "RESULTS.md", HERE / "LABEL_NOISE.md", ROOT / "README.md", GUIDE)
END = "<!-- end of the generated part -->"
MARKED = re.compile(rf"(<!-- generated: [^>]*?, ([\w-]+) -->)\n.*?\n({END})", re.S)
LABELS = ("labels_classes", "labels_pairs")
CLAIMS = [name for name in NAMES if name not in (*LABELS, "labels_judged")]  # of the source
IN_TRAINING = HERE / "results" / "labels_pairs_in_training.csv"  # of an earlier version
CLASSES_IN_TRAINING = HERE / "results" / "labels_classes_in_training.csv"
SHOWN = ("adamw", "hard", "soft", "random-mask")  # the arms in README, for the gate
SHOWN_OF_LABELS = ("adamw", "adamw-early", "soft", "drop-told", "weight")  # of labels
OF_THE_GATE = {  # data → verdict, of the lines in README with 30 % mislabeled
    "dpo": "supported only at equal learning rate, and a mask does the same",
    "dpo-words": "supported only at equal learning rate, and a mask does the same",
    "dpo-words-lora": "the soft gate only at equal learning rate, as its mask; the hard one has one seed",
    "digits": "not supported: 0.6 and 1.0 points, and a mask has as many; judging labels gains 3.4 points",
    "gauss6": "not supported: 2.4 points, and a mask has as many; judging labels gains 6.4 points",
}
OF_LABELS = (  # data and share of mislabeled examples
    *(("digits", noise) for noise in (0.2, 0.3, 0.4)),
    *(("gauss6", 0.3), ("gauss10", 0.3), ("digits", 0.0), ("digits-class", 0.2)),
    *(("dpo-words", 0.3), ("dpo", 0.3)),
)


def rows_of(name: str) -> tuple[Experiment, pd.DataFrame]:
    """An experiment, and its finished cells that are on its grid."""
    experiment = load(name)
    return experiment, experiment.declared(read(experiment, results_of(name)))


def label_rows() -> pd.DataFrame:
    return pd.concat([rows_of(name)[1] for name in LABELS])


def section(name: str) -> str:
    """The tables of one experiment, and what they took."""
    experiment, rows = rows_of(name)
    took = (
        f"`python recipes/experiments/run.py {name}`: {len(rows)} of {len(experiment.cells())} cells, "
        f"{rows['seconds'].sum() / 60:.0f} minutes of one core."
    )
    tables = (arm_or_facet_table(experiment, rows, report) for report in experiment.reports)
    return "\n\n".join([took, *tables])


def summary() -> str:
    """README's table of the gate: the first report of every experiment, each arm at its best settings."""
    out, labels = [], label_rows()
    for name in CLAIMS:
        experiment, rows = rows_of(name)
        report = experiment.reports[0]
        values, places = ["–"] * len(SHOWN), digits(rows, report.result)
        if not experiment.facets:
            chosen = [best(rows[rows["arm"] == arm], experiment.grid, report) for arm in SHOWN]
            values = [with_error(part, report.result, places) for part in chosen]
        what = report.result.removeprefix("test_").replace("_", " ")
        out.append([experiment.title, what, *values, experiment.verdict])
    report, rate = labels_tables.REPORT, labels_tables.RATE
    for data, verdict in OF_THE_GATE.items():
        rows = labels[(labels["data"] == data) & (labels["noise"] == 0.3)]
        values = [with_error(best(rows[rows["arm"] == arm], rate, report), report.result) for arm in SHOWN]
        out.append([f"{labels_tables.title(data)}, 30 % mislabeled", "accuracy", *values, verdict])
    return markdown(["", "on test data", *SHOWN, "the claim is"], out)


PARTS: dict[str, Callable[[], str]] = {
    "overview": gates.overview,
    **{name: lambda name=name: section(name) for name in CLAIMS},
    "aims": lambda: labels_tables.aims(label_rows()),
    "classes": lambda: labels_tables.in_training(
        rows_of("labels_classes")[1], pd.read_csv(CLASSES_IN_TRAINING)
    ),
    "arms": lambda: labels_tables.tables(label_rows()),
    "pairs": lambda: labels_tables.pairs(rows_of("labels_pairs")[1], pd.read_csv(IN_TRAINING)),
    "judged": lambda: labels_tables.judged(rows_of("labels_judged")[1]),
    "summary": summary,
    **{f"output_space_{kind}": lambda kind=kind: output_space.table(kind) for kind in output_space.KINDS},
    "labels": lambda: labels_tables.summary(label_rows(), OF_LABELS, SHOWN_OF_LABELS),
}


def written(page: str) -> str:
    """A page with its generated parts as they should be.

    Raises:
        RecipeError: a part that there is not.
    """

    def part(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in PARTS:
            raise common.RecipeError(f"{name} is no generated part: there are {', '.join(PARTS)}.")
        return f"{begin}\n\n{PARTS[name]()}\n\n{end}"

    return MARKED.sub(part, page)


def main() -> None:
    for path in PAGES:
        path.write_text(written(path.read_text()))
    figure.draw(rows_of("labels_pairs")[1], HERE / "results" / "preferences.png")


if __name__ == "__main__":
    common.run(main)
