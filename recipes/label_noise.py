"""Training on wrong labels: what judging them is worth, beside AdamW, the gates and what others do.

    python recipes/label_noise.py run --tasks digits gauss10 --noise 0.2 0.4 --processes 2
    python recipes/label_noise.py run --tasks recipes/qwen2.5-0.5b/dpo/poprisk.yaml --noise 0.3 --seeds 0 \\
        --arms adamw hard soft random-mask --learning_rates 3e-7 1e-6
    python recipes/label_noise.py table outputs/label_noise/results.jsonl

``run`` appends one line of JSON per training run to the results file and skips the runs that are there;
``table`` prints Markdown. The seed draws the data (digits: the split), which labels are wrong, the weights
and the order, the same for every arm. ``dpo`` and ``dpo-lora`` are the recipes of ``recipes/tiny`` with four
epochs. The path of a YAML file of ``recipes/dpo.py`` is a task as well; where it names no validation split,
10 % of the training pairs become one.
"""

import argparse
import sys
from pathlib import Path

import common
from noisy_labels import classification, preferences
from noisy_labels.arms import ARMS
from noisy_labels.cells import Cell, load_rows
from noisy_labels.figure import frontier
from noisy_labels.runs import run_cell
from noisy_labels.table import tables
from sweep import ends_in_a_sentence, run_cells

TASKS = classification.TASKS | preferences.TASKS


def plan(args: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for, seed by seed: an interrupted comparison is a balanced one.

    Raises:
        RecipeError: arguments that make no sense, or a missing model or data set.
        SystemExit: a recipe that ``recipes/dpo.py`` would refuse.
    """
    rates = args.learning_rates or [1.0]
    for wrong, message in (
        (
            min(args.processes, 1 if args.epochs is None else args.epochs) < 1,
            "--processes and --epochs must be at least 1.",
        ),
        (min(args.seeds) < 0, "--seeds must be at least 0."),
        (not all(0 <= noise < 0.5 for noise in args.noise), "--noise must lie in [0, 0.5)."),
        (not all(0 < rate < 100 for rate in rates), "--learning_rates must be positive."),
    ):
        if wrong:
            raise common.RecipeError(message)
    pairs = [task for task in args.tasks if task not in classification.TASKS]
    for arm in args.arms:
        if ARMS[arm].dpo_only and not pairs and args.arms != list(ARMS):
            raise common.RecipeError(f"the arm {arm} is for preference pairs: add dpo to --tasks.")
    for name in (task for task in args.tasks if task not in TASKS):
        if not Path(name).is_file():
            raise common.RecipeError(f"--tasks {name} is neither a task nor a YAML file of recipes/dpo.py.")
        if not args.learning_rates:
            raise common.RecipeError(f"--learning_rates is missing: {name} has no grid of its own.")
    tasks = {name: TASKS[name] if name in TASKS else preferences.read_task(name) for name in args.tasks}
    for name, task in tasks.items():
        if not args.epochs and (task.epochs < 1 or task.epochs % 1):
            raise common.RecipeError(f"--epochs is missing: {name} has {task.epochs:g}, not a whole number.")
    cells = [
        Cell(name, arm, noise, rate, seed, args.epochs or int(task.epochs))
        for name, task in tasks.items()
        for seed in args.seeds
        for noise in args.noise
        for rate in args.learning_rates or task.learning_rates
        for arm in args.arms
        if name in pairs or not ARMS[arm].dpo_only
    ]
    preferences.check(cell for cell in cells if cell.task in pairs)
    return list(dict.fromkeys(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train, and append to the results")
    training.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help=f"{', '.join(TASKS)}, or a YAML of recipes/dpo.py",
    )
    training.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="all"
    )
    training.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.2, 0.3, 0.4], help="shares")
    training.add_argument("--learning_rates", nargs="+", type=float, help="default: a grid per task")
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    training.add_argument("--epochs", type=int, help="default: 20, 4 for dpo, or those of the YAML file")
    training.add_argument("--out", type=Path, default=Path("outputs/label_noise/results.jsonl"))
    training.add_argument("--processes", type=int, default=1)
    printing = commands.add_parser("table", help="print Markdown")
    printing.add_argument("results", type=Path)
    printing.add_argument("--plot", type=Path, help="also draw accuracy against KL, of preferences")
    args = parser.parse_args()
    with ends_in_a_sentence(parser):
        if args.command == "run":
            cells = [cell.place for cell in plan(args)]
            sys.exit(run_cells(cells, run_cell, args.out, args.processes, alike="task"))
        rows = load_rows(args.results)
        if not rows:
            raise common.RecipeError(f"{args.results} holds no finished run: start one first.")
        if args.plot is not None:
            frontier(rows, args.plot)
        print(tables(rows))


if __name__ == "__main__":
    main()
