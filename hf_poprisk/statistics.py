"""What the gate did: between two logs, and over the whole run for every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class _Run:
    """Sums over a run of the parameters of one device, one row each, whichever have a gradient together."""

    def __init__(self, device: torch.device) -> None:
        self.params: list[Tensor] = []
        self.sums = torch.zeros(0, 4, dtype=torch.float64, device=device)
        self.nulls: list[float] = []
        self.steps: list[int] = []
        self.examples: list[int] = []
        self._rows: dict[Tensor, int] = {}

    def add(self, params: Sequence[Tensor], sums: Tensor, null: float, steps: int, examples: int) -> None:
        """sums: [P, 4]; the rest is the same for each of the P parameters."""
        for p in params:
            if p not in self._rows:
                self._rows[p] = len(self.params)
                self.params.append(p)
                for column in (self.nulls, self.steps, self.examples):
                    column.append(0)
        if (missing := len(self.params) - len(self.sums)) > 0:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, 4)])
        rows = [self._rows[p] for p in params]
        if rows == list(range(len(self.params))):  # nearly always
            self.sums += sums
        else:
            self.sums.index_add_(0, torch.tensor(rows, device=self.sums.device), sums.double())
        for row in rows:
            self.nulls[row] += null
            self.steps[row] += steps
            self.examples[row] += examples


class GateStatistics:
    """Sums on the device; read once per logging interval and once per save, so no step waits for them."""

    def __init__(self) -> None:
        self._run: dict[torch.device, _Run] = {}
        self._skipped_of_run = 0
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._sums: Tensor | None = None  # [4]: openness, live coordinates, ΣG², Σ Q
        self._null = 0.0
        self._examples = 0
        self._steps = 0
        self._skipped = 0

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
        total = sums.sum(0)
        self._sums = total if self._sums is None else self._sums.to(total.device) + total
        self._null += null
        self._examples += num_examples or 0
        self._steps += 1
        self._run_on(sums.device).add(params, sums, null, 1, num_examples or 0)

    def _run_on(self, device: torch.device) -> _Run:
        return self._run.setdefault(device, _Run(device))

    def skip(self) -> None:
        """Record a step that was left out because its gradient was not finite."""
        self._skipped += 1
        self._skipped_of_run += 1

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
                logs["poprisk/margin"] = _margin(b, energy, sq_sum)
        if self._skipped:
            logs["poprisk/steps_skipped"] = float(self._skipped)
        self._clear_interval()
        return logs

    def of_run(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """The whole run so far, as plain values for a JSON file; ``load`` takes it back.

        Returns:
            ``steps_skipped``; ``parameters``: name → ``numel``, ``steps`` with a gradient,
            ``fraction_open``, ``fraction_open_null``, ``margin`` (None where the estimator has no
            examples) and the ``sums`` they come from; ``interval``: what the next log will hold.
        """
        parameters: dict[str, Any] = {}
        for run in self._run.values():
            rows = zip(run.params, run.sums.tolist(), run.nulls, run.steps, run.examples, strict=True)
            for p, sums, null, steps, examples in rows:
                if p not in names:
                    continue
                entry = parameters.setdefault(
                    names[p], {"numel": p.numel(), "steps": 0, "examples": 0, "null": 0.0, "sums": [0.0] * 4}
                )
                entry["steps"] += steps
                entry["examples"] += examples
                entry["null"] += null
                entry["sums"] = [a + b for a, b in zip(entry["sums"], sums, strict=True)]
        for entry in parameters.values():
            openness, live, energy, sq_sum = entry["sums"]
            b = entry["examples"] / entry["steps"]
            entry["fraction_open"] = openness / live if live else 0.0
            entry["fraction_open_null"] = entry["null"] / entry["steps"]
            entry["margin"] = _margin(b, energy, sq_sum) if b else None
        interval = {
            "sums": None if self._sums is None else self._sums.tolist(),
            **{name: getattr(self, f"_{name}") for name in ("null", "examples", "steps", "skipped")},
        }
        return {"steps_skipped": self._skipped_of_run, "parameters": parameters, "interval": interval}

    def load(self, saved: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Go on from ``of_run``; parameters that ``params`` (name → parameter) lacks are left out."""
        self.__init__()  # type: ignore[misc]
        self._skipped_of_run = saved["steps_skipped"]
        for name, entry in saved["parameters"].items():
            if name in params:
                p = params[name]
                sums = torch.tensor([entry["sums"]], dtype=torch.float64, device=p.device)
                run = self._run_on(p.device)
                run.add([p], sums, entry["null"], entry["steps"], entry["examples"])
        interval = saved["interval"]
        self._sums = None if interval["sums"] is None else torch.tensor(interval["sums"])
        self._null, self._examples = interval["null"], interval["examples"]
        self._steps, self._skipped = interval["steps"], interval["skipped"]


def _margin(b: float, energy: float, sq_sum: float) -> float:
    """The share of the squared gradient norm that the other examples confirm."""
    return b / (b - 1) * (energy - sq_sum) / energy if energy and b > 1 else 0.0
