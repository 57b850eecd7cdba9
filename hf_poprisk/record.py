"""The record beside the weights: how the gate was set, and what it did.

Two JSON files lie in every checkpoint, every saved model and every pushed repository:
``poprisk_config.json``, whose entries ``make_config`` lists, and ``poprisk_statistics.json``, whose entries
``GateStatistics.of_run`` lists.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from transformers.trainer_utils import has_length

from hf_poprisk.arguments import OPTIM

CONFIG_NAME = "poprisk_config.json"
STATISTICS_NAME = "poprisk_statistics.json"
SCHEMA_VERSION = 1
SOURCE = "arXiv:2605.01172"
_PACKAGES = ("hf_poprisk", "torch", "transformers", "accelerate", "trl", "peft", "datasets")
_SETTINGS = "gate estimator ema_alpha kahan exclude label_noise judge_after_epochs leap".split()
# Settings that are gone, with the value that means what the code does now.
_GONE = {"reduction": "element", "gate_weight_decay": False, "warmup_steps": 0}


@dataclass(frozen=True)
class Record:
    """What ``load_record`` gives: the contents of the two files.

    Attributes:
        config: ``poprisk_config.json``.
        statistics: ``poprisk_statistics.json``; None where there is none.
    """

    config: Mapping[str, Any]
    statistics: Mapping[str, Any] | None


def load_record(
    path_or_repo: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> Record:
    """The record of a checkpoint, a saved model, or a repository on the Hub.

    Args:
        path_or_repo: a folder, or the name of a model repository.
        revision: of the repository.
        token: for a private or gated repository; the default is the one you are logged in with.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: one that cannot be read: damaged, or of a later version.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        if folder.is_absolute() or str(path_or_repo).startswith("."):
            raise FileNotFoundError(f"{path_or_repo} is not a folder.")
        wanted = [CONFIG_NAME, STATISTICS_NAME]
        folder = Path(
            snapshot_download(str(path_or_repo), revision=revision, token=token, allow_patterns=wanted)
        )
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{path_or_repo} has no {CONFIG_NAME}: it was not saved by a trainer of hf_poprisk."
        )
    has_statistics = (folder / STATISTICS_NAME).is_file()
    return Record(
        _read(folder / CONFIG_NAME, path_or_repo),
        _read(folder / STATISTICS_NAME, path_or_repo) if has_statistics else None,
    )


def _read(path: Path, where: Any) -> dict[str, Any]:
    damaged = f"{path.name} of {where} is damaged: "
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{damaged}{error}.") from error
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError(f"{damaged}it holds no schema_version.")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path.name} of {where} has schema version {content['schema_version']}, and this version of "
            f"hf_poprisk reads {SCHEMA_VERSION}: update hf_poprisk."
        )
    return content


def make_config(
    args: Any,
    steps: int,
    weights_step: int,
    data: dict[str, Any],
    trainable: dict[str, Any] | None,
    around: str | None = None,
) -> dict[str, Any]:
    """``poprisk_config.json``.

    Args:
        args: training arguments with the gate's fields.
        steps: optimizer steps taken.
        weights_step: that the weights are of; another one after ``load_best_model_at_end``.
        data: what ``describe_data`` says.
        trainable: what ``describe_trainable`` said when the run began.
        around: the class of the optimizer that ``PopRiskGate`` is put around.
    """
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": SOURCE,  # where the method comes from
        "optim": str(getattr(args.optim, "value", args.optim)),  # a stock one in a run without the gate
        **args.gate_options(),  # gate, estimator, ema_alpha, basis, kahan
        "gated": args.gated,
        "around": around,
        "exclude": list(args.poprisk_exclude or ()),
        "label_noise": args.poprisk_label_noise,
        "judge_after_epochs": args.poprisk_judge_after_epochs,
        "leap": args.poprisk_leap,
        "unit": "group" if args.poprisk_estimator == "group" else "example",  # what the gate held out
        "units_per_step": args.units_per_step,  # b of a full step
        "save_only_model": args.save_only_model,
        "layout": {
            "processes": args.world_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "per_device_train_batch_size": args.per_device_train_batch_size,
        },
        "steps": steps,
        "weights_step": weights_step,
        "data": data,
        "trainable": trainable,
        "versions": versions,
    }


def describe_data(dataset: Any, weights: np.ndarray | None = None) -> dict[str, Any]:
    """How many examples there are, and how many labels were altered on purpose (column ``is_flipped``).

    Args:
        weights: of the examples, if they have some, [n] float32; told from others by a digest.
    """
    examples = len(dataset) if has_length(dataset) else None
    columns, altered = getattr(dataset, "column_names", None), None
    if examples is not None and isinstance(columns, list) and "is_flipped" in columns:
        altered = sum(map(bool, dataset["is_flipped"]))
    digest = {} if weights is None else {"weights": hashlib.sha256(weights.tobytes()).hexdigest()[:16]}
    return {"examples": examples, "altered_labels": altered, **digest}


def describe_trainable(names: list[str]) -> dict[str, Any]:
    """How many parameters the optimizer holds, and what tells these from others."""
    text = "\n".join(sorted(names))
    return {"tensors": len(names), "names": hashlib.sha256(text.encode()).hexdigest()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], other_data: bool = False) -> list[str]:
    """What a run would change by going on from another's record, in words.

    Args:
        other_data: the data may have another length.
    """
    gated = now["optim"] == OPTIM or now["gated"]
    pairs = {"poprisk_basis": (before.get("basis", "coordinate"), now["basis"])}  # of any optimizer's moments
    if gated and (before["optim"] == OPTIM or before.get("gated")):
        old = {
            "kahan": False,
            "label_noise": "off",
            "judge_after_epochs": 0,
            "leap": 0.0,
            **before,
        }  # some are older
        pairs |= {f"poprisk_{name}": (old[name], now[name]) for name in _SETTINGS}
        pairs["optim"] = before["optim"], now["optim"]  # whose state it goes on from
        pairs |= {f"{name} (which is gone)": (old.get(name, value), value) for name, value in _GONE.items()}
        if "ema" not in (before["estimator"], now["estimator"]):
            pairs[f"{now['unit']}s per step"] = before["units_per_step"], now["units_per_step"]
    had, has = before["data"]["examples"], now["data"]["examples"]
    if gated and not other_data and None not in (had, has):
        pairs["the number of training examples"] = had, has
    found = [f"{name} from {a!r} to {b!r}" for name, (a, b) in pairs.items() if a != b]
    weights = now["data"].get("weights")
    if (gated or weights is not None) and before["data"].get("weights") != weights:
        found.append("the weights of the examples (poprisk_weight_column)")
    return found


def write_json(path: Path, content: Any) -> None:
    """Write beside the target and rename: a reader never sees half a file.

    Raises:
        OSError: as for any file.
    """
    temporary = path.with_name(f"_{path.name}.{os.getpid()}")  # pushes leave out _*
    try:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
