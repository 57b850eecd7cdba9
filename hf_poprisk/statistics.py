"""What the gate did: between two logs, and over the whole run for every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Set(NamedTuple):
    """Some parameters, by id (the statistics hold them, so that it stays theirs), and their rows."""

    key: list[int]
    here: Tensor  # rows, on the CPU
    there: Tensor  # and on the device
    numel: Tensor


class GateStatistics:
    """Sums on the device; read once per logging interval and once per save, so no step waits for them."""

    def __init__(self) -> None:
        self._rows: dict[Tensor, int] = {}  # parameter → its row in the two tables of the run
        self._run_sums: Tensor | None = None  # [rows, 4] float64, on the device
        self._run_counts = torch.zeros(0, 3, dtype=torch.float64)  # steps, examples, Σ null: on the CPU
        self._last: _Set | None = None  # of the last step
        self._skipped_of_run = 0
        self._clear_interval()

    def _clear_interval(self) -> None:
        self._sums: Tensor | None = None  # [4]: openness, live coordinates, ΣG², Σ Q
        self._null = 0.0
        self._examples = 0
        self._steps = 0
        self._skipped = 0

    def add(
        self, params: Sequence[Tensor], sums: Tensor, nulls: Sequence[float], num_examples: int | None
    ) -> None:
        """Record one gated step.

        Args:
            params: the P parameters that had a gradient.
            sums: [P, 4] float tensor: Σ q over live coordinates (``Q > 0``), the number of live
                coordinates, ΣG², ΣQ. Live because a coordinate that no example touched has nothing to
                open: LoRA's first step, tokens that do not occur.
            nulls: P values, the mean openness of pure noise at this step.
            num_examples: b, or None where the estimator has no examples.
        """
        total = sums.sum(0)
        self._sums = total if self._sums is None else self._sums.to(total.device) + total
        self._examples += num_examples or 0
        self._steps += 1
        counts = torch.ones(len(nulls), 3, dtype=torch.float64)
        counts[:, 1], counts[:, 2] = num_examples or 0, torch.tensor(nulls, dtype=torch.float64)
        numel = self._add_to_run(params, sums, counts)
        self._null += float(numel @ counts[:, 2] / numel.sum())

    def _add_to_run(self, params: Sequence[Tensor], sums: Tensor, counts: Tensor) -> Tensor:
        """Add to the rows of some parameters; sums: [P, 4], counts: [P, 3] on the CPU. Returns numel, [P]."""
        device = sums.device if self._run_sums is None else self._run_sums.device
        key = list(map(id, params))
        if self._last is None or self._last.key != key:
            self._last = self._set_of(key, params, device)
        self._run_sums.index_add_(0, self._last.there, sums.to(device, torch.float64))  # type: ignore[union-attr]
        self._run_counts.index_add_(0, self._last.here, counts)
        return self._last.numel

    def _set_of(self, key: list[int], params: Sequence[Tensor], device: torch.device) -> _Set:
        """Where these parameters' rows are; those that are new get one."""
        rows = [self._rows.setdefault(p, len(self._rows)) for p in params]
        missing = len(self._rows) - len(self._run_counts)
        new_sums = torch.zeros(missing, 4, dtype=torch.float64, device=device)
        self._run_sums = new_sums if self._run_sums is None else torch.cat([self._run_sums, new_sums])
        self._run_counts = torch.cat([self._run_counts, self._run_counts.new_zeros(missing, 3)])
        # pinned, because a copy from any other memory would wait for the device
        here = torch.tensor(rows, pin_memory=device.type == "cuda")
        numel = torch.tensor([p.numel() for p in params], dtype=torch.float64)
        return _Set(key, here, here.to(device, non_blocking=True), numel)

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
        all_sums = [] if self._run_sums is None else self._run_sums.tolist()
        for (p, row), sums in zip(self._rows.items(), all_sums, strict=True):
            if p not in names:
                continue
            steps, examples, null = self._run_counts[row].tolist()
            parameters[names[p]] = {
                "numel": p.numel(),
                "steps": int(steps),
                "examples": int(examples),
                "null": null,
                "sums": sums,
            }
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
        found = [(params[name], entry) for name, entry in saved["parameters"].items() if name in params]
        if found:
            params_, entries = zip(*found, strict=True)
            sums = torch.tensor([e["sums"] for e in entries], dtype=torch.float64, device=params_[0].device)
            counts = [[e["steps"], e["examples"], e["null"]] for e in entries]
            self._add_to_run(params_, sums, torch.tensor(counts, dtype=torch.float64))
        interval = saved["interval"]
        self._sums = None if interval["sums"] is None else torch.tensor(interval["sums"])
        self._null, self._examples = interval["null"], interval["examples"]
        self._steps, self._skipped = interval["steps"], interval["skipped"]


def _margin(b: float, energy: float, sq_sum: float) -> float:
    """The share of the squared gradient norm that the other examples confirm."""
    return b / (b - 1) * (energy - sq_sum) / energy if energy and b > 1 else 0.0
