"""A table and a plot from the output folders of ``recipes/dpo.py``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

# title, key in the log, and the key that tells whose evaluation an entry is
PANELS = (
    ("held-out accuracy", "eval_rewards/accuracies", "eval_test_loss"),
    ("share of flipped pairs fitted", "eval_rewards/accuracies", "eval_flipped_loss"),
    ("held-out reward margin", "eval_rewards/margins", "eval_test_loss"),
    ("fraction open (dotted: pure noise)", "poprisk/fraction_open", "loss"),
)


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The results of a run and its log history."""
    try:
        content = json.loads((folder / "results.json").read_text())
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return content["results"], history
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"compare.py: error: {folder} holds no finished run ({error}): train it again.")


def table(runs: dict[str, dict[str, Any]]) -> Table:
    """One row per run; a dash where a run has no such number."""
    columns = ("held-out accuracy", "reward margin", "KL per token", "flipped fitted", "open / noise level")
    out = Table(Column("run", no_wrap=True), *columns, "s per step", title="DPO on noisy preferences")
    for name, r in runs.items():
        gate, test, flipped = r["gate"], r["scores"]["test"], r["scores"].get("flipped", {})
        opened = [gate[key] for key in ("fraction_open", "fraction_open_null") if key in gate]
        cells = (test["accuracy"], 3), (test["margin"], 2), (test["kl_per_token"], 3)
        numbers = ["–" if x is None else f"{x:.{n}f}" for x, n in (*cells, (flipped.get("accuracy"), 3))]
        seconds = "–" if r["seconds_per_step"] is None else f"{r['seconds_per_step']:.2f}"
        out.add_row(name, *numbers, " / ".join(f"{x:.3f}" for x in opened) or "–", seconds)
    return out


def plot(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """The curves of ``PANELS`` over optimizer steps, one line per run, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (title, key, whose) in zip(axes.flat, PANELS, strict=True):
        for color, (name, history) in enumerate(histories.items()):
            points = [(entry["step"], entry[key]) for entry in history if key in entry and whose in entry]
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), label=name, color=f"C{color}", marker=".", markersize=4)
            null = [(e["step"], e[f"{key}_null"]) for e in history if f"{key}_null" in e]
            if null:
                axis.plot(*zip(*null, strict=True), color=f"C{color}", linestyle=":")
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    if axes.flat[0].lines:  # a run without a step has no curve
        axes.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders; their names label the rows")
    parser.add_argument("--plot", type=Path, help="write the curves to this PNG")
    args = parser.parse_args()
    loaded = {folder.name: load(folder) for folder in args.runs}
    Console(width=110).print(table({name: results for name, (results, _) in loaded.items()}))
    if args.plot:
        plot({name: history for name, (_, history) in loaded.items()}, args.plot)
        print(f"curves: {args.plot}")


if __name__ == "__main__":
    main()
