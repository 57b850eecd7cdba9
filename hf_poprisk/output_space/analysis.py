"""The numbers of a recorded run that figures and the report show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_poprisk.output_space.dynamics import Split, cumulative, intervals, split
from hf_poprisk.output_space.recording import Recording

_LEADING = 20  # eigenvectors of the kernel that are followed


@dataclass(frozen=True)
class Analysis:
    """R records, N probe outputs, M test outputs; float64.

    Attributes:
        steps: optimizer steps before each record, [R].
        losses, test_losses: Φ on the probe and on the test examples, [R].
        measured, predicted: the change of Φ from each record to the next, and −gᵀWg, [R − 1].
        displacement, transfer: the test outputs' way from the first record to each, real and −𝒢 g, [R, M].
        splits: channel and reservoir of W from the first record to each, R of them.
        reservoir: direction → its share in the reservoir, [R]; ``initial error`` is g at the first record.
        alignment: [R, r]: the mean squared cosine between the 1, 2, … r leading eigenvectors of the kernel at
            the first record and at each.
        kernel_change: ‖K − K₀‖/‖K₀‖ of each record, Frobenius, [R].
        stable: whether no step overshot a mode of the probe's loss.
    """

    steps: Tensor
    losses: Tensor
    test_losses: Tensor
    measured: Tensor
    predicted: Tensor
    displacement: Tensor
    transfer: Tensor
    splits: list[Split]
    reservoir: dict[str, Tensor]
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
    """Everything in one pass; some eigendecompositions of N × N per record."""
    series = {name: torch.stack(values).double() for name, values in recording.series.items()}
    g, count = series["gradients"].flatten(1), len(recording.steps)
    evolutions, parts = cumulative(recording), list(intervals(recording))
    cuts = [split(e.gramian, recording.series["kernel"][0].dtype) for e in evolutions]
    outputs, kernels = series["test_outputs"].flatten(1), series["kernel"]
    directions = {"initial error": g[0], **recording.directions}
    return Analysis(
        steps=torch.tensor(recording.steps),
        losses=series["losses"],
        test_losses=series["test_losses"],
        measured=series["losses"].diff(),
        predicted=torch.tensor([-float(g[i] @ part.gramian @ g[i]) for i, part in enumerate(parts)]).double(),
        displacement=outputs - outputs[0],
        transfer=torch.stack([-(e.transfer @ g[0]) for e in evolutions]),
        splits=cuts,
        reservoir={
            name: torch.tensor([cut.reservoir_share(value) for cut in cuts])
            for name, value in directions.items()
            if value.any()
        },
        alignment=_alignment(kernels, min(_LEADING, max(1, kernels.shape[1] // 2))),
        kernel_change=(kernels - kernels[0]).flatten(1).norm(dim=1) / kernels[0].norm(),
        gradients=g[:count],
        stable=evolutions[-1].stable,
    )


def _alignment(kernels: Tensor, leading: int) -> Tensor:
    """[R, leading]: 1 where the eigenspaces are the first ones, r/N for random ones."""
    vectors = torch.linalg.eigh(kernels).eigenvectors[:, :, -leading:].flip(2)
    cosines = (vectors[0].T @ vectors).square()  # [R, leading, leading]
    ranks = torch.arange(1, leading + 1)
    return cosines.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2) / ranks
