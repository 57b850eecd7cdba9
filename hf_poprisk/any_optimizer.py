"""PopRiskGate: the gate around an optimizer of yours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_poprisk.gated_adamw import take_back
from hf_poprisk.logs import GateStatistics
from hf_poprisk.optimizer import GatedOptimizer
from hf_poprisk.options import check_options
from hf_poprisk.per_example.fsdp2 import local

_OWN = "inner gate estimator _ungated _names".split()  # in copies


class PopRiskGate(GatedOptimizer):
    """Any ``torch.optim.Optimizer`` whose write the gate multiplies: ``p ← p_old + q·(p_step − p_old)``.

    The inner optimizer sees the ordinary gradient, and its state is what it would be without a gate. What
    its step changes is the write. That includes decoupled weight decay: a weight decays only as far as its
    gate is open, where ``PopRiskAdamW`` decays every weight. Groups, state, ``state_dict`` and schedulers are
    the inner one's. The blocks are those of ``PopRiskAdamW``, which needs less memory: here a step holds one
    more copy of the gated parameters.

    Args:
        inner: the optimizer. It must follow from gradients alone: one whose state holds weights would go
            on from weights that were not written.
        gate, estimator, ungated: as for ``PopRiskAdamW``; the estimator is ``example`` or ``group``.

    Raises:
        TypeError: ``inner`` is no optimizer, or has a gate.
        ValueError: an optimizer that cannot be gated, by name; a bad value; nothing left to train or gate.
    """

    _stepped = False

    def __init__(
        self,
        inner: Optimizer,
        *,
        gate: str = "hard",
        estimator: str = "example",
        ungated: Iterable[Tensor] = (),
    ) -> None:
        if not isinstance(inner, Optimizer) or isinstance(inner, GatedOptimizer):
            raise TypeError(f"PopRiskGate takes an optimizer without a gate; got {type(inner).__name__}.")
        check_options(gate=gate, estimator=estimator, ema_alpha=None, basis="coordinate")
        if estimator == "ema":
            raise ValueError("estimator='ema' reads AdamW's moments: use PopRiskAdamW, or 'example'.")
        # not Optimizer.__init__, which would make groups and a state of its own
        self.inner, self.gate, self.estimator = inner, gate, estimator
        self.statistics, self._ungated = GateStatistics(), set(ungated)
        self._names: dict[Tensor, str] = {}
        self._check_ungated()
        if gate != "none":
            _try_out(inner)

    def __getattr__(self, name: str) -> Any:
        """The hooks of an optimizer, and what else the inner one has."""
        if name == "inner":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    # of torch these are attributes; load_state_dict puts others in their place
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's: checkpoints go both ways."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        self.inner.load_state_dict(state_dict)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)
        self._window = self._sharded = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)
        self._end_window()

    def _has_stepped(self) -> bool:
        return self._stepped or any(self.state.values())  # SGD keeps none

    def _update(self) -> None:
        before = {p: local(p).clone() for p in self._openness or {}}
        self.inner.step()
        self._stepped = True
        for p, old in before.items():
            take_back(local(p), old, self._openness[p])  # type: ignore[index]

    def __repr__(self) -> str:
        return f"PopRiskGate(gate={self.gate!r}, estimator={self.estimator!r}, inner={self.inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _OWN}, "statistics": GateStatistics()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _try_out(inner: Optimizer) -> None:
    """Take a step of it on weights of about 100 with gradients of about 1, and look at its state.

    Raises:
        ValueError: it keeps weights, trains others than it evaluates, or takes no step on its own.
    """
    name, way_out = type(inner).__name__, "use another optimizer, or gate='none'"
    if held := [type(x).__name__ for x in vars(inner).values() if isinstance(x, Optimizer)]:
        raise ValueError(f"{name} steps {held[0]}: put PopRiskGate around that one, before {name} is made.")
    if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise ValueError(f"{name} evaluates other weights than it trains, averages of them: {way_out}.")
    twin = object.__new__(type(inner))  # shares all but the weights and the state
    hooks: dict[str, Any] = {name: {} for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
    twin.__dict__.update(inner.__dict__, **hooks)
    probes: list[torch.nn.Parameter] = []
    for group in inner.param_groups:
        like = next((p for p in group["params"] if p.requires_grad), torch.zeros(()))
        generator = torch.Generator().manual_seed(len(probes))
        weight, grad = torch.randn(2, 8, 8, generator=generator).to(like.device, like.dtype)
        probes.append(torch.nn.Parameter(weight + 100))
        probes[-1].grad = grad
    try:
        twin.state = defaultdict(dict)
        twin.param_groups = [{**g, "params": [p]} for g, p in zip(inner.param_groups, probes, strict=True)]
        with torch.random.fork_rng(devices=[]):
            type(inner).step(twin)
    except Exception as error:  # whatever an optimizer raises that wants a closure, or a model
        raise ValueError(f"{name} takes no step on its own ({error}): {way_out}.") from error
    for p in probes:
        for key, value in twin.state[p].items():
            as_large = isinstance(value, Tensor) and value.numel() == p.numel()
            if as_large and float((value.detach().float() - 100).abs().mean()) < 50:
                raise ValueError(f"the state of {name} holds weights ({key}): {way_out}.")
