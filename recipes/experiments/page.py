"""Writes the generated parts of RESULTS.md, LABEL_NOISE.md, README and the guide to output space.

    python recipes/experiments/page.py

A part stands between two marks, of which the first names it. All else on a page is written by hand.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes

import common
import labels_tables
import output_space
import pandas as pd
from experiment import HERE, NAMES, Experiment, Report, load, read, results_of
from labels_pairs import EPOCHS
from labels_tables import at_best
from matplotlib.figure import Figure
from tables import best, difference, digits, error, in_words, markdown, paired, table, with_error

ROOT = HERE.parents[1]
GUIDE = ROOT / "hf_poprisk" / "output_space" / "README.md"
PAGES = (HERE / "RESULTS.md", HERE / "LABEL_NOISE.md", ROOT / "README.md", GUIDE)
END = "<!-- end of the generated part -->"
MARKED = re.compile(rf"(<!-- generated: [^>]*?, ([\w-]+) -->)\n.*?({END})", re.S)
LABELS = ("labels_classes", "labels_pairs")
CLAIMS = [name for name in NAMES if not name.startswith("labels_")]  # of the source
MASKS = {"hard": "random-mask", "soft": "random-mask-soft"}  # gate → its mask
SHOWN = ("adamw", "hard", "soft", "random-mask")  # the arms in the table of all claims
PASSES = {  # arm → passes before the first epoch: judging takes two, the basis half a one, the leap two
    **{"adamw": 0, "lion": 0, "muon": 0, "soap": 0, "basis": 0.5, "weight": 2, "muon+weight": 2},
    **{"soap+weight": 2, "basis+weight": 2.5, "leap": 4, "right-only": 0},
}
NO_GAIN = "supported only at equal learning rate, and a mask does the same"
OF_THE_GATE = {  # data → verdict, of the lines of that table with 30 % mislabeled
    "dpo": NO_GAIN,
    "dpo-words": NO_GAIN,
    "dpo-words-lora": "the soft gate only at equal learning rate, as its mask; the hard one has one seed",
    "digits": "not supported: 0.6 and 1.0 points, and a mask has as many; judging labels gains 3.4 points",
    "gauss6": "not supported: 2.4 points, and a mask has as many; judging labels gains 6.4 points",
}


def rows_of(name: str) -> tuple[Experiment, pd.DataFrame]:
    """An experiment, and its finished cells that are on its grid."""
    experiment = load(name)
    return experiment, experiment.declared(read(experiment, results_of(name)))


def label_rows() -> pd.DataFrame:
    return pd.concat([rows_of(name)[1] for name in LABELS])


def section(name: str) -> str:
    """The tables of one experiment, and what they took."""
    experiment, rows = rows_of(name)
    minutes = len(experiment.cells()) * rows["seconds"].mean() / 60
    took = f"{len(experiment.cells())} runs, about {minutes:.0f} minutes of one core."
    tables = (table(experiment, rows, report) for report in experiment.reports)
    return "\n\n".join([f"`python recipes/experiments/run.py {name}`: {took}", *tables])


def summary() -> str:
    """The first report of every experiment on a claim, each arm at its best settings."""
    out, labels = [], label_rows()
    for name in CLAIMS:
        experiment, rows = rows_of(name)
        report, values = experiment.reports[0], ["–"] * len(SHOWN)
        if not experiment.facets:
            chosen = [best(rows, experiment.grid, report, arm) for arm in SHOWN]
            values = [with_error(part, report.result, digits(rows, report.result)) for part in chosen]
        what = report.result.removeprefix("test_")
        out.append([f"{experiment.title} ({what})", *values, experiment.verdict])
    for data, verdict in OF_THE_GATE.items():
        rows = labels[(labels["data"] == data) & (labels["noise"] == 0.3)]
        values = [with_error(at_best(rows, arm), "test_accuracy") for arm in SHOWN]
        out.append([f"{labels_tables.TITLES[data]}, 30 % mislabeled (accuracy)", *values, verdict])
    return markdown(["", *SHOWN, "the claim is"], out)


def overview() -> str:
    """Both gates beside AdamW and beside a random mask as dense, each arm at its own best settings.

    The last line counts the intervals of three seeds or more that say that a gate is better or worse.
    """
    lines, signs = [], []
    for name in NAMES:
        experiment, rows = rows_of(name)
        groups = rows.groupby(list(experiment.facets)) if experiment.facets else [((), rows)]
        for report in experiment.reports:
            for facet, part in groups:
                if not part["arm"].isin(MASKS).any():
                    continue
                entries, found = beside_masks(part, experiment, report)
                place = f" ({in_words(facet)})" if facet else ""
                lines.append([f"{name}{place}: {report.result.removeprefix('test_')}", *entries])
                signs.append(found)
    counts = []
    for column in zip(*signs, strict=True):
        known = [sign for sign in column if sign is not None]
        counts.append(f"{len(known)}, {known.count(1)} better, {known.count(-1)} worse")
    header = [f"{gate} against {base} [95 %]" for gate in MASKS for base in ("adamw", "its mask")]
    return markdown(["", *header, "seeds"], [*lines, ["intervals", *counts, ""]])


def beside_masks(
    rows: pd.DataFrame, experiment: Experiment, report: Report
) -> tuple[list[str], list[int | None]]:
    """One line of the overview, and what its intervals say."""
    places = digits(rows, report.result)
    of = {arm: best(rows, experiment.grid, report, arm) for arm in ("adamw", *MASKS, *MASKS.values())}
    pairs = [(of[gate], of[base]) for gate, mask in MASKS.items() for base in ("adamw", mask)]
    entries = [difference(*pair, report.result, places, report.ratio) for pair in pairs]
    seeds = sorted({len(set(mine["seed"]) & set(base["seed"])) for mine, base in pairs} - {0})
    few = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(*seeds)
    return [*entries, few], [verdict(*pair, report) for pair in pairs]


def verdict(rows: pd.DataFrame, base: pd.DataFrame, report: Report) -> int | None:
    """1 for better and -1 for worse beyond the interval, 0 for neither; None for fewer than three seeds."""
    values = paired(rows, base, report.result, report.ratio)
    if len(set(rows["seed"]) & set(base["seed"])) < 3 or not values:
        return None
    if values[1] <= 0 <= values[2]:
        return 0
    return 1 if (values[0] > 0) == (report.better == "higher") else -1


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Preferences: accuracy against KL to the reference, a line per arm over its learning rates; a PNG."""
    markers = {"adamw": "o", "hard": "s", "random-mask": "v", "soft": "^", "weight": "X"}
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axis, data in zip(figure.subplots(1, 2), ("dpo", "dpo-words"), strict=True):
        part = rows[(rows["data"] == data) & (rows["noise"] == 0.3)]
        for i, (arm, marker) in enumerate(markers.items()):
            points = [
                (fmean(same["test_kl_per_token"]), fmean(same["test_accuracy"]), error(same["test_accuracy"]))
                for _, same in part[part["arm"] == arm].groupby("learning_rate")
            ]
            x, y, bars = zip(*points, strict=True)
            axis.errorbar(x, y, bars, label=arm, marker=marker, color=f"C{i}", lw=1)
        axis.set(xscale="log", xlabel="KL to the reference (nats/token)", ylabel="accuracy on clean pairs")
        axis.set_title(f"{data}, 30 % flipped")
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=70, metadata={"Software": None}, pil_kwargs={"optimize": True})


