"""What a run left of its output space: one file, read and written whole.

``output_space.safetensors`` in the output folder, schema version 1, with n probe examples, m test examples,
k outputs per example, N = n·k, M = m·k, R records and T optimizer steps::

    steps               [R] int64       optimizer steps taken before the record, ascending
    learning_rates      [T] float64     of every optimizer step, of the first parameter group; 0 if left out
    kernel              [R, N, N]       K_P = J P Jᵀ on the probe, in the dtype of the outputs
    cross_kernel        [R, M, N]       K_QS = J_Q P J_Sᵀ, test against probe
    outputs             [R, n, k]       u
    test_outputs        [R, m, k]       U_Q
    gradients           [R, n, k]       g = ∇Φ(u), Φ the mean of the examples' losses
    curvatures          [R, n, k, k]    the blocks of B = ∇²Φ(u)
    losses, test_losses [R]             Φ on the probe and on the test examples
    directions.NAME     [n, k]          a direction in output space that the user named

and the metadata ``schema_version``, ``rule`` (``gradient descent`` or ``flow``), ``optimizer`` (in words) and
``preconditioner`` (``none``, ``adam``, ``gated adam``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_poprisk.user_errors import UserError, folder_beside

FILE_NAME = "output_space.safetensors"
SCHEMA_VERSION = "1"
GRADIENT_DESCENT, FLOW = "gradient descent", "flow"
SERIES = tuple("kernel cross_kernel outputs test_outputs gradients curvatures losses test_losses".split())
_META = ("rule", "optimizer", "preconditioner")
_DIRECTION = "directions."


class RecordingError(UserError):
    """Something the user can put right, said in one sentence."""


@dataclass
class Recording:
    """A run in output space; shapes and meanings are in the module's text.

    Attributes:
        rule: how steps moved the outputs: ``gradient descent`` if every step was full-batch gradient descent
            on the probe, else ``flow``: its limit of small steps, for mini-batches, momentum and Adam.
        series: the tensors with one entry per record, as lists of R.
    """

    rule: str
    optimizer: str
    preconditioner: str
    directions: dict[str, Tensor] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    series: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in SERIES})

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        self.steps.append(step)
        for name in SERIES:
            self.series[name].append(values[name].detach().cpu())

    def save(self, folder: Path) -> None:
        """Write the file beside its place and rename it: a reader never sees half of it."""
        tensors = {name: torch.stack(values) for name, values in self.series.items()}
        tensors["steps"] = torch.tensor(self.steps)
        tensors["learning_rates"] = torch.tensor(self.learning_rates, dtype=torch.float64)
        tensors |= {_DIRECTION + name: value.contiguous() for name, value in self.directions.items()}
        metadata = {"schema_version": SCHEMA_VERSION} | {name: getattr(self, name) for name in _META}
        with folder_beside(folder / FILE_NAME) as beside:
            save_file(tensors, beside / FILE_NAME, metadata)
            (beside / FILE_NAME).replace(folder / FILE_NAME)


def load_recording(folder: str | os.PathLike[str]) -> Recording:
    """The recording in an output folder.

    Raises:
        RecordingError: there is none, or one that cannot be read.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise RecordingError(
            f"{folder} holds no {FILE_NAME}: train into it with callbacks=[OutputSpaceCallback(...)]."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RecordingError(f"{path} is damaged ({error}): record the run again.") from error
    needed = {"steps", "learning_rates", *SERIES, *_META}
    if metadata.get("schema_version") != SCHEMA_VERSION or not needed <= tensors.keys() | metadata.keys():
        raise RecordingError(f"{path} is not a recording that this version of hf_poprisk reads.")
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise RecordingError(f"{path} holds numbers that are not finite: record the run again.")
    return Recording(
        **{name: metadata[name] for name in _META},
        directions={k.removeprefix(_DIRECTION): v for k, v in tensors.items() if k.startswith(_DIRECTION)},
        steps=tensors["steps"].tolist(),
        learning_rates=tensors["learning_rates"].tolist(),
        series={name: list(tensors[name]) for name in SERIES},
    )
