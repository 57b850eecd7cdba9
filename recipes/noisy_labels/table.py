"""The tables: one per task, epochs and noise."""

from statistics import fmean, median

from comparison import best, by, markdown, mean_of, paired, paired_difference, starred, with_error
from sweep import Row

from hf_poprisk.leave_one_out.judge import RULE
from noisy_labels import classification, preferences
from noisy_labels.arms import ARMS

REPORT = {"select": "validation_accuracy", "report": "test_accuracy", "better": "higher"}
INTRODUCTION = (
    "The learning rate of every arm is the one with the highest mean accuracy on CLEAN validation "
    "labels, for all arms alike (* at the end of its grid); adamw-early and adamw-early-loss choose their "
    "epoch by noisy labels, 10 % of the training set. Differences are paired over the seeds, each arm at "
    "its own rate. drop-told, robust and conservative are told the true share of wrong labels, right-only "
    "which labels are wrong. Times are medians, adamw = 1."
)
HEADER = (
    "arm | learning rate | validation | test ± s.e. | difference to adamw [95 %] | wrong labels fitted | ε̂ "
    "| AUROC suspicion / mean loss | time per step"
)


AIMS = (
    "task | wrong | seeds | adamw | weight | difference [95 %] | ahead | to its best epoch | to drop-told "
    "| at equal rate, least to most | ε̂, least to most | AUROC of suspicion, least"
)


def aims(rows: list[Row]) -> str:
    """``weight`` at its best rate beside what it should beat, a line for each task and noise."""
    lines = []
    for (task, _, noise), found in sorted(by(rows, ("task", "epochs", "noise")).items()):
        arms = by(found, ["arm"])
        if not {("adamw",), ("weight",)} <= set(arms):
            continue
        adamw, weight, *told = (
            best(arms[arm,], ["learning_rate"], REPORT)
            for arm in ("adamw", "weight", "drop-told")
            if (arm,) in arms
        )
        base = {row["seed"]: row["test_accuracy"] for row in adamw}
        weight = [row for row in weight if row["seed"] in base]
        deltas = [row["test_accuracy"] - base[row["seed"]] for row in weight]
        if not deltas:
            continue
        common = {row["seed"] for row in weight}
        adamw = [row for row in adamw if row["seed"] in common]
        highest = [row | {"test_accuracy": peak(row)} for row in oracle(arms["adamw",])]
        at = [by(arms[arm,], ["learning_rate"]) for arm in ("adamw", "weight")]
        pairs = [paired(at[1][rate], at[0].get(rate, []), "test_accuracy", float) for rate in at[1]]
        equal = [pair[0] for pair in pairs if pair]
        shares = [row["noise_rate"] for row in weight if row["noise_rate"] is not None]
        areas = [row["auroc_suspicion"] for row in weight if row["auroc_suspicion"] is not None]
        lines.append(
            [
                task,
                f"{100 * noise:g} %",
                str(len(deltas)),
                mean_of(adamw, "test_accuracy"),
                mean_of(weight, "test_accuracy"),
                paired_difference(weight, adamw, "test_accuracy"),
                str(sum(delta > 0 for delta in deltas)),
                paired_difference(weight, highest, "test_accuracy"),
                paired_difference(weight, told[0], "test_accuracy") if told else "–",
                f"{min(equal):+.3f} to {max(equal):+.3f}" if equal else "–",
                f"{min(shares):.2f} to {max(shares):.2f}" if shares else "–",
                f"{min(areas):.3f}" if areas else "–",
            ]
        )
    return markdown(AIMS.split(" | "), lines)


def tables(rows: list[Row]) -> str:
    """All that the rows hold, in Markdown, the command that trained them above each."""
    groups, out = sorted(by(rows, ("task", "epochs", "noise")).items()), [INTRODUCTION]
    for (task, epochs, noise), found in groups:
        ran = {row["arm"] for at, part in groups if at[:2] == (task, epochs) for row in part}
        expected = [arm for arm in ARMS if arm in ran]
        arms = {arm: part for arm in expected if (part := [row for row in found if row["arm"] == arm])}
        out += [f"### {task}, {100 * noise:g} % wrong labels", *about(arms), *remarks(arms, expected)]
        out += [table(arms), *at_each_rate(arms)]
    return "\n\n".join(out)


def about(arms: dict[str, list[Row]]) -> tuple[str, str]:
    """What was trained, and how."""
    every = [row for part in arms.values() for row in part]
    first, sizes = every[0], every[0]["sizes"]
    n = sizes["train"] + sizes.get("held", 0)
    known = (classification.TASKS | preferences.TASKS).get(first["task"])  # not of a YAML file
    batches = f" of {known.examples_per_step} examples per step" if known else ""
    rates, seeds = (sorted({row[name] for row in every}) for name in ("learning_rate", "seed"))
    versions = sorted({f"{name} {v}" for row in every for name, v in row["versions"].items()})
    return (
        f"n = {n} training examples, {sizes['validation']} validation, {sizes['test']} test; "
        f"{first['epochs']} epochs{batches}; {len(seeds)} seeds; {', '.join(versions)}.",
        f"`python recipes/label_noise.py run --tasks {first['task']} --arms {' '.join(arms)} "
        f"--noise {first['noise']:g} --learning_rates {' '.join(f'{rate:g}' for rate in rates)} "
        f"--seeds {' '.join(map(str, seeds))} --epochs {first['epochs']}`",
    )


