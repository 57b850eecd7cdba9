"""Judging labels: ``weight`` beside what it should beat, and tables of all arms."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import labels_classes
import labels_pairs
import pandas as pd
from experiment import Report
from labels_judged import NOISE
from tables import best, difference, facet_table, markdown, mean, paired

REPORT = Report("validation_accuracy", "test_accuracy", "higher")
RATE = ["learning_rate"]
AIMS = (
    "data | mislabeled | seeds | adamw | weight | difference [95 %] | ahead | to its best epoch "
    "| to drop-told | at equal rate, least to most | ε̂, least to most | AUROC of suspicion, least"
)
TABLES = {  # by what the arms do
    "Judging": ("adamw", "weight", "drop-told", "right-only"),
    "For pairs only": ("adamw", "robust", "conservative", "ipo"),
    "The gates and their masks": ("adamw", "hard", "random-mask", "soft", "random-mask-soft", "ema-soft"),
    "Early stopping": ("adamw", "adamw-early", "adamw-early-loss", "adamw-risk"),
}


def title(data: str) -> str:
    """In words."""
    return (labels_classes.TITLES | labels_pairs.TITLES)[data]


def aims(rows: pd.DataFrame) -> str:
    """``weight`` at its best rate, beside AdamW at its own and what else is known."""
    lines = []
    for (data, noise), found in rows.groupby(["data", "noise"]):
        of = {arm: found[found["arm"] == arm] for arm in ("adamw", "weight", "drop-told")}
        adamw, weight, told = (best(part, RATE, REPORT) for part in of.values())
        common = set(adamw["seed"]) & set(weight["seed"])
        if not common:
            continue
        adamw, weight = (part[part["seed"].isin(common)] for part in (adamw, weight))
        before = dict(zip(adamw["seed"], adamw["test_accuracy"], strict=True))
        ahead = sum(a > before[s] for s, a in zip(weight["seed"], weight["test_accuracy"], strict=True))
        peak = best_epoch(of["adamw"]).assign(test_accuracy=lambda part: part["test_accuracy_best"])
        at = [dict(list(of[arm].groupby("learning_rate"))) for arm in ("adamw", "weight")]
        pairs = [paired(at[1][rate], at[0][rate], "test_accuracy") for rate in at[1] if rate in at[0]]
        equal = [pair[0] for pair in pairs if pair]
        shares, areas = weight["noise_rate"].dropna(), weight["auroc_suspicion"].dropna()
        lines.append(
            [
                data,
                f"{100 * noise:g} %",
                str(len(common)),
                mean(adamw, "test_accuracy"),
                mean(weight, "test_accuracy"),
                difference(weight, adamw, "test_accuracy"),
                str(ahead),
                difference(weight, peak, "test_accuracy"),
                difference(weight, told, "test_accuracy"),
                f"{min(equal):+.3f} to {max(equal):+.3f}" if equal else "–",
                f"{min(shares):.2f} to {max(shares):.2f}" if len(shares) else "–",
                f"{min(areas):.3f}" if len(areas) else "–",
            ]
        )
    return markdown(AIMS.split(" | "), lines)


def in_training(rows: pd.DataFrame, before: pd.DataFrame) -> str:
    """Classes judged before the first step, beside what judging them in training gave at the same cells."""
    axes, out = ["data", "noise", "learning_rate", "seed"], []
    now, past = (part[part["arm"] == "weight"] for part in (rows, before))
    both = now.merge(past, on=axes, suffixes=("", "_past"))
    for (data, noise, rate), cells in both.groupby(axes[:3]):
        then = cells.drop(columns=now.columns.difference(axes)).rename(
            columns=lambda c: c.removesuffix("_past")
        )
        values = [(name, 3) for name in ("test_accuracy", "noise_rate", "auroc_suspicion")]
        shown = [mean(part, name, places) for name, places in values for part in (cells, then)]
        gain = difference(cells, then, "test_accuracy")
        out.append([data, f"{100 * noise:g} %", f"{rate:g}", str(len(cells)), *shown[:2], gain, *shown[2:]])
    heads = "data | mislabeled | learning rate | seeds | accuracy | in training | difference [95 %] "
    heads += "| ε̂ | in training | AUROC | in training"
    return markdown(heads.split(" | "), out)


def pairs(rows: pd.DataFrame, before: pd.DataFrame) -> str:
    """Pairs at every rate that ``weight`` was run at, the other arms with its seeds.

    Args:
        rows: of pairs.
        before: of an earlier version, which judged pairs during training.
    """
    out = []
    past = before[before["arm"].isin(["weight", "drop-told"])]
    known = pd.concat([rows, past.assign(arm=past["arm"] + " in training")])
    arms = ("adamw", "soft", "em", "weight", "right-only", "weight in training", "drop-told in training")
    for (data, noise, rate), found in known.groupby(["data", "noise", "learning_rate"]):
        of = {arm: found[found["arm"] == arm] for arm in arms}
        weight = of["weight"]
        if not len(weight):
            continue
        same = {arm: part[part["seed"].isin(weight["seed"])] for arm, part in of.items()}
        values = [
            mean(part, "test_accuracy") + f" ({len(part)})" * (0 < len(part) < len(weight))
            for part in same.values()
        ]
        out.append(
            [data, f"{100 * noise:g} %", f"{rate:g}", str(len(weight)), *values]
            + [difference(weight, same["adamw"], "test_accuracy"), mean(weight, "test_kl_per_token", 2)]
        )
    heads = (
        "data | flipped | learning rate | seeds | AdamW | soft gate | EM | weight | told which | in training "
    )
    heads += "| drop-told | weight − AdamW [95 %] | KL of weight"
    return markdown(heads.split(" | "), out)


def judged(rows: pd.DataFrame) -> str:
    """How well pairs are judged before training, beside frozen embeddings in place of gradients."""
    out = []
    for data, found in rows.groupby("data"):
        of = found.set_index("arm")
        for noise in NOISE:
            row = of.loc["gradients"].rename(lambda name, end=f"_{100 * noise:g}": name.removesuffix(end))
            others = [
                f"{of.loc[arm, f'{name}_{100 * noise:g}']:.3f}" if noise and arm in of.index else "–"
                for arm in ("last-state", "mean-state")
                for name in ("auroc", "folds")
            ]
            area = f"{row['auroc']:.3f} ({row['auroc_least']:.3f})" if noise else "–"
            rate = f"{row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            below = f"{100 * row['below_half']:.1f} %"
            out.append([data, f"{100 * noise:g} %", rate, f"{row['error']:.3f}", below, area, *others])
    heads = "data | flipped | estimated rate [95 %] | largest error | below .5 | AUROC (least) "
    heads += "| last state | its 5 folds | mean state | its 5 folds"
    return markdown(heads.split(" | "), out)


def best_epoch(adamw: pd.DataFrame) -> pd.DataFrame:
    """The runs at the rate with the best test accuracy of any epoch, which nobody can choose."""
    known = adamw[adamw["test_accuracy_best"].notna()]
    points = [part for _, part in known.groupby("learning_rate")]
    return max(points, key=lambda part: (len(part), fmean(part["test_accuracy_best"])), default=known)


def tables(rows: pd.DataFrame) -> str:
    """All arms at their best learning rates, a table for each kind of arm."""
    out = []
    for kind, arms in TABLES.items():
        known = rows[rows["arm"].isin(arms)]
        others = known[known["arm"] != "adamw"][["data", "noise"]].drop_duplicates()
        part = known.merge(others, on=["data", "noise"])  # where more than adamw was run
        out += [f"**{kind}**", facet_table(labels_pairs.EXPERIMENT, part, REPORT, arms)]
    return "\n\n".join(out)


def summary(rows: pd.DataFrame, lines: Iterable[tuple[str, float]], arms: Sequence[str]) -> str:
    """README's table: each arm at its best rate, a line for each data set and share of noise."""
    out = []
    for data, noise in lines:
        found = rows[(rows["data"] == data) & (rows["noise"] == noise)]
        chosen = [best(found[found["arm"] == arm], RATE, REPORT) for arm in arms]
        seeds = max(map(len, chosen))
        values = [
            mean(part, "test_accuracy") + f" ({len(part)})" * (0 < len(part) < seeds) for part in chosen
        ]
        out.append(
            [
                f"{title(data)}, {100 * noise:g} % mislabeled",
                *values,
                mean(chosen[-1], "noise_rate", 2),
                str(seeds),
            ]
        )
    return markdown(["accuracy on clean test labels", *arms, "its ε̂", "seeds (of an arm)"], out)
