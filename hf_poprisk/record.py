"""The record beside the weights: how the gate was set, and what it did.

Two JSON files lie in every checkpoint, every saved model and every pushed repository:
``poprisk_config.json`` (``make_config``) and ``poprisk_statistics.json`` (``GateStatistics.of_run``). What is
in them stands at the end of this file. Nothing of it is ever executed, unpickled or used as a path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from transformers.trainer_utils import has_length

from hf_poprisk.gate import GATES
from hf_poprisk.options import ESTIMATORS

CONFIG_NAME = "poprisk_config.json"
STATISTICS_NAME = "poprisk_statistics.json"
SCHEMA_VERSION = 1
SOURCE = "arXiv:2605.01172"
_PACKAGES = ("hf_poprisk", "torch", "transformers", "accelerate", "trl", "peft", "datasets")
_SETTINGS = ("gate", "estimator", "warmup_steps", "ema_alpha", "exclude", "label_noise")
# Settings of version 0.1 that are gone, with the value that means what the code does now.
_GONE = {"reduction": "element", "gate_weight_decay": False}


@dataclass(frozen=True)
class Record:
    """What ``load_record`` gives: the contents of the two files, checked.

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
    folder, name = Path(path_or_repo), str(path_or_repo)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith("."):
            raise FileNotFoundError(f"{name} is not a folder.")
        patterns = [CONFIG_NAME, STATISTICS_NAME]
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{name} has no {CONFIG_NAME}: it was not saved by a trainer of hf_poprisk.")
    has_statistics = (folder / STATISTICS_NAME).is_file()
    return Record(
        _read(folder / CONFIG_NAME, _CONFIG, name),
        _read(folder / STATISTICS_NAME, _STATISTICS, name) if has_statistics else None,
    )


def make_config(args: Any, **of_run: Any) -> dict[str, Any]:
    """``poprisk_config.json``.

    Args:
        args: training arguments with the gate's fields.
        of_run: steps, weights_step, data, trainable.
    """
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
        **of_run,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
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


def digest(names: list[str]) -> dict[str, Any]:
    """The entry ``trainable``: how many names, and what tells these from others."""
    text = "\n".join(sorted(names))
    return {"tensors": len(names), "names": hashlib.sha256(text.encode()).hexdigest()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], other_data: bool = False) -> list[str]:
    """What a run with the gate would change by going on from another's record, in words.

    Args:
        other_data: the data may have another length.
    """
    found = []
    if before["optim"] == now["optim"]:
        old = {"label_noise": "off", **before}  # older than the setting
        pairs = {f"poprisk_{name}": (old[name], now[name]) for name in _SETTINGS}
        pairs |= {f"{name} (of version 0.1)": (old.get(name, value), value) for name, value in _GONE.items()}
        if "ema" not in (before["estimator"], now["estimator"]):
            pairs[f"{now['unit']}s per step"] = before["units_per_step"], now["units_per_step"]
        found = [f"{name} from {a!r:.100} to {b!r:.100}" for name, (a, b) in pairs.items() if a != b]
    had, has = before["data"]["examples"], now["data"]["examples"]
    if None not in (had, has) and had != has and not other_data:
        found.append(f"the number of training examples from {had} to {has}")
    return found + changed_weights(before, now)


def changed_weights(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run would change in the examples' weights by going on from another's record, in words."""
    same = before["data"].get("weights") == now["data"].get("weights")
    return [] if same else ["the weights of the examples (poprisk_weight_column)"]


def write_record(
    folder: str | os.PathLike[str], config: Mapping[str, Any], statistics: Mapping[str, Any] | None
) -> None:
    """Write the two files; without statistics, those of an earlier run are removed."""
    write_json(Path(folder, CONFIG_NAME), config)
    if statistics is None:
        Path(folder, STATISTICS_NAME).unlink(missing_ok=True)
    else:
        write_json(Path(folder, STATISTICS_NAME), {"schema_version": SCHEMA_VERSION, **statistics})


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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A JSON object whose entries have their shapes; anything else is one sentence."""
    damaged = f"{path.name} of {where} is damaged: "
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged}{str(error).splitlines()[0]}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not _fits(version, int):
        raise ValueError(f"{damaged}it holds no schema_version.")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path.name} of {where} has schema version {version}, and this version of hf_poprisk reads "
            f"{SCHEMA_VERSION}: update hf_poprisk."
        )
    for name, shape in schema.items():
        if not _fits(content.get(name), shape):
            raise ValueError(f"{damaged}{name} is {json.dumps(content.get(name))[:60]}.")
    return content


def _fits(value: Any, shape: Any) -> bool:
    """A shape is a type, a literal, [of each], {name: shape}, {str: of each value} or (either, or)."""
    match shape:
        case tuple():
            return any(_fits(value, s) for s in shape)
        case list():
            return isinstance(value, list) and all(_fits(x, shape[0]) for x in value)
        case dict() if str in shape:
            return isinstance(value, dict) and all(_fits(x, shape[str]) for x in value.values())
        case dict():
            return isinstance(value, dict) and all(_fits(value.get(name), s) for name, s in shape.items())
    if shape is int:
        return type(value) is int and 0 <= value < 2**63
    if shape is float:
        return _fits(value, int) or isinstance(value, float) and math.isfinite(value)
    return isinstance(value, shape) if isinstance(shape, type) else value == shape


_CONFIG: dict[str, Any] = {
    "source": str,  # where the method comes from
    "optim": str,  # poprisk_adamw, or the stock optimizer of a run without the gate
    "gate": GATES,
    "estimator": ESTIMATORS,
    "warmup_steps": int,
    "ema_alpha": (float, None),
    "exclude": [str],
    "label_noise": (str, None),  # None in older records, as below
    "unit": ("example", "group"),  # what the gate held out
    "units_per_step": int,  # b of a full step
    "save_only_model": (bool, None),
    "layout": {"processes": int, "gradient_accumulation_steps": int, "per_device_train_batch_size": int},
    "steps": int,  # optimizer steps taken
    "weights_step": int,  # that the weights are of: another one after load_best_model_at_end
    # labels changed on purpose; a digest of the sample weights
    "data": {"examples": (int, None), "altered_labels": (int, None), "weights": (str, None)},
    "trainable": ({"tensors": int, "names": str}, None),  # when the run began
    "versions": {str: str},  # of packages
}
_STATISTICS: dict[str, Any] = {
    "steps_skipped": int,
    "parameters": {
        str: {
            "numel": int,
            "steps": int,
            "examples": int,
            "null": float,
            "sums": [float],
            "fraction_open": float,
            "fraction_open_null": float,
            "margin": (float, None),
        }
    },
    "interval": {"sums": ([float], None), "null": float, "examples": int, "steps": int, "skipped": int},
}
