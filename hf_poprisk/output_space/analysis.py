"""The numbers of a recorded run that the report and the experiments show."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from hf_poprisk.output_space.dynamics import Evolution, intervals, nothing, split
from hf_poprisk.output_space.preconditioner import NONE
from hf_poprisk.output_space.recording import Recording, RecordingError


class Analysis:
    """R records, N probe outputs, M test outputs; float64. Some eigendecompositions of N × N per record.

    Attributes:
        steps: optimizer steps before each record, [R].
        losses, test_losses: Φ on the probe and on the test examples, [R].
        gradients: g of each record, [R, N].
        measured, predicted: the change of Φ from each record to the next, and −gᵀWg, [R − 1].
        displacement, transfer: the test outputs' way from the first record to each, real and −𝒢 g, [R, M].
        transfer_error: ‖predicted − real‖/‖real‖ of it, of each record after the first, [R − 1].
        evolutions, splits: from the first record to each, and channel and reservoir of their W; R of them.
        error_by_mode: (vᵢᵀ g)² of each record along the eigenvectors of the last W, [R, N].
        reservoir: direction → its share in the reservoir, [R]; ``initial error`` is g at the first record.
        visible: direction → ‖𝒢v‖ of its part in the reservoir over that of the whole, [R]: 0 where the
            reservoir is ker W, more where the spectrum is cut through.
        leading, alignment: so many leading eigenvectors of the kernel, and their mean squared cosine with
            those of the first record, [R]: 1 where they span the same space.
        kernel_change: ‖K − K₀‖/‖K₀‖ of each record, Frobenius, [R].
        stable: whether no step of SGD overshot a mode of the probe's loss.

    Raises:
        RecordingError: nothing moved, or a Gramian is not finite, as steps were far too large.
    """

    def __init__(self, recording: Recording) -> None:
        self.steps = torch.tensor(recording.steps)
        self.losses, self.test_losses, kernels, gradients, outputs = (
            torch.stack(recording.series[name]).double()
            for name in ("losses", "test_losses", "kernel", "gradients", "test_outputs")
        )
        self.gradients, outputs = gradients.flatten(1), outputs.flatten(1)
        self.displacement, self.measured = outputs - outputs[0], self.losses.diff()
        parts, g = list(intervals(recording)), self.gradients
        start = nothing(g.shape[1], outputs.shape[1])
        self.evolutions = list(accumulate(parts, Evolution.then, initial=start))
        self._check(recording)
        self.predicted = torch.stack([-(u @ part.gramian @ u) for u, part in zip(g, parts, strict=False)])
        self.transfer = torch.stack([-(whole.transfer @ g[0]) for whole in self.evolutions])
        gap, real = self.transfer - self.displacement, self.displacement[1:]
        self.transfer_error = gap[1:].norm(dim=1) / real.norm(dim=1).clamp(min=1e-300)
        self.stable = self.evolutions[-1].stable or recording.preconditioner != NONE
        self.splits = [split(e.gramian, recording.series["kernel"][0].dtype) for e in self.evolutions]
        self.error_by_mode = (g @ self.splits[-1].vectors).square()
        directions = {"initial error": g[0], **recording.directions}
        directions = {name: v.reshape(-1).double() for name, v in directions.items() if v.any()}
        self.reservoir = {
            name: torch.tensor([cut.reservoir_share(v) for cut in self.splits], dtype=torch.float64)
            for name, v in directions.items()
        }
        self.visible = {name: self._visible(v) for name, v in directions.items()}
        self.kernel_change = (kernels - kernels[0]).norm(dim=(1, 2)) / kernels[0].norm()
        self.leading = min(20, max(1, g.shape[1] // 2))
        spaces = torch.linalg.eigh(kernels).eigenvectors[:, :, -self.leading :]
        self.alignment = (spaces[0].T @ spaces).square().sum((1, 2)) / self.leading

    def _check(self, recording: Recording) -> None:
        for i, whole in enumerate(self.evolutions):
            if not (whole.gramian.isfinite().all() and whole.transfer.isfinite().all()):
                raise RecordingError(
                    f"from step {recording.steps[i - 1]} to {recording.steps[i]} the picture of a frozen "
                    "kernel diverges, as steps overshot: record more often, or train with a lower learning "
                    "rate."
                )
        if not self.evolutions[-1].gramian.any():
            raise RecordingError(
                "nothing moved between the first record and the last: train on, until a learning rate is "
                "above 0."
            )

    def _visible(self, v: Tensor) -> Tensor:
        """``visible`` of one direction [N]."""
        found = []
        for whole, cut in zip(self.evolutions, self.splits, strict=True):
            hidden = cut.vectors[:, cut.channel :]
            part, all_of_it = (whole.transfer @ torch.stack([hidden @ (hidden.T @ v), v], 1)).norm(dim=0)
            found.append(part / all_of_it if all_of_it else torch.zeros_like(part))
        return torch.stack(found)
