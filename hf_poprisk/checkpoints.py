"""Checkpoints that can be trusted: the record in each of them, which ones are whole, and resuming.

``trainer_state.json`` is the seal of a checkpoint: it is removed before anything else is written and comes
last, after every rank has written its part. A checkpoint without it was being written when the run died.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from hf_poprisk.arguments import OPTIM
from hf_poprisk.record import (
    CONFIG_NAME,
    SCHEMA_VERSION,
    SOURCE,
    STATISTICS_NAME,
    Record,
    load_record,
    write_json,
)
from hf_poprisk.statistics import GateStatistics

logger = logging.getLogger(__name__)

_PACKAGES = ("hf_poprisk", "torch", "transformers", "accelerate", "trl", "peft", "datasets")
_SETTINGS = ("gate", "estimator", "warmup_steps", "ema_alpha", "exclude", "label_noise")
# Settings that are gone, with the value that means what the code does now.
_GONE = {"reduction": "element", "gate_weight_decay": False}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says what is left."""


class ResumeError(ValueError):
    """A checkpoint that is not whole, or of a run with other settings."""


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it is whole, or whole but for ``save_only_model``.

    Reads the ends of its files, not the tensors.
    """
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_file() and not path.is_dir():
            return f"{path.name} is no file"
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            torn = path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)
            if torn or path.suffix == ".parquet" and not path.read_bytes().endswith(b"PAR1"):
                return f"{path.name} is cut off"
        except (OSError, ValueError, RecursionError, SafetensorError):
            return f"{path.name} is cut off"
    missing = _missing(checkpoint)
    if missing:
        return f"{missing} is gone"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    return None


# What a checkpoint holds beside the weights. Other names: of transformers under FSDP, DeepSpeed.
_BESIDE_WEIGHTS = {
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler*",),
    "rng_state.pth": ("rng_state*",),
}


def holds_weights_only(checkpoint: Path) -> bool:
    """Whether it was saved with ``save_only_model=True``, by our trainers or by the stock one.

    A checkpoint that was being deleted has lost files too; the record, where there is one, says which it is.
    """
    if any(next(checkpoint.glob(p), None) for patterns in _BESIDE_WEIGHTS.values() for p in patterns):
        return False
    record = checkpoint / CONFIG_NAME
    content = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    said = content.get("save_only_model") if isinstance(content, dict) else None
    return said is not False  # a record that is older than the entry does not say


def _missing(checkpoint: Path) -> str | None:
    """A file that a checkpoint to resume from must have and this one has not."""
    for index in checkpoint.glob("*.index.json"):
        for shard in json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values():
            if not (checkpoint / shard).is_file():
                return str(shard)
    parts = {"model.safetensors": ("*model*", "*.safetensors")}  # or an adapter's, or shards
    if not holds_weights_only(checkpoint):
        parts |= _BESIDE_WEIGHTS
    for name, patterns in parts.items():
        if not any(next(checkpoint.glob(pattern), None) for pattern in patterns):
            return name
    return None


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step; those that are not whole are skipped with a warning."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            found.append((int(step), path))
    for _, path in sorted(found, reverse=True):
        reason = damage(path)
        if reason is None:
            return path
        logger.warning(f"{path} is skipped: {reason}.")
    return None


class CheckpointMixin:
    """Saves the record with the model and resumes from whole checkpoints only."""

    _weights_step: int | None = None  # where load_best_model_at_end went back to
    _training_data: dict[str, Any] = {"examples": None, "altered_labels": None}
    _trainable: dict[str, Any] | None = None  # when training began

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        saves = str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"
        if self.args.save_only_model and saves and self.is_world_process_zero():
            logger.warning(
                "save_only_model=True: checkpoints hold weights only, and a resumed run starts with a fresh "
                "optimizer."
            )
        if self._trainable is None:  # a second call goes on with the optimizer of the first
            self._trainable = _digest(self._trainable_names())
        if resume_from_checkpoint:
            resume_from_checkpoint = str(self._checkpoint_to_resume(resume_from_checkpoint))
            self._check_same_run(resume_from_checkpoint)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)  # type: ignore[misc]

    def _checkpoint_to_resume(self, wanted: str | bool) -> Path:
        if wanted is True:
            found = newest_checkpoint(self.args.output_dir)
            if found is None:
                raise ResumeError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint."
                )
        else:
            found = Path(wanted)
            if not found.is_dir():
                raise ResumeError(f"resume_from_checkpoint={wanted} is not a folder.")
            reason = damage(found)
            if reason is not None:
                raise ResumeError(f"{wanted} cannot be resumed from: {reason}; take an older checkpoint.")
        if holds_weights_only(found):
            if not self.args.save_only_model:
                raise ResumeError(
                    f"{found} holds weights only, because it was saved with save_only_model=True: set "
                    "save_only_model=True to go on from the weights with a fresh optimizer, or take a "
                    "checkpoint that holds the optimizer."
                )
            if self.is_world_process_zero():
                logger.warning(
                    f"{found} holds weights only (save_only_model=True): the optimizer and the learning-rate "
                    "schedule start afresh."
                )
        return found

    def _check_same_run(self, checkpoint: str) -> None:
        """Refuse other parameters, which the optimizer's state does not fit, other data, other settings.

        Other data are other batches than those that were trained on, and other settings would be a third
        method and called neither.
        """
        if not Path(checkpoint, CONFIG_NAME).is_file():
            return
        record, args = load_record(checkpoint), self.args
        before, now = record.config, self._record()
        if not holds_weights_only(Path(checkpoint)):
            self._check_same_parameters(checkpoint, record)
        if args.optim != OPTIM or args.poprisk_allow_change:
            return
        if before["optim"] == OPTIM:
            for name, value in _GONE.items():
                if before.get(name, value) != value:
                    raise ResumeError(
                        f"{checkpoint} was trained with {name}={before[name]!r}, which is no longer there: "
                        "resume it with hf_poprisk 0.1, or set poprisk_allow_change=true."
                    )
        changes = self._changes_of_gate(before, now) if before["optim"] == OPTIM else []
        had, has = before["data"]["examples"], now["data"]["examples"]
        if None not in (had, has) and had != has and not args.ignore_data_skip:
            changes.append(f"the number of training examples from {had} to {has}")
        if changes:
            raise ResumeError(
                f"resuming from {checkpoint} would change {', '.join(changes)}: set it back, or set "
                "poprisk_allow_change=true."
            )

    @staticmethod
    def _changes_of_gate(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        before = {"label_noise": "off", **before}  # a record that is older than the setting
        names = [name for name in _SETTINGS if before[name] != now[name]]
        if "ema" not in (before["estimator"], now["estimator"]):
            names += ["units_per_step"] if before["units_per_step"] != now["units_per_step"] else []
        spell = {"units_per_step": f"{now['unit']}s per step"}
        return [
            f"{spell.get(name, f'poprisk_{name}')} from {_short(before[name])} to {_short(now[name])}"
            for name in names
        ]

    def _check_same_parameters(self, checkpoint: str, record: Record) -> None:
        had, has = record.config.get("trainable"), self._trainable
        if had is None or had == has:
            return
        names = self._trainable_names()
        gone = sorted(set((record.statistics or {}).get("parameters", ())) - set(names))
        some = ", ".join(_short(name) for name in gone[:3]) + ", …" * (len(gone) > 3)
        raise ResumeError(
            f"{checkpoint} holds the optimizer's state of {had['tensors']} trainable tensors, and this model "
            f"has {has['tensors'] or 'none'}{'' if had['tensors'] != has['tensors'] else ' others'}"
            f"{f' (no longer trainable: {some})' if gone else ''}: freeze and unfreeze parameters as in "
            "that run, or start over."
        )

    def _trainable_names(self) -> list[str]:
        """Of what the optimizer will be made of, or of what one that was handed to the trainer holds."""
        held = getattr(self.optimizer, "param_groups", None)
        if held is None:
            return [name for name, p in self.model.named_parameters() if p.requires_grad]
        params = {p for group in held for p in group["params"]}
        return [name for name, p in self.model.named_parameters() if p in params]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        optimizer, self._weights_step = self._poprisk_optimizer(), None
        if optimizer is not None:
            optimizer.statistics = GateStatistics()  # of a new run
        if self._risk is not None:
            self._risk.clear()
            if checkpoint is not None:
                self._risk.load(checkpoint, self.args.device)
        self._load_label_noise(checkpoint)
        if checkpoint is None or optimizer is None or not Path(checkpoint, STATISTICS_NAME).is_file():
            return
        statistics = load_record(checkpoint).statistics
        if statistics is not None:
            optimizer.statistics.load(statistics, dict(self.model.named_parameters()))

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._weights_step = self.state.best_global_step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which takes one step too many when it resumes a run that is at its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.args.should_save:
            self._write_record(output_dir or self.args.output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self._risk is not None and self.args.should_save:
            self._risk.save(output_dir)
        self.accelerator.wait_for_everyone()  # before the seal

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial=trial))
        seal = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / TRAINER_STATE_NAME
        try:
            if self.args.should_save and seal.parent.is_dir():  # of an earlier run that had got further
                seal.unlink(missing_ok=True)
                shutil.rmtree(seal.parent)
            self.accelerator.wait_for_everyone()  # before another rank writes its part
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            if damage(seal.parent) is None:  # it was written; something after it failed
                raise
            left = newest_checkpoint(output_dir)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{seal.parent} could not be written ({reason}); "
                + (f"{left} is complete." if left else "there is no complete checkpoint.")
            ) from error

    def _write_record(self, folder: str | Path) -> None:
        """The two files of the record; the optimizer may not exist yet, or be a stock one."""
        config, path = Path(folder, CONFIG_NAME), Path(folder, STATISTICS_NAME)
        if config.is_file() and not self.state.global_step:
            return  # this trainer has not trained, and the record is of the run that has
        write_json(config, self._record())
        optimizer = self._poprisk_optimizer()
        if optimizer is None:
            path.unlink(missing_ok=True)  # of an earlier run with the gate
        else:
            statistics = optimizer.statistics.of_run(optimizer.names)
            write_json(path, {"schema_version": SCHEMA_VERSION, **statistics})
        self._write_label_noise(folder)

    def _record(self) -> dict[str, Any]:
        args = self.args
        return {
            "schema_version": SCHEMA_VERSION,
            "source": SOURCE,
            "optim": str(getattr(args.optim, "value", args.optim)),
            **args.gate_options(),
            "exclude": list(args.poprisk_exclude or ()),
            "label_noise": args.poprisk_label_noise,
            "unit": "group" if args.poprisk_estimator == "group" else "example",
            "units_per_step": args.units_per_step,
            "save_only_model": args.save_only_model,
            "layout": {
                "processes": args.world_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
                "per_device_train_batch_size": args.per_device_train_batch_size,
            },
            "steps": self.state.global_step,
            "weights_step": self._weights_step or self.state.global_step,
            "data": self._training_data,
            "trainable": self._trainable,
            "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _digest(names: list[str]) -> dict[str, Any]:
    text = "\n".join(sorted(names))
    return {"tensors": len(names), "names": hashlib.sha256(text.encode()).hexdigest()}


def describe_data(dataset: Any) -> dict[str, Any]:
    """How many examples there are, and how many labels were altered on purpose (column ``is_flipped``)."""
    examples = len(dataset) if has_length(dataset) else None
    columns = getattr(dataset, "column_names", None)
    altered = None
    if examples is not None and isinstance(columns, list) and "is_flipped" in columns:
        altered = sum(map(bool, dataset["is_flipped"]))
    return {"examples": examples, "altered_labels": altered}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