def remarks(arms: dict[str, list[Row]], expected: list[str]) -> list[str]:
    """Missing cells, those of an earlier rule, and rates that are not the same for every arm."""
    seeds = {row["seed"] for rows in arms.values() for row in rows}
    counts = {arm: len({row["learning_rate"] for row in rows}) for arm, rows in arms.items()}
    missing = [f"{arm} altogether" for arm in expected if arm not in arms]
    for arm, rows in arms.items():
        for (rate,), part in sorted(by(rows, ["learning_rate"]).items()):
            gone = sorted(seeds - {row["seed"] for row in part})
            missing += [f"{arm} at {rate:g}, seeds {', '.join(map(str, gone))}"] if gone else []
    older = {
        arm: sorted({row["learning_rate"] for row in rows if row["rule"] not in (None, RULE)})
        for arm, rows in arms.items()
    }
    uneven = ", ".join(f"{arm} {count}" for arm, count in counts.items())
    lines = []
    if len(set(counts.values())) > 1:
        lines += [f"**Not the same number of learning rates for every arm: {uneven}.**"]
    cells = "; ".join(f"{arm} at {', '.join(f'{rate:g}' for rate in at)}" for arm, at in older.items() if at)
    if cells:
        lines += [f"**The share estimated by an earlier rule: {cells}.**"]
    return lines + ([f"**Missing: {'; '.join(missing)}.**"] if missing else [])


def table(arms: dict[str, list[Row]]) -> str:
    """Every arm at its best learning rate."""
    adamw = arms.get("adamw", [])
    base = best(adamw, ["learning_rate"], REPORT) if adamw else []
    step = median(row["seconds_per_step"] for row in adamw) if adamw else 0.0
    lines = [arm_row(arm, rows, base, step) for arm, rows in arms.items()] + oracle_row(adamw)
    task = next(iter(arms.values()))[0]["task"]
    header = HEADER + " | margin | KL per token" * (task not in classification.TASKS)
    return "\n".join([f"| {header} |", "|---" * (header.count("|") + 1) + "|", *lines])


def at_each_rate(arms: dict[str, list[Row]]) -> list[str]:
    """Test accuracy of every arm at every learning rate, beside adamw's there; [] for one rate."""
    at = {arm: by(rows, ["learning_rate"]) for arm, rows in arms.items()}
    rates = sorted({point for points in at.values() for point in points})

    def cell(arm: str, rate: tuple[float]) -> str:
        rows, base = at[arm].get(rate, []), at.get("adamw", {}).get(rate, [])
        found = mean_of(rows, "test_accuracy")
        if arm == "adamw" or not rows or not base:
            return found
        return f"{found}, {paired_difference(rows, base, 'test_accuracy')}"

    header = ["test accuracy, difference to adamw at the same rate", *(f"{rate:g}" for (rate,) in rates)]
    return [markdown(header, [[arm, *(cell(arm, rate) for rate in rates)] for arm in at])] * (len(rates) > 1)


def arm_row(arm: str, rows: list[Row], base: list[Row], step: float) -> str:
    """An arm at its best learning rate, beside the runs ``base`` of adamw with steps of so many seconds."""
    chosen = best(rows, ["learning_rate"], REPORT)
    entries = [
        arm,
        starred(chosen[0]["learning_rate"], {row["learning_rate"] for row in rows}),
        mean_of(chosen, "validation_accuracy"),
        with_error(chosen, "test_accuracy"),
        "" if arm == "adamw" or not base else paired_difference(chosen, base, "test_accuracy"),
        mean_of(chosen, "wrong_fitted"),
        mean_of(chosen, "noise_rate"),
        " / ".join(mean_of(chosen, f"auroc_{of}") for of in ("suspicion", "loss_mean")),
        f"{median(row['seconds_per_step'] for row in rows) / step:.2f}" if step else "–",
    ]
    if chosen[0].get("test_margin") is not None:
        entries += [mean_of(chosen, "test_margin", 2), mean_of(chosen, "test_kl_per_token")]
    return f"| {' | '.join(entries)} |"


def oracle(adamw: list[Row]) -> list[Row]:
    """adamw at the rate with the best test accuracy of any epoch, which nobody can choose; [] if unknown."""
    known = [row for row in adamw if row["test_accuracy_per_epoch"]]
    points = by(known, ["learning_rate"]).values()
    return max(points, key=lambda part: (len(part), fmean(map(peak, part))), default=[])


def peak(row: Row) -> float:
    """The test accuracy of its best epoch."""
    return max(row["test_accuracy_per_epoch"])


def oracle_row(adamw: list[Row]) -> list[str]:
    """adamw at the rate and the epoch of the best test accuracy; [] if not known."""
    rows = oracle(adamw)
    if not rows:
        return []
    entry = f"{rows[0]['learning_rate']:g} | | {fmean(map(peak, rows)):.3f}"
    return [f"| *adamw, oracle: best epoch on test* | {entry} | | | | | |"]
