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
    "The eigenbasis, and other optimizers": tuple(
        "adamw basis lion muon soap muon+weight soap+weight basis+weight".split()
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


def at_best(rows: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The runs of an arm at its best learning rate."""
    return best(rows, RATE, REPORT, arm)


def aims(rows: pd.DataFrame) -> str:
    """``weight`` at its best rate, beside AdamW at its own and at equal rates."""
    lines = []
    for (data, noise), found in rows.groupby(["data", "noise"]):
        adamw, weight = (at_best(found, arm).set_index("seed", drop=False) for arm in ("adamw", "weight"))
        common = adamw.index.intersection(weight.index)
        if not len(common):
            continue
        adamw, weight = adamw.loc[common], weight.loc[common]
        ahead = (weight["test_accuracy"] > adamw["test_accuracy"]).sum()
        at = [dict(list(found[found["arm"] == arm].groupby("learning_rate"))) for arm in ("adamw", "weight")]
        pairs = [paired(at[1][rate], at[0][rate], "test_accuracy") for rate in at[1] if rate in at[0]]
        equal = [pair[0] for pair in pairs if pair]
        shares, areas = weight["noise_rate"].dropna(), weight["auroc_suspicion"].dropna()
        line = [f"{data}, {100 * noise:g} %", *(mean(part, "test_accuracy") for part in (adamw, weight))]
        line += [difference(weight, adamw, "test_accuracy"), f"{ahead} of {len(common)}"]
        line += [difference(weight, best_epoch(found[found["arm"] == "adamw"]), "test_accuracy")]
        line += [f"{min(equal):+.3f} to {max(equal):+.3f}" if equal else "–"]
        line += [f"{min(shares):.2f} to {max(shares):.2f}" if len(shares) else "–"]
        lines.append([*line, f"{min(areas):.3f}" if len(areas) else "–"])
    heads = "data, mislabeled | adamw | weight | difference [95 %] | seeds ahead "
    heads += "| to AdamW's best epoch [95 %] | at equal rate | ε̂ | AUROC, least"
    return markdown(heads.split(" | "), lines)


def best_epoch(adamw: pd.DataFrame) -> pd.DataFrame:
    """At the rate with the best accuracy on test of any epoch, which nobody can choose, these accuracies."""
    known = adamw[adamw["test_accuracy_best"].notna()].assign(test_accuracy=adamw["test_accuracy_best"])
    points = [part for _, part in known.groupby("learning_rate")]
    return max(points, key=lambda part: (len(part), fmean(part["test_accuracy"])), default=known)


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
        others = [at_best(found, arm) for arm in ("adamw", "weight", "basis+weight", "right-only")]
        values = [mean_of(part, len(leap)) for part in (*others, leap)]
        far = " / ".join(mean(part, "test_kl_per_token") for part in (others[0], leap))
        gain = difference(leap, others[0], "test_accuracy")
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
        chosen = [at_best(found, arm) for arm in names]
        seeds = max(map(len, chosen))
        values = [mean_of(part, seeds) for part in chosen]
        rate, area = (mean(chosen[1], *what) for what in (("noise_rate", 2), ("auroc_suspicion", 3)))
        out.append([f"{TITLES[data]}, {100 * noise:g} % mislabeled", *values, rate, area, str(seeds)])
    heads = ["", "AdamW", "weights", "leap", "told which", "rate found", "AUROC", "seeds"]
    return markdown(heads, out)
