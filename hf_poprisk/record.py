"""The record beside the weights: how the gate was set, and what it did.

Two JSON files lie in every checkpoint, every saved model and every pushed repository. Nothing in them is
ever executed, unpickled or used as a path.

``poprisk_config.json``, schema version 1::

    schema_version       1
    source               "arXiv:2605.01172", where the method comes from
    optim                "poprisk_adamw", or the stock optimizer of a run without the gate
    gate, estimator, warmup_steps, ema_alpha, exclude, label_noise
                         the options, as the poprisk_ fields of the training arguments
    unit                 "example" or "group": what the gate held out
    units_per_step       b of a full step
    save_only_model      the argument; null in records of before
    layout               processes, gradient_accumulation_steps, per_device_train_batch_size
    steps                optimizer steps taken
    weights_step         the step that the weights are of: another one after load_best_model_at_end
    data                 examples; altered_labels, the number whose label was changed on purpose, or null
    trainable            tensors, how many were trained when the run began; names, a digest of their names;
                         null before training and in records of before
    versions             package → version

``poprisk_statistics.json``, schema version 1: ``GateStatistics.of_run``, per parameter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from hf_poprisk.gate import GATES
from hf_poprisk.options import ESTIMATORS

CONFIG_NAME = "poprisk_config.json"
STATISTICS_NAME = "poprisk_statistics.json"
SCHEMA_VERSION = 1
SOURCE = "arXiv:2605.01172"
_MAX_BYTES = 32 << 20  # a thousand times what a large model needs
_MAX_INT = 2**63


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
    folder = Path(path_or_repo)
    if folder.is_dir():
        files = [folder / CONFIG_NAME, folder / STATISTICS_NAME]
        found = [path if path.is_file() else None for path in files]
    elif Path(path_or_repo).is_absolute() or str(path_or_repo).startswith("."):
        raise FileNotFoundError(f"{path_or_repo} is not a folder.")
    else:
        found = [
            _download(str(path_or_repo), name, revision, token) for name in (CONFIG_NAME, STATISTICS_NAME)
        ]
    config, statistics = found
    if config is None:
        raise FileNotFoundError(
            f"{path_or_repo} has no {CONFIG_NAME}: it was not saved by a trainer of hf_poprisk."
        )
    return Record(
        _read(config, _CONFIG, str(path_or_repo)),
        None if statistics is None else _read(statistics, _STATISTICS, str(path_or_repo)),
    )


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


def _download(repo: str, name: str, revision: str | None, token: str | None) -> Path | None:
    try:
        return Path(hf_hub_download(repo, name, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(repo, name, revision=revision) is _CACHED_NO_EXIST:
            return None
        raise FileNotFoundError(
            f"{name} of {repo} was not downloaded before, and the Hub cannot be reached."
        ) from error


def _read(path: Path, schema: Mapping[str, Callable[[Any], bool]], where: str) -> dict[str, Any]:
    """A JSON object whose entries pass their checks; anything else is one sentence."""

    def damaged(why: str) -> ValueError:
        return ValueError(f"{path.name} of {where} is damaged: {why}.")

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a number")

    if path.stat().st_size > _MAX_BYTES:
        raise damaged(f"it is larger than {_MAX_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, integers without end, NaN
        raise damaged(f"{str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not _count(content.get("schema_version")):
        raise damaged("it holds no schema_version")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path.name} of {where} has schema version {content['schema_version']}, and this version of "
            f"hf_poprisk reads {SCHEMA_VERSION}: update hf_poprisk."
        )
    for name, passes in schema.items():
        if not passes(content.get(name)):
            raise damaged(f"{name} is {json.dumps(content.get(name))[:60]}")
    return content


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_INT


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return _count(value) or isinstance(value, float) and math.isfinite(value)


def _optional(passes: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or passes(value)


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000


def _list_of(passes: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and all(map(passes, value)) and (length is None or len(value) == length)
    )


def _entries(**schema: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(ok(value.get(name)) for name, ok in schema.items())


def _values(passes: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(passes, value.values()))


_sums = _list_of(_number, 4)
_CONFIG: dict[str, Callable[[Any], bool]] = {
    "source": _text,
    "optim": _text,
    "gate": _one_of(*GATES),
    "estimator": _one_of(*ESTIMATORS),
    "reduction": _optional(_text),  # of version 0.1
    "warmup_steps": _count,
    "gate_weight_decay": _optional(_flag),  # of version 0.1
    "ema_alpha": _optional(_number),
    "exclude": _list_of(_text),
    "label_noise": _optional(_text),
    "unit": _one_of("example", "group"),
    "units_per_step": _count,
    "save_only_model": _optional(_flag),
    "layout": _entries(
        processes=_count, gradient_accumulation_steps=_count, per_device_train_batch_size=_count
    ),
    "steps": _count,
    "weights_step": _count,
    "data": _entries(examples=_optional(_count), altered_labels=_optional(_count)),
    "trainable": _optional(_entries(tensors=_count, names=_text)),
    "versions": _values(_text),
}
_STATISTICS: dict[str, Callable[[Any], bool]] = {
    "steps_skipped": _count,
    "parameters": _values(
        _entries(
            numel=_count,
            steps=lambda value: _count(value) and value > 0,
            examples=_count,
            null=_number,
            sums=_sums,
            fraction_open=_number,
            fraction_open_null=_number,
            margin=_optional(_number),
        )
    ),
    "interval": _entries(sums=_optional(_sums), null=_number, examples=_count, steps=_count, skipped=_count),
}
