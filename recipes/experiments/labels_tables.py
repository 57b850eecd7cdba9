"""Judging labels: ``weight`` beside what it should beat, and tables of all arms."""

from statistics import fmean

import labels_classes
import labels_pairs
import numpy as np
import pandas as pd
from experiment import Report
from labels_judged import NOISE
from tables import best, difference, facet_table, markdown, mean, paired

REPORT = Report("validation_accuracy", "test_accuracy", "higher")
RATE = ["learning_rate"]
TITLES = labels_classes.TITLES | labels_pairs.TITLES
ARMS = {  # by what they do
    "Judging": ("adamw", "weight", "weight-shuffled", "drop", "drop-told", "right-only"),
    "The eigenbasis, and other optimizers": (
        "adamw",
        "basis",
        "lion",
        "muon",
        "soap",
        "muon+weight",
        "soap+weight",
        "basis+weight",
    ),
    "The gates in the eigenbasis": ("adamw", "basis", "basis+hard", "basis+soft", "basis+random-mask"),
    "Losses for pairs": ("adamw", "robust", "conservative", "ipo", "em", "hoelder"),
    "The gates and their masks": ("adamw", "hard", "random-mask", "soft", "random-mask-soft"),
    "Early stopping": ("adamw", "adamw-early", "adamw-early-loss", "adamw-risk"),
}
IN_README = (  # data and share of mislabeled examples
    *(("digits", 0.0), ("digits", 0.3), ("gauss10", 0.3), ("digits-class", 0.2)),
    *(("dpo-words", 0.3), ("dpo", 0.3)),
)


def aims(rows: pd.DataFrame) -> str:
    """``weight`` at its best rate, beside AdamW at its own and at equal rates."""
    lines = []
    for (data, noise), found in rows.groupby(["data", "noise"]):
        of = {arm: found[found["arm"] == arm] for arm in ("adamw", "weight")}
        adamw, weight = (best(part, RATE, REPORT) for part in of.values())
        common = set(adamw["seed"]) & set(weight["seed"])
        if not common:
            continue
        adamw, weight = (part[part["seed"].isin(common)] for part in (adamw, weight))
        before = dict(zip(adamw["seed"], adamw["test_accuracy"], strict=True))
        ahead = sum(a > before[s] for s, a in zip(weight["seed"], weight["test_accuracy"], strict=True))
        peak = best_epoch(of["adamw"]).assign(test_accuracy=lambda part: part["test_accuracy_best"])
        at = [dict(list(part.groupby("learning_rate"))) for part in of.values()]
        pairs = [paired(at[1][rate], at[0][rate], "test_accuracy") for rate in at[1] if rate in at[0]]
        equal = [pair[0] for pair in pairs if pair]
        shares, areas = weight["noise_rate"].dropna(), weight["auroc_suspicion"].dropna()
        lines.append(
            [
                f"{data}, {100 * noise:g} %",
                mean(adamw, "test_accuracy"),
                mean(weight, "test_accuracy"),
                difference(weight, adamw, "test_accuracy"),
                f"{ahead} of {len(common)}",
                difference(weight, peak, "test_accuracy"),
                f"{min(equal):+.3f} to {max(equal):+.3f}" if equal else "–",
                f"{min(shares):.2f} to {max(shares):.2f}" if len(shares) else "–",
                f"{min(areas):.3f}" if len(areas) else "–",
            ]
        )
    heads = "data, mislabeled | adamw | weight | difference [95 %] | seeds ahead "
    heads += "| to AdamW's best epoch [95 %] | at equal rate | ε̂ | AUROC, least"
    return markdown(heads.split(" | "), lines)


def best_epoch(adamw: pd.DataFrame) -> pd.DataFrame:
    """The runs at the rate with the best test accuracy of any epoch, which nobody can choose."""
    known = adamw[adamw["test_accuracy_best"].notna()]
    points = [part for _, part in known.groupby("learning_rate")]
    return max(points, key=lambda part: (len(part), fmean(part["test_accuracy_best"])), default=known)


