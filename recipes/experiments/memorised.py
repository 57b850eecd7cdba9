"""The memorised share as AdamW trains on mislabeled examples: digits, and preference pairs.

    python recipes/experiments/memorised.py            # digits and dpo, seeds 0, 1 and 2
    python recipes/experiments/memorised.py dpo        # go on with one of them, and draw

Each run is plain AdamW (a gate that is kept out, for its readings). Rows go to ``results/memorised.csv``, one
per epoch: losses, the share and the noise scale of that epoch's steps; ``results/memorised.png`` shows them.
``dpo`` needs ``outputs/tiny``, which ``python scripts/prepare_tiny.py`` makes. Finished runs are kept.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes

import common
import labels_classes
import labels_pairs
import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from run import rounded, write
from transformers import PrinterCallback, TrainerCallback

RESULTS = Path(__file__).with_name("results") / "memorised.csv"
SEEDS = (0, 1, 2)
TASKS = {  # name → prepare, cell, what is drawn of it
    "digits": (labels_classes.prepare, {"data": "digits", "learning_rate": 1e-3, "epochs": 20}),
    "dpo": (labels_pairs.prepare, {"data": "dpo", "learning_rate": 1e-4, "epochs": 6}),
}
AXES = ["task", "noise", "seed"]
COLUMNS = ["memorised_share", "margin", "noise_scale", "gain_ratio"]
ADAMW = {"poprisk_gate": "hard", "poprisk_warmup_steps": 10**6, "poprisk_risk": True}


class Epochs(TrainerCallback):
    """A row per epoch; the log of its steps comes first."""

    def __init__(self, score: Any) -> None:
        self._score, self.rows = score, list[dict[str, Any]]()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            found = {name: logs.get(f"poprisk/{name}") for name in COLUMNS}
            test = self._score("test")
            row = {"step": state.global_step, "training_loss": logs["loss"], "test_loss": test["loss"]}
            self.rows.append(row | {"test_accuracy": test["accuracy"]} | found)


def run(task: str, noise: float, seed: int) -> list[dict[str, Any]]:
    prepare, cell = TASKS[task]
    cell = {"arm": "adamw", "noise": noise, "seed": seed, **ADAMW, **cell}
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(cell, folder)
        trainer, rows = setup.trainer, Epochs(setup.score)
        trainer.args.logging_strategy = "epoch"
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(rows)
        trainer.train()
    return [{"task": task, "noise": noise, "seed": seed, **row} for row in rows.rows]


def draw(rows: pd.DataFrame, path: Path) -> None:
    tasks = [task for task in TASKS if task in set(rows["task"])]
    figure = Figure((11, 2.9 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), 3, squeeze=False), tasks, strict=True):
        for noise, part in rows[rows["task"] == task].groupby("noise"):
            label, color = f"{noise:.0%} mislabeled", "tab:red" if noise else "tab:blue"
            for _, seed in part.groupby("seed"):
                axes[0].plot(seed["step"], seed["training_loss"], ":", color=color, linewidth=1)
                for axis, name in zip(axes, ("test_loss", "memorised_share", "noise_scale"), strict=True):
                    axis.plot(seed["step"], seed[name], color=color, linewidth=1, label=label)
                label = None
        axes[0].set(ylabel=task, title="loss: test, and training (dotted)")
        axes[1].set(title="memorised share")
        axes[1].axhline(1, color="gray", linewidth=0.8)
        axes[2].set(title="noise scale, in examples", yscale="log")
        axes[0].legend(frameon=False, fontsize=8)
        for axis in axes:
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
    figure.savefig(path, dpi=70)


def main(argv: Sequence[str]) -> None:
    if wrong := [name for name in argv if name not in TASKS]:
        raise common.RecipeError(f"unknown: {' '.join(wrong)}; give some of {', '.join(TASKS)}, or nothing.")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=AXES)
    for task in argv or TASKS:
        for seed in SEEDS:
            for noise in (0.0, 0.3):
                if ((rows["task"] == task) & (rows["noise"] == noise) & (rows["seed"] == seed)).any():
                    continue
                new = [{k: rounded(v) for k, v in row.items()} for row in run(task, noise, seed)]
                rows = (
                    pd.concat([rows, pd.DataFrame(new)], ignore_index=True)
                    if len(rows)
                    else pd.DataFrame(new)
                )
                write(rows, RESULTS)
    draw(rows, RESULTS.with_suffix(".png"))
    last = rows.groupby(AXES).tail(1)
    print(last.to_string(index=False))


if __name__ == "__main__":
    common.run(lambda: main(sys.argv[1:]))
