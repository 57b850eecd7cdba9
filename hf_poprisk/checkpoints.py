"""Checkpoints that can be trusted: the record in each of them, which ones are whole, and resuming.

``trainer_state.json`` is the seal of a checkpoint: it is removed before anything else is written and comes
last, after every rank has written its part. A checkpoint without it was being written when the run died.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_poprisk.any_optimizer import PopRiskGate
from hf_poprisk.logs import GateStatistics
from hf_poprisk.record import (
    CONFIG_NAME,
    SCHEMA_VERSION,
    STATISTICS_NAME,
    changes,
    describe_trainable,
    load_record,
    make_config,
    write_json,
)

logger = logging.getLogger(__name__)

# What a checkpoint holds. Other names: adapters and shards; of transformers under FSDP, DeepSpeed.
_PARTS = {
    "model.safetensors": ("*model*", "*.safetensors"),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler*",),
    "rng_state.pth": ("rng_state*",),
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says what is left."""


class ResumeError(ValueError):
    """A checkpoint that is not whole, or of a run with other settings."""


def damage(checkpoint: Path, weights_only: bool = False) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it is whole. Reads the ends of its files.

    Args:
        weights_only: one that holds nothing beside the weights is whole too.
    """
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        if _cut_off(path):
            return f"{path.name} is cut off"
    gone = [name for name in _PARTS if not _holds(checkpoint, name)]
    if gone and not (weights_only and gone == list(_PARTS)[1:]):
        return f"{gone[0]} is gone"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    return None


def _holds(checkpoint: Path, part: str) -> bool:
    return any(next(checkpoint.glob(pattern), None) for pattern in _PARTS[part])


def _cut_off(path: Path) -> bool:
    try:
        match path.suffix:
            case ".safetensors":
                with safe_open(path, "pt"):
                    return False
            case ".json":
                json.loads(path.read_text(encoding="utf-8"))
            case ".pt" | ".pth" | ".bin":
                return not zipfile.is_zipfile(path)
            case ".parquet":
                return not path.read_bytes().endswith(b"PAR1")
    except (OSError, ValueError, SafetensorError):
        return True
    return False


def newest_checkpoint(output_dir: str | Path, weights_only: bool = False) -> Path | None:
    """The whole checkpoint with the highest step; those that are not whole are skipped with a warning."""
    folders = (p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir())
    steps = {int(s): p for p in folders if (s := p.name.rpartition("-")[2]).isdecimal()}
    for _, path in sorted(steps.items(), reverse=True):
        reason = damage(path, weights_only)
        if reason is None:
            return path
        logger.warning(f"{path} is skipped: {reason}.")
    return None


def checkpoint_to_resume(args: Any, wanted: str | bool | None = None) -> str | None:
    """The folder to resume from; None to start anew.

    Args:
        args: training arguments; with ``save_only_model``, weights alone will do.
        wanted: a folder; True, ``true`` or ``last`` for the newest whole one in ``output_dir``; False,
            ``false`` or ``none``. Left out: ``args.resume_from_checkpoint``.

    Raises:
        ResumeError: there is none, or it is not whole.
    """
    wanted = args.resume_from_checkpoint if wanted is None else wanted
    if str(wanted).lower() in ("false", "none"):
        return None
    alone, hint = args.save_only_model, "save_only_model=true goes on from weights alone"
    last = str(wanted).lower() in ("last", "true")
    found = newest_checkpoint(args.output_dir, alone) if last else Path(str(wanted))
    if found is None:
        raise ResumeError(
            f"resume_from_checkpoint={wanted}, but {args.output_dir} holds no complete checkpoint ({hint})."
        )
    if not found.is_dir():
        raise ResumeError(f"resume_from_checkpoint={wanted} is not a folder.")
    if reason := damage(found, alone):
        raise ResumeError(f"{found} cannot be resumed from: {reason}; take an older checkpoint ({hint}).")
    return str(found)


class CheckpointMixin:
    """Saves the record with the model and resumes from whole checkpoints only."""

    _weights_step: int | None = None  # where load_best_model_at_end went back to
    _training_data: dict[str, Any] = {"examples": None, "altered_labels": None}
    _trainable: dict[str, Any] | None = None  # when training began

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._trainable is None:  # a second call goes on with the optimizer of the first
            self._trainable = describe_trainable(self._trainable_names())
        found = checkpoint_to_resume(self.args, resume_from_checkpoint or False)
        if found is not None:
            self._check_same_run(Path(found))
            if not _holds(Path(found), "optimizer.pt") and self.is_world_process_zero():
                logger.warning(
                    f"{found} holds weights only: the optimizer and the learning-rate schedule start afresh."
                )
        return super().train(found, *args, **kwargs)  # type: ignore[misc]

    def _check_same_run(self, checkpoint: Path) -> None:
        """Refuse other parameters, which the optimizer's state does not fit, other data, other settings."""
        if not (checkpoint / CONFIG_NAME).is_file():  # of a stock trainer
            return
        config = load_record(checkpoint).config
        had, has = config.get("trainable"), self._trainable
        if had not in (None, has) and _holds(checkpoint, "optimizer.pt"):
            raise ResumeError(
                f"{checkpoint} holds the optimizer's state of {had['tensors']} trainable tensors, and this "
                f"model has {has['tensors'] or 'none'}{' others' * (had['tensors'] == has['tensors'])}: "
                "freeze and unfreeze parameters as in that run, or start over."
            )
        changed = changes(config, self._record(), self.args.ignore_data_skip)
        if changed and not self.args.poprisk_allow_change:
            raise ResumeError(
                f"resuming from {checkpoint} would change {', '.join(changed)}: set it back, or set "
                "poprisk_allow_change=true."
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
        self._weights_step = None
        self._follow_shards()
        if self._risk is not None:
            self._risk.load(checkpoint, self.args.device)
        self._load_label_noise(checkpoint)
        optimizer = self._poprisk_optimizer()
        if optimizer is None:
            return
        optimizer.statistics = GateStatistics()  # of a new run
        if checkpoint is not None and Path(checkpoint, CONFIG_NAME).is_file():
            statistics = load_record(checkpoint).statistics
            if statistics is not None:
                optimizer.statistics.load(statistics, {name: p for p, name in optimizer.names.items()})

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; a sharded checkpoint, whose weights are saved elsewhere, has its record too."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.is_fsdp_enabled and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._write_record(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self._risk is not None and self.args.should_save:
            self._risk.save(output_dir)
        self.accelerator.wait_for_everyone()  # before the seal

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save and folder.is_dir():  # of an earlier run that had got further
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()  # before another rank writes its part
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            left = newest_checkpoint(output_dir, self.args.save_only_model)
            if left == folder:  # it was written; what failed came after it
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{folder} could not be written ({reason}); "
                + (f"{left} is complete." if left else "there is no complete checkpoint.")
            ) from error

    def _write_record(self, folder: str | Path) -> None:
        trained = self.state.global_step or self._label_noise is not None and self._label_noise.leapt
        if Path(folder, CONFIG_NAME).is_file() and not trained:
            return  # this trainer has not trained, and the record is of the run that has
        write_json(Path(folder, CONFIG_NAME), self._record())
        path, optimizer = Path(folder, STATISTICS_NAME), self._poprisk_optimizer()
        if optimizer is None:  # not made yet, or a stock one: those of an earlier run go
            path.unlink(missing_ok=True)
        else:
            of_run = optimizer.statistics.of_run(optimizer.names)
            write_json(path, {"schema_version": SCHEMA_VERSION, **of_run})
        self._write_label_noise(folder)

    def _record(self) -> dict[str, Any]:
        steps, optimizer = self.state.global_step, self._poprisk_optimizer()
        return make_config(
            self.args,
            steps=steps,
            weights_step=self._weights_step or steps,
            data=self._training_data,
            trainable=self._trainable,
            around=type(optimizer.inner).__name__ if isinstance(optimizer, PopRiskGate) else None,
        )
