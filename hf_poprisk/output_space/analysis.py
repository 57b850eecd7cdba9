"""The numbers of a recorded run that the report and the experiments show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hf_poprisk.output_space.dynamics import Evolution, Split, intervals, nothing, split
from hf_poprisk.output_space.preconditioner import NONE
from hf_poprisk.output_space.recording import Recording, RecordingError


@dataclass(frozen=True)
class Analysis:
    """R records, N probe outputs, M test outputs; float64.

    Attributes:
        steps: optimizer steps before each record, [R].
        losses, test_losses: Φ on the probe and on the test examples, [R].
        measured, predicted: the change of Φ from each record to the next, and −gᵀWg, [R − 1].
        displacement, transfer: the test outputs' way from the first record to each, real and −𝒢 g, [R, M].
        evolutions, splits: from the first record to each, and channel and reservoir of their W; R of them.
        reservoir: direction → its share in the reservoir, [R]; ``initial error`` is g at the first record.
        visible: direction → ‖𝒢v‖ of its part in the reservoir over that of the whole, [R]: 0 where the
            reservoir is ker W, more where the spectrum is cut through.
        leading: how many leading eigenvectors of the kernel are followed.
        alignment: their mean squared cosine with those of the first record, [R]; 1: they span the same space.
        kernel_change: ‖K − K₀‖/‖K₀‖ of each record, Frobenius, [R].
        gradients: g of each record, [R, N].
        stable: whether no step of SGD overshot a mode of the probe's loss.
    """

    steps: Tensor
    losses: Tensor
    test_losses: Tensor
    measured: Tensor
    predicted: Tensor
    displacement: Tensor
    transfer: Tensor
    evolutions: list[Evolution]
    splits: list[Split]
    reservoir: dict[str, Tensor]
    visible: dict[str, Tensor]
    leading: int
    alignment: Tensor
    kernel_change: Tensor
    gradients: Tensor
    stable: bool

    @property
    def transfer_error(self) -> Tensor:
        """‖predicted − real‖/‖real‖ of the test displacement at each record after the first, [R − 1]."""
        real = self.displacement[1:]
        return (self.transfer[1:] - real).norm(dim=1) / real.norm(dim=1).clamp(min=1e-300)

    @property
    def error_by_mode(self) -> Tensor:
        """(vᵢᵀ g)² of each record along the eigenvectors of the last W, [R, N]."""
        return (self.gradients @ self.splits[-1].vectors).square()


def analyse(recording: Recording) -> Analysis:
    """Everything in one pass; some eigendecompositions of N × N per record.

    Raises:
        RecordingError: nothing moved, or a Gramian is not finite, as steps were far too large.
    """
    names = ("gradients", "test_outputs", "losses", "test_losses")
    g, outputs, losses, test_losses = (torch.stack(recording.series[name]).double() for name in names)
    g, outputs = g.flatten(1), outputs.flatten(1)
    parts = list(intervals(recording))
    start = nothing(g.shape[1], outputs.shape[1])
    evolutions = list(accumulate(parts, Evolution.then, initial=start))
    for i, whole in enumerate(evolutions):
        if not (whole.gramian.isfinite().all() and whole.transfer.isfinite().all()):
            raise RecordingError(
                f"from step {recording.steps[i - 1]} to {recording.steps[i]} the picture of a frozen kernel "
                "diverges, as steps overshot: record more often, or train with a lower learning rate."
            )
    if not evolutions[-1].gramian.any():
        raise RecordingError(
            "nothing moved between the first record and the last: train on, until a learning rate is above 0."
        )
    splits = [split(whole.gramian, recording.series["kernel"][0].dtype) for whole in evolutions]
    directions = {"initial error": g[0], **recording.directions}
    directions = {name: v.reshape(-1).double() for name, v in directions.items() if v.any()}
    leading = min(20, max(1, g.shape[1] // 2))
    alignment, kernel_change = _turned(recording.series["kernel"], leading)
    return Analysis(
        steps=torch.tensor(recording.steps),
        losses=losses,
        test_losses=test_losses,
        measured=losses.diff(),
        predicted=torch.stack([-(u @ part.gramian @ u) for u, part in zip(g, parts, strict=False)]),
        displacement=outputs - outputs[0],
        transfer=torch.stack([-(whole.transfer @ g[0]) for whole in evolutions]),
        evolutions=evolutions,
        splits=splits,
        reservoir={
            k: torch.tensor([cut.reservoir_share(v) for cut in splits]) for k, v in directions.items()
        },
        visible={k: _visible(v, evolutions, splits) for k, v in directions.items()},
        leading=leading,
        alignment=alignment,
        kernel_change=kernel_change,
        gradients=g,
        stable=evolutions[-1].stable or recording.preconditioner != NONE,
    )


def _visible(v: Tensor, evolutions: Sequence[Evolution], splits: Sequence[Split]) -> Tensor:
    """``visible`` of one direction [N]."""
    found = []
    for whole, cut in zip(evolutions, splits, strict=True):
        hidden = cut.vectors[:, cut.channel :]
        part, all_of_it = (whole.transfer @ torch.stack([hidden @ (hidden.T @ v), v], 1)).norm(dim=0)
        found.append(part / all_of_it if all_of_it else torch.zeros_like(part))
    return torch.stack(found)


def _turned(kernels: Sequence[Tensor], leading: int) -> tuple[Tensor, Tensor]:
    """``alignment`` and ``kernel_change``, a kernel at a time."""
    first, start = kernels[0].double(), None
    alignment, change = [], []
    for kernel in kernels:
        vectors = torch.linalg.eigh(kernel.double()).eigenvectors[:, -leading:]
        start = vectors if start is None else start
        alignment.append((start.T @ vectors).square().sum() / leading)
        change.append((kernel.double() - first).norm() / first.norm())
    return torch.stack(alignment), torch.stack(change)
