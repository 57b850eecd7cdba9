"""The numbers of a recorded run that figures and the report show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_poprisk.output_space.dynamics import Split, intervals, nothing, split
from hf_poprisk.output_space.preconditioner import NONE
from hf_poprisk.output_space.recording import Recording, RecordingError

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
        visible: direction → ‖𝒢v‖ of its part in the reservoir over that of the whole, [R]: 0 where the
            reservoir is ker W, more where the spectrum is cut through.
        alignment: [R, r]: the mean squared cosine between the 1, 2, … r leading eigenvectors of the kernel at
            the first record and at each; 1 where the eigenspaces are the first ones, r/N for random ones.
        kernel_change: ‖K − K₀‖/‖K₀‖ of each record, Frobenius, [R].
        stable: whether no step of SGD overshot a mode of the probe's loss.
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
    visible: dict[str, Tensor]
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
    names = set(recording.series) - {"kernel", "cross_kernel", "curvatures"}
    series = {name: torch.stack(recording.series[name]).double() for name in names}
    g, outputs = series["gradients"].flatten(1), series["test_outputs"].flatten(1)
    precision = recording.series["kernel"][0].dtype
    whole = nothing(g.shape[1], outputs.shape[1])
    directions = {"initial error": g[0], **recording.directions}
    directions = {k: v.reshape(-1).double() for k, v in directions.items() if v.any()}
    visible = {name: [0.0] for name in directions}
    cuts, transfer, predicted = [split(whole.gramian, precision)], [whole.transfer @ g[0]], []
    for i, part in enumerate(intervals(recording)):
        whole = whole.then(part)
        if not bool(whole.gramian.isfinite().all() and whole.transfer.isfinite().all()):
            raise RecordingError(
                f"from step {recording.steps[i]} to {recording.steps[i + 1]} the picture of a frozen kernel "
                "diverges, as steps overshot: record more often, or train with a lower learning rate."
            )
        predicted.append(-float(g[i] @ part.gramian @ g[i]))
        cuts.append(split(whole.gramian, precision))
        transfer.append(-(whole.transfer @ g[0]))
        for name, v in directions.items():
            hidden = cuts[-1].vectors[:, cuts[-1].channel :]
            seen = whole.transfer @ torch.stack([hidden @ (hidden.T @ v), v], 1)
            part, all_of_it = seen.norm(dim=0).tolist()
            visible[name].append(part / all_of_it if all_of_it else 0.0)
    if not whole.gramian.any():
        raise RecordingError(
            "nothing moved between the first record and the last: train on, until a learning rate is above 0."
        )
    alignment, kernel_change = _turned(recording.series["kernel"])
    return Analysis(
        steps=torch.tensor(recording.steps),
        losses=series["losses"],
        test_losses=series["test_losses"],
        measured=series["losses"].diff(),
        predicted=torch.tensor(predicted, dtype=torch.float64),
        displacement=outputs - outputs[0],
        transfer=torch.stack(transfer),
        splits=cuts,
        reservoir={
            name: torch.tensor([cut.reservoir_share(value) for cut in cuts])
            for name, value in directions.items()
        },
        visible={name: torch.tensor(values, dtype=torch.float64) for name, values in visible.items()},
        alignment=alignment,
        kernel_change=kernel_change,
        gradients=g,
        stable=whole.stable or recording.preconditioner != NONE,
    )


def _turned(kernels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``alignment`` and ``kernel_change``, a kernel at a time."""
    leading = min(_LEADING, max(1, len(kernels[0]) // 2))
    ranks, first = torch.arange(1, leading + 1), kernels[0].double()
    alignment, change, start = [], [], None
    for kernel in kernels:
        vectors = torch.linalg.eigh(kernel.double()).eigenvectors[:, -leading:].flip(1)
        start = vectors if start is None else start
        cosines = (start.T @ vectors).square()
        alignment.append(cosines.cumsum(0).cumsum(1).diagonal() / ranks)
        change.append((kernel.double() - first).norm() / first.norm())
    return torch.stack(alignment), torch.stack(change)