def judged(rows: pd.DataFrame) -> str:
    """How well pairs are judged before training, beside frozen embeddings and self-influence."""
    out = []
    for data, found in rows.groupby("data"):
        of = found.set_index("arm")
        for noise in NOISE:
            row = of.loc["gradients"].rename(lambda name, end=f"_{100 * noise:g}": name.removesuffix(end))
            rivals = of.reindex(["last-state", "mean-state", "self-influence"])
            pairs = rivals[[f"auroc_{100 * noise:g}", f"folds_{100 * noise:g}"]].to_numpy(float)
            others = ["–" if np.isnan(area) else f"{area:.3f} ({simple:.3f})" for area, simple in pairs]
            area = f"{row['auroc']:.3f} ({row['auroc_least']:.3f})" if noise else "–"
            rate = f"{row['rate']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            below = f"{100 * row['below_half']:.1f} %"
            out.append([f"{data}, {100 * noise:g} %", rate, f"{row['error']:.3f}", below, area, *others])
    heads = "data, flipped | estimated rate [95 %] | largest error | below .5 | AUROC (least) "
    heads += "| last state (5 folds) | mean state (5 folds) | self-influence (loss)"
    return markdown(heads.split(" | "), out)


def mean_of(part: pd.DataFrame, seeds: int) -> str:
    """Mean accuracy, and of how many seeds where they are fewer."""
    return mean(part, "test_accuracy") + f" ({len(part)})" * (0 < len(part) < seeds)


def pairs(rows: pd.DataFrame) -> str:
    """Pairs at every rate that ``weight`` was run at, the other arms with its seeds."""
    out = []
    for (data, noise, rate), found in rows.groupby(["data", "noise", "learning_rate"]):
        weight = found[found["arm"] == "weight"]
        if not len(weight):
            continue
        of = dict(list(found[found["seed"].isin(weight["seed"])].groupby("arm")))
        arms = [of.get(arm, found[:0]) for arm in ("adamw", "soft", "em", "hoelder", "weight", "right-only")]
        values = [mean_of(part, len(weight)) for part in arms]
        gain = difference(weight, arms[0], "test_accuracy")
        out.append([f"{data}, {100 * noise:g} %", f"{rate:g}", str(len(weight)), *values, gain])
    heads = "data, flipped | learning rate | seeds | AdamW | soft gate | EM | Hölder-DPO | weight "
    heads += "| told which | weight − AdamW [95 %]"
    return markdown(heads.split(" | "), out)


def leaps(rows: pd.DataFrame) -> str:
    """The leap beside the others at their best rates, and how far from the reference each goes.

    Of the runs that made one: it is not made where labels are predicted too badly.
    """
    out = []
    for (data, noise), found in rows.groupby(["data", "noise"]):
        leap = found[(found["arm"] == "leap") & found["test_accuracy"].notna()]
        if not len(leap):
            continue
        others = [
            best(found[found["arm"] == arm], RATE, REPORT)
            for arm in ("adamw", "weight", "basis+weight", "right-only")
        ]
        values = [mean_of(part, len(leap)) for part in (*others, leap)]
        gain, kl = difference(leap, others[0], "test_accuracy"), "test_kl_per_token"
        far = f"{mean(others[0], kl)} / {mean(leap, kl)}"
        out.append([f"{data}, {100 * noise:g} %", *values, gain, far, str(len(leap))])
    heads = "data, flipped | AdamW | with weights | and in the eigenbasis | told which | leap "
    heads += "| leap − AdamW [95 %] | KL per token, AdamW / leap | seeds"
    return markdown(heads.split(" | "), out)


def arms(rows: pd.DataFrame) -> str:
    """All arms at their best learning rates, a table for each kind of arm."""
    out = []
    for kind, names in ARMS.items():
        known = rows[rows["arm"].isin(names)]
        others = known[known["arm"] != "adamw"][["data", "noise"]].drop_duplicates()
        part = known.merge(others, on=["data", "noise"])  # where more than adamw was run
        if len(part):
            out += [f"**{kind}**", facet_table(labels_pairs.EXPERIMENT, part, REPORT, names)]
    return "\n\n".join(out)


def summary(rows: pd.DataFrame) -> str:
    """README's table: each arm at its best rate, a line for each data set and share of noise."""
    names, out = ("adamw", "weight", "leap", "right-only"), []
    for data, noise in IN_README:
        found = rows[(rows["data"] == data) & (rows["noise"] == noise)]
        chosen = [best(found[found["arm"] == arm], RATE, REPORT) for arm in names]
        seeds = max(map(len, chosen))
        values = [mean_of(part, seeds) for part in chosen]
        rate, area = (mean(chosen[1], *what) for what in (("noise_rate", 2), ("auroc_suspicion", 3)))
        out.append([f"{TITLES[data]}, {100 * noise:g} % mislabeled", *values, rate, area, str(seeds)])
    heads = ["", "AdamW", "weights", "leap", "told which", "rate found", "AUROC", "seeds"]
    return markdown(heads, out)
