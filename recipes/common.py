"""What the recipes share: parsing, loading from the Hub or from disk, checks, results."""

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset, load_from_disk
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import ScriptArguments, TrlParser

from hf_poprisk import train_command
from hf_poprisk.checkpoints import CheckpointError
from hf_poprisk.hub import HubError
from hf_poprisk.user_errors import UserError

ROOT = Path(__file__).parent  # of the recipes


def parse(dataclass_types: Iterable[Any], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Dataclasses from ``--config RECIPE.yaml`` and the command line, which wins.

    The second dataclass holds the training arguments; they are quiet unless ``disable_tqdm`` is false. A
    bad key or value ends the program with exit code 2 and one sentence, before anything is loaded.
    """
    parser = TrlParser(dataclass_types)
    parser.set_defaults(disable_tqdm=True)  # a line per log; --disable_tqdm false brings the bars back
    try:
        parsed = train_command.parse(parser, argv)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if parsed[1].disable_tqdm:
        disable_progress_bars()
        disable_progress_bar()
        os.environ["TQDM_DISABLE"] = "1"  # the bars of TRL's own loops
    return parsed


def run(main: Callable[[], None]) -> None:
    """Run a recipe; a wrong path, setting or data set ends in one sentence, Ctrl-C in another."""
    try:
        main()
    except (ValueError, OSError, CheckpointError, HubError) as error:
        logging.getLogger(__name__).debug("where it came from:", exc_info=True)
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was published; what is finished is kept.", file=sys.stderr)
        sys.exit(130)


class RecipeError(ValueError):
    """Something the user can put right, said in one sentence."""


def load_splits(args: ScriptArguments, revision: str | None = None) -> DatasetDict:
    """A data set by its Hub name, or a folder: of data files, or written by ``save_to_disk``."""
    require_path(args.dataset_name, "dataset_name")
    if args.dataset_streaming:
        raise RecipeError("dataset_streaming=true is not supported by the recipes: set it to false.")
    if Path(args.dataset_name, "dataset_dict.json").is_file():
        return load_from_disk(args.dataset_name)
    return load_dataset(args.dataset_name, args.dataset_config, revision=revision)


def require_path(name: str | None, option: str) -> None:
    """Refuse a path that is not there, which the Hub client would take for a repository name."""
    if not name:
        raise RecipeError(f"{option} is missing: a name on the Hub or a folder.")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.startswith("outputs/")
    if looks_local and not Path(name).expanduser().is_dir():
        hint = "; `python scripts/prepare_tiny.py` makes it" if "outputs/tiny/" in name else ""
        raise RecipeError(f"{option}={name} is not a folder{hint}.")


def split(data: DatasetDict, args: ScriptArguments, option: str) -> Dataset:
    name = getattr(args, option)
    if name not in data:
        raise RecipeError(f"{option}={name} is not a split of the data set: it has {', '.join(data)}.")
    return data[name]


def check_completions(dataset: Dataset, name: str) -> None:
    """Refuse empty completions: such a pair teaches the length of nothing."""
    missing = {"chosen", "rejected"} - set(dataset.column_names)
    if missing:
        raise RecipeError(f"the {name} split has no column {' and '.join(sorted(missing))}.")
    for column in ("chosen", "rejected"):
        for row, value in enumerate(dataset[column]):
            text = value if isinstance(value, str) or value is None else value[-1]["content"] if value else ""
            if not (text or "").strip():
                where = f"row {row} of the {name} split has an empty {column!r}"
                raise RecipeError(f"{where}: drop or repair it.")


def flip_preferences(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Swap chosen and rejected in exactly ``round(fraction · n)`` rows, drawn by ``seed``.

    Returns:
        The data set with a bool column ``is_flipped``. One that is there already is kept when nothing
        more is to be flipped.
    """
    if not 0.0 <= fraction <= 1.0:
        raise RecipeError(f"flip_fraction must be between 0 and 1; got {fraction}.")
    if "is_flipped" in dataset.column_names:
        if fraction:
            raise RecipeError("the training split has an is_flipped column already: set flip_fraction=0.")
        return dataset
    count = round(fraction * len(dataset))
    flipped = np.zeros(len(dataset), dtype=bool)
    flipped[np.random.default_rng(seed).permutation(len(dataset))[:count]] = True

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        if not flipped[index]:
            return {"is_flipped": False}
        swapped = {"chosen": row["rejected"], "rejected": row["chosen"], "is_flipped": True}
        if "score_chosen" in row and "score_rejected" in row:
            swapped |= {"score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}
        return swapped

    return dataset.map(swap, with_indices=True, desc=f"Flipping {count} of {len(dataset)} labels")


class StepTimer(TrainerCallback):
    """Seconds per optimizer step, evaluation and saving left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class ShortLog(TrainerCallback):
    """One short line per log: the losses and shares, of the thirty-odd numbers that go to the history."""

    NAMES = ("loss", "accuracy", "accuracies", "fraction_open", "noise_rate")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        shown = [name for name in logs if name.endswith(self.NAMES) and "token_accuracy" not in name]
        kept = [f"{name} {logs[name]:.4g}" for name in shown]
        if kept and state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}: {', '.join(kept)}", flush=True)


def train(trainer: Trainer, data: Dataset, resume: str | None) -> StepTimer:
    """Train and save; with short lines in place of the whole logs, unless there are progress bars."""
    timer, args = StepTimer(), trainer.args
    trainer.add_callback(timer)
    if args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ShortLog())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    if args.poprisk_label_noise != "off" and trainer.is_world_process_zero():
        # for the audit: with the labels as they were trained on; pushes leave out _*
        data.save_to_disk(Path(args.output_dir, "_training_data"))
    return timer


def finish(
    trainer: Trainer, results: dict[str, Any], timer: StepTimer, groups: Sequence[Any], **card: Any
) -> None:
    """Write ``results.json``, push, and leave the process group, all together.

    Args:
        results: to which the mean of every ``poprisk/`` entry over the logs, seconds and steps are added.
        groups: the arguments of the run, which are written as well, tokens left out.
        card: of the model card that is pushed.
    """
    if trainer.is_world_process_zero():
        logs = pd.DataFrame(trainer.state.log_history).filter(regex="^poprisk/").mean()
        results |= {
            "gate": {name.removeprefix("poprisk/"): value for name, value in logs.items()},
            "seconds_per_step": statistics.median(timer.seconds) if timer.seconds else None,
            "steps": trainer.state.global_step,
        }
        every = [group.to_dict() if hasattr(group, "to_dict") else vars(group) for group in groups]
        settings = {k: v for group in every for k, v in group.items() if not k.endswith("token")}
        content = {"results": results, "settings": settings}
        path = Path(trainer.args.output_dir, "results.json")
        path.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    # Without the barrier a rank may exit in the instant after its last collective. The thread that then joins
    # gloo's worker holds the interpreter's lock, which the worker wants to free that collective's tensor.
    trainer.accelerator.wait_for_everyone()
    trainer.end()
