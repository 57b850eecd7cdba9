"""Preference pairs with swapped labels: DPO as ``recipes/dpo.py`` does it, by any of its YAML files.

A task is one of ``TASKS``, by a YAML file of ``recipes/tiny``, or the path of such a file, which says all
that a cell and its arm do not: model, adapter, data, batch, schedule. Its test split is the test set. Where
it names no validation split, 10 % of the training pairs, drawn by the seed, become one, with their labels
as they are.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import transformers
from datasets import Dataset

from noisy_labels import words
from noisy_labels.arms import ARMS, trainer_class
from noisy_labels.cells import HELD_OUT, Cell, Setup, Task, hold_out


@dataclass(frozen=True)
class PairsTask(Task):
    """What the pairs of a recipe are trained as."""

    recipe: str = "dpo"  # folder of recipes/tiny
    easier: bool = False  # pairs that are easily told apart, see words.py
    wrong: str = "random"  # labels; else those on ``ties``, which half of the pairs then are, or a ``group``


RATES, LORA_RATES = (1e-5, 3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3, 3e-3)
TASKS = {
    "dpo": PairsTask(4, RATES, 16),
    "dpo-lora": PairsTask(4, LORA_RATES, 16, "dpo-lora"),
    "dpo-words": PairsTask(4, RATES, 16, easier=True),
    "dpo-words-lora": PairsTask(4, LORA_RATES, 16, "dpo-lora", easier=True),
    "dpo-words-ties": PairsTask(4, RATES, 16, easier=True, wrong="ties"),
    "dpo-words-group": PairsTask(4, RATES, 16, easier=True, wrong="group"),
}


def read_task(path: str) -> Task:
    """The task of a YAML file; it has no grid of learning rates.

    Raises:
        SystemExit: ``recipes/dpo.py`` would refuse the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, args, _ = arguments(path, ["--output_dir", folder])
    return Task(args.num_train_epochs, (), args.units_per_step)


def check(cells: Iterable[Cell]) -> None:
    """Refuse before any work what the runs would refuse.

    Raises:
        RecipeError: a missing model or data set, or a length in steps.
        SystemExit: settings that an arm cannot be run with.
    """
    for cell in {(cell.task, cell.arm): cell for cell in cells}.values():
        with tempfile.TemporaryDirectory() as folder:
            script_args, args, model_args = cell_arguments(cell, folder)
        if args.max_steps > 0:
            raise common.RecipeError(f"max_steps of {cell.task} has no place here: give --epochs instead.")
        common.require_path(model_args.model_name_or_path, "model_name_or_path")
        common.require_path(script_args.dataset_name, "dataset_name")


def arguments(task: str, argv: list[str]) -> tuple[Any, ...]:
    """The settings of the recipe, and what stands on the command line in place of some."""
    import dpo  # here, because TRL is slow to import

    path = common.ROOT / "tiny" / TASKS[task].recipe / "poprisk.yaml" if task in TASKS else task
    return common.parse(dpo.ARGUMENTS, ["--config", str(path), *argv])


def cell_arguments(cell: Cell, folder: str) -> tuple[Any, ...]:
    """The settings of one run: those of its place and its arm take the place of the recipe's."""
    losses = ARMS[cell.arm].losses(cell.noise)
    options = cell.options(folder) | {
        "optim": "poprisk_adamw",
        "flip_fraction": cell.noise,
        "flip_seed": cell.seed,
        "label_smoothing": cell.noise if "robust" in losses else 0,
        "push_to_hub": False,
    }
    argv = [str(item) for name, value in options.items() for item in (f"--{name}", value)]
    return arguments(cell.task, [*argv, "--loss_type", *losses, "--loss_weights", *map(str, losses.values())])


def prepare(cell: Cell, folder: str) -> Setup:
    """The trainer of a cell.

    Raises:
        RecipeError: the data set lacks a split, or has an empty completion.
    """
    import dpo

    from hf_poprisk import PopRiskDPOTrainer

    class Trainer(PopRiskDPOTrainer):
        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            # dpo.score runs the reference model itself, on what is held out
            return super()._precompute_ref_logps(dataset, name, batch_size) if name == "train" else dataset

    arm = ARMS[cell.arm]
    script_args, args, model_args = cell_arguments(cell, folder)
    train, held_out = dpo.load(script_args)
    if "validation" not in held_out:
        parts = train.train_test_split(HELD_OUT, seed=cell.seed)
        train, held_out["validation"] = parts["train"], parts["test"]
    task = TASKS.get(cell.task, TASKS["dpo"])
    if task.easier:
        ties = 0.5 if task.wrong == "ties" else 0.0
        train = words.easier(train, ties, cell.seed)
        held_out = {name: words.easier(part, ties, cell.seed) for name, part in held_out.items()}
    if task.wrong == "random":
        train = common.flip_preferences(train, cell.noise, cell.seed)
    else:
        train = common.swap_preferences(train, words.wrong_of(train, task.wrong, cell.noise, cell.seed))
    wrong = np.array(train["is_flipped"])
    kept, held = hold_out(len(train), arm.early is not None, cell.seed)
    sets = {name: held_out[name] for name in ("validation", "test")}
    for name, rows in (("wrong", kept[wrong[kept]][: dpo.MAX_FLIPPED_EVAL]), ("held", held)):
        sets |= {name: train.select(rows)} if len(rows) else {}
    transformers.set_seed(cell.seed)
    trainer_kind = trainer_class(Trainer, arm, cell.noise, wrong[kept])
    trainer = dpo.make_trainer(trainer_kind, args, model_args, train.select(kept), sets)
    reference = dpo.reference_of(trainer, model_args)
    sizes = {name: len(part) for name, part in trainer.eval_dataset.items()}
    every_epoch = list(sizes) if arm.early else ["test"] if cell.arm == "adamw" else []
    return Setup(trainer, lambda name: dpo.score(trainer, reference, name), wrong[kept], sizes, every_epoch)