def draw_passes(rows: pd.DataFrame, path: Path) -> None:
    """Hard pairs with 30 % flipped: accuracy against passes over the data, each arm at its best rate; a PNG.

    Epochs of which no accuracy was kept are left out; bars are standard errors over the seeds.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    part = rows[(rows["data"] == "dpo") & (rows["noise"] == 0.3) & rows["test_accuracy"].notna()]
    for i, (arm, before) in enumerate(PASSES.items()):
        chosen = at_best(part, arm)
        if not len(chosen):
            continue
        epochs = 0 if arm == "leap" else EPOCHS
        known = {e: chosen.get(f"test_accuracy_{e}", pd.Series(dtype=float)) for e in range(1, epochs)}
        ends = {**known, epochs: chosen["test_accuracy"]}
        points = [(before + e, fmean(y), error(y)) for e, y in ends.items() if len(y) and y.notna().all()]
        x, y, bars = zip(*points, strict=True)
        label = f"{arm} ({len(chosen)})"
        axis.errorbar(x, y, bars, label=label, marker="oX"[arm == "leap"], ms=4, color=f"C{i}", lw=1)
    axis.set(xlabel="passes over the data, those of judging and of the basis too")
    axis.set(ylabel="accuracy on clean pairs")
    axis.set_title("dpo, 30 % flipped (seeds in brackets)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=70, metadata={"Software": None}, pil_kwargs={"optimize": True})


PARTS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "overview": overview,
    **{name: lambda name=name: section(name) for name in CLAIMS},
    "aims": lambda: labels_tables.aims(label_rows()),
    "judged": lambda: labels_tables.judged(rows_of("labels_judged")[1]),
    "pairs": lambda: labels_tables.pairs(rows_of("labels_pairs")[1]),
    "leaps": lambda: labels_tables.leaps(rows_of("labels_pairs")[1]),
    "arms": lambda: labels_tables.arms(label_rows()),
    "labels": lambda: labels_tables.summary(label_rows()),
    **{f"output_space_{kind}": lambda kind=kind: output_space.table(kind) for kind in output_space.KINDS},
}


def written(page: str) -> str:
    """A page with its generated parts as they should be."""

    def part(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in PARTS:
            raise common.RecipeError(f"{name} is no generated part: there are {', '.join(PARTS)}.")
        return f"{begin}\n\n{PARTS[name]()}\n\n{end}"

    return MARKED.sub(part, page)


def main() -> None:
    for path in PAGES:
        path.write_text(written(path.read_text()))
    pairs = rows_of("labels_pairs")[1]
    draw(pairs, HERE / "results" / "preferences.png")
    draw_passes(pairs, HERE / "results" / "passes.png")


if __name__ == "__main__":
    common.run(main)
