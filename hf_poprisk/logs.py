"""The log entries of the gate: what it did between two logs, and over the whole run for every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class _Interval:
    """Sums since the last log."""

    sums: Tensor | None = None  # [4]: openness, live coordinates, ΣG², ΣQ
    null: float = 0.0
    examples: int = 0
    steps: int = 0
    skipped: int = 0


class GateStatistics:
    """Sums on the device; read once per logging interval and once per save, so no step waits for them."""

    def __init__(self) -> None:
        self._interval = _Interval()
        self._skipped = 0  # in the run
        # of the run, one row per parameter, whichever have a gradient together
        self._rows: dict[Tensor, int] = {}
        self._sums = torch.zeros(0, 4, dtype=torch.float64)
        self._counts = torch.zeros(0, 3, dtype=torch.float64)  # null, steps, examples; not on the device

    def add(self, params: Sequence[Tensor], sums: Tensor, null: float, num_examples: int | None) -> None:
        """Record one gated step.

        Args:
            params: the P parameters that had a gradient.
            sums: [P, 4] float tensor: Σ q over live coordinates (``Q > 0``), the number of live
                coordinates, ΣG², ΣQ. Live because a coordinate that no example touched has nothing to
                open: LoRA's first step, tokens that do not occur.
            null: the mean openness of pure noise at this step.
            num_examples: b, or None where the estimator has no examples.
        """
        now, total = self._interval, sums.sum(0)
        now.sums = total if now.sums is None else now.sums.to(total.device) + total
        now.null += null
        now.examples += num_examples or 0
        now.steps += 1
        self._add_to_run(params, sums, [null, 1, num_examples or 0])

    def _add_to_run(self, params: Sequence[Tensor], sums: Tensor, counts: Sequence[float]) -> None:
        """sums: [P, 4]; the counts are the same for each of the P parameters."""
        rows = [self._rows.setdefault(p, len(self._rows)) for p in params]
        self._sums = self._sums.to(sums.device)
        if (new := len(self._rows) - len(self._sums)) > 0:
            self._sums, self._counts = (pad(x, (0, 0, 0, new)) for x in (self._sums, self._counts))
        # nearly always all of them, in order
        where = slice(None) if rows == list(range(len(self._rows))) else torch.tensor(rows)
        self._sums[where] += sums
        self._counts[where] += torch.tensor(counts, dtype=torch.float64)

    def skip(self) -> None:
        """Record a step that was left out because its gradient was not finite."""
        self._interval.skipped += 1
        self._skipped += 1

    def pop(self, unit: str) -> dict[str, float]:
        """The log entries since the last call, under ``poprisk/``; empty if no step was gated.

        Args:
            unit: what one leave-one-out unit is called in the log, ``examples`` or ``groups``; the
                entry and the margin are left out when no step had any. The noise scale is in examples, and
                left out where no signal was seen.
        """
        logs: dict[str, float] = {}
        ended, self._interval = self._interval, _Interval()
        if ended.sums is not None:
            openness, live, energy, sq_sum = ended.sums.tolist()
            logs["poprisk/fraction_open"] = openness / live if live else 0.0
            logs["poprisk/fraction_open_null"] = ended.null / ended.steps
            if ended.examples:
                b = ended.examples / ended.steps
                logs[f"poprisk/{unit}"] = b
                logs["poprisk/margin"] = _margin(b, energy, sq_sum)
                if unit == "examples" and energy > sq_sum:
                    logs["poprisk/noise_scale"] = noise_scale(b, energy, sq_sum)
        if ended.skipped:
            logs["poprisk/steps_skipped"] = float(ended.skipped)
        return logs

    def of_run(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """The whole run so far, as plain values for a JSON file; ``load`` takes it back.

        Returns:
            ``steps_skipped``; ``parameters``: name → ``numel``, ``steps`` with a gradient,
            ``fraction_open``, ``fraction_open_null``, ``margin`` (None where the estimator has no
            examples) and the ``sums`` they come from; ``interval``: what the next log will hold.
        """
        parameters: dict[str, Any] = {}
        for p, sums, counts in zip(self._rows, self._sums.tolist(), self._counts.tolist(), strict=True):
            if p not in names:
                continue
            (openness, live, energy, sq_sum), (null, steps, examples) = sums, counts
            parameters[names[p]] = {
                "numel": p.numel(),
                "steps": int(steps),
                "examples": int(examples),
                "null": null,
                "sums": sums,
                "fraction_open": openness / live if live else 0.0,
                "fraction_open_null": null / steps,
                "margin": _margin(examples / steps, energy, sq_sum) if examples else None,
            }
        sums = self._interval.sums
        interval = {**vars(self._interval), "sums": None if sums is None else sums.tolist()}
        return {"steps_skipped": self._skipped, "parameters": parameters, "interval": interval}

    def load(self, saved: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Go on from ``of_run``, once and first; what ``params`` (name → parameter) lacks is left out."""
        self._skipped = saved["steps_skipped"]
        for name, entry in saved["parameters"].items():
            if name in params:
                sums = torch.tensor([entry["sums"]], dtype=torch.float64)
                self._add_to_run([params[name]], sums, [entry["null"], entry["steps"], entry["examples"]])
        self._interval = _Interval(**saved["interval"])
        if saved["interval"]["sums"] is not None:
            self._interval.sums = torch.tensor(saved["interval"]["sums"])


def noise_scale(b: float, energy: float, sq_sum: float) -> float:
    """The simple noise scale ``tr(Σ)/|g|²`` of McCandlish et al. 2018 (arXiv:1812.06162, section 2.2).

    With Σ the covariance of the examples' gradients and g its mean, both estimated without bias from the
    examples of a step: ``tr(Σ) = b(bΣQ − ΣG²)/(b − 1)`` and ``|g|² = b(ΣG² − ΣQ)/(b − 1)``. Above b = 1 and
    where ΣG² > ΣQ; in examples: at batches well below it a larger one saves steps, well above it few.
    """
    return (b * sq_sum - energy) / (energy - sq_sum)


def _margin(b: float, energy: float, sq_sum: float) -> float:
    """The share of the squared gradient norm that the other examples confirm."""
    return b / (b - 1) * (energy - sq_sum) / energy if energy and b > 1 else 0.0
