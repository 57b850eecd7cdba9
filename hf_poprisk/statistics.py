"""What the gate did, averaged over the steps between two logs."""

from __future__ import annotations

from torch import Tensor


class GateStatistics:
    """Sums on the device; read once per logging interval, so no step waits for them."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [4]: openness, live coordinates, ΣG², Σ Q
        self._null = 0.0
        self._examples = 0
        self._steps = 0
        self._skipped = 0

    def add(self, sums: Tensor, null: float, num_examples: int | None) -> None:
        """Record one gated step.

        Args:
            sums: [4] float tensor: Σ q over live coordinates (``Q > 0``), the number of live
                coordinates, ΣG², ΣQ. Live because a coordinate that no example touched has nothing to
                open: LoRA's first step, tokens that do not occur.
            null: the mean openness of pure noise at this step.
            num_examples: b, or None where the estimator has no examples.
        """
        self._sums = sums if self._sums is None else self._sums + sums
        self._null += null
        self._examples += num_examples or 0
        self._steps += 1

    def skip(self) -> None:
        """Record a step that was left out because its gradient was not finite."""
        self._skipped += 1

    def pop(self, unit: str) -> dict[str, float]:
        """The log entries since the last call, under ``poprisk/``; empty if no step was gated.

        Args:
            unit: what one leave-one-out unit is called in the log, ``examples`` or ``groups``; the
                entry and the margin are left out when no step had any.
        """
        logs: dict[str, float] = {}
        if self._steps and self._sums is not None:
            openness, live, energy, sq_sum = self._sums.tolist()
            logs["poprisk/fraction_open"] = openness / live if live else 0.0
            logs["poprisk/fraction_open_null"] = self._null / self._steps
            if self._examples:
                b = self._examples / self._steps
                logs[f"poprisk/{unit}"] = b
                # share of the squared gradient norm that the other examples confirm
                logs["poprisk/margin"] = b / (b - 1) * (energy - sq_sum) / energy if energy else 0.0
        if self._skipped:
            logs["poprisk/steps_skipped"] = float(self._skipped)
        self.__init__()  # type: ignore[misc]
        return logs
