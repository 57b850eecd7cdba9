"""PopRiskAdamW: AdamW whose write the gate multiplies; and what it shares with any gated optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_poprisk.blocks import ExampleBlocks
from hf_poprisk.finite import all_finite, none_finite, why_none_is
from hf_poprisk.gate import null_openness
from hf_poprisk.gated_adamw import (
    Row,
    adamw_in_basis,
    compensated_adamw,
    decide,
    gated_adamw,
    plain_adamw,
)
from hf_poprisk.logs import GateStatistics
from hf_poprisk.options import NOTHING_TO_TRAIN, check_options
from hf_poprisk.per_example.fsdp2 import local

logger = logging.getLogger(__name__)

_UNDERFLOW = 1e-30  # below this ΣG² says nothing: the squares of such gradients underflow in float32
_UNSUPPORTED = ("amsgrad", "maximize", "differentiable")  # of what AdamW's groups may ask for
_KEPT = "gate estimator ema_alpha basis kahan keep_written _ungated _names".split()  # in copies


class GatedOptimizer(ExampleBlocks):
    """From the examples of a step to its q, and a step left out if a gradient is not finite.

    A subclass sets ``gate``, ``estimator``, ``statistics``, ``_ungated`` and ``_names``, and takes the step
    in ``_update``, where ``_openness`` holds q of the gated parameters.
    """

    statistics: GateStatistics
    # of PopRiskAdamW alone
    ema_alpha: float | None = None
    basis = "coordinate"
    kahan = False
    keep_written = False
    _said_single = False
    # of the window: copies start without
    _skip_step = False
    _none_finite: bool | None = None  # no step was ever taken, nor will be; None until it is asked

    @torch.no_grad()
    def close_window(self) -> None:
        """Decide the gate: after the gradients are reduced over ranks, before they are clipped.

        Every rank must call it once per step. ``step`` calls it if you did not and nothing touched the
        gradients since the last example.

        Raises:
            RuntimeError: see ``ExampleWindow.reduce``; or a gradient whose parts were never seen.
        """
        self._none_finite = self._is_never_finite()  # before clipping, which spreads a NaN over all gradients
        if self.needs_examples:
            self._decide()

    def _decide(self) -> None:
        """Put q in place of the window's Q; or leave the step out, or take it ungated."""
        if (self._window is None or not self._window.num_examples) and self._writes_nothing():
            self._openness = {}
            return
        window = self._open_window()
        num_examples, sq_sums = window.reduce()
        if num_examples < 2:
            self._openness = {}
            self._skip_step = not all_finite(p.grad for p in self._all_parameters())
            if not self._said_single and sq_sums:
                logger.warning("a step with a single example is plain AdamW's; this is said once.")
                self._said_single = True
            return
        sums = [
            self.decide(window.squares.rotated(p, local(p.grad)), q, num_examples) for p, q in sq_sums.items()
        ]
        self._openness = sq_sums
        if not sums:
            return
        device = sums[0].device
        stacked = window.add_over_shards(torch.stack([s.to(device) for s in sums]))
        _, _, energy, noise = stacked.unbind(1)
        rounding = torch.finfo(torch.float32).eps ** 2 * energy.sum()  # of what cancels out
        unseen = (noise == 0) & (energy > _UNDERFLOW) & (energy > rounding)
        if window.shared:  # a penalty may reach what no example does
            unseen &= torch.tensor([p not in window.shared for p in sq_sums], device=device)
        # the only wait for the device in a step
        finite, missed = torch.stack([torch.isfinite(stacked.sum(0)).all(), unseen.any()]).tolist()
        if missed and (unheard := window.never_seen(p for p, u in zip(sq_sums, unseen, strict=True) if u)):
            names = [window.describe(p) for p in unheard]
            raise RuntimeError(
                f"no example's gradient was seen for {', '.join(names[:3])}, which has one: every backward "
                "must run inside `with optimizer.example():`."
            )
        # in the same order on every rank
        ungated = [p.grad for p in self._all_parameters() if p in self._ungated]
        self._skip_step = not finite or not all_finite(ungated)
        if self._skip_step:
            return
        self.statistics.add(list(sq_sums), stacked, null_openness(num_examples, self.gate), num_examples)

    def _writes_nothing(self) -> bool:
        """A step of zeros at lr = 0, by which torch.distributed.checkpoint makes the state."""
        rates = [group.get("lr") for group in self.param_groups]  # some optimizers find their own
        if any(lr is None or float(lr) for lr in rates):
            return False
        return not any(bool(local(p.grad).any()) for p in self._all_parameters() if p.grad is not None)

    def decide(self, grad: Tensor, sq_sum: Tensor, num_examples: int) -> Tensor:
        """Write a parameter's q over its Q; returns its sums, see ``gated_adamw.decide``."""
        return decide(grad, sq_sum, num_examples, self.gate)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one gated step, or none if a gradient is not finite: NaN in a moment would stay for good.

        Raises:
            RuntimeError: see ``close_window``; or no gradient of the very first step is finite.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._prepare_step()
        if self._skip_step:
            if self._none_finite:  # a loss scaler, which expects that, does not come by here
                self._end_window()
                raise RuntimeError(why_none_is(self._all_parameters(), self.describe))
            logger.warning("a gradient is not finite: this optimizer step was left out.")
            self.statistics.skip()
        else:
            self._update()
        self._end_window()
        return loss

    def _prepare_step(self) -> None:
        if self.needs_examples and self._openness is None:
            self.close_window()

    def _is_never_finite(self) -> bool:
        """Whether no step was taken yet and no gradient is finite, so that no step ever will be."""
        return self.gate != "none" and not self._has_stepped() and none_finite(self._all_parameters())

    def _has_stepped(self) -> bool:
        return any(state.get("step") for state in self.state.values())

    def _update(self) -> None:
        raise NotImplementedError

    def _check_ungated(self) -> None:
        """Raise ``ValueError`` if nothing is left to train or to gate."""
        known = set(self._all_parameters())
        if not self._ungated <= known:
            raise ValueError("`ungated` names parameters that this optimizer does not hold.")
        if not any(p.requires_grad for p in known):
            raise ValueError(NOTHING_TO_TRAIN)
        if self.gate != "none" and not known - self._ungated:
            raise ValueError("every parameter is ungated: use gate='none' if that is what you want.")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the window's examples are forgotten with their gradients."""
        super().zero_grad(set_to_none)
        self._end_window()

    def _end_window(self) -> None:
        super()._end_window()
        self._skip_step, self._none_finite = False, None


class PopRiskAdamW(GatedOptimizer, torch.optim.AdamW):
    """AdamW that writes a parameter only where the batch's signal beats its leave-one-out noise.

    The moments m, v see the ordinary gradient on every step; the gate multiplies the write only,
    ``w ← w − lr·q·m̂/(√v̂ + ε)``, with q from ``hf_poprisk.gate``. State and parameter groups are those
    of ``torch.optim.AdamW`` (``estimator="ema"`` adds one buffer), so checkpoints go both ways, and
    ``gate="none"`` *is* ``torch.optim.AdamW``. Source: arXiv:2605.01172.

    In a loop of your own, one block per example, then the gate, then clipping, then the step::

        for example in batch:
            with optimizer.example():
                (loss(example) / len(batch)).backward()
        optimizer.close_window()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    On several ranks the gradients must be averaged over all of them, as by DDP, before the window closes.
    If FSDP2 shards the model, tell the optimizer once: ``follow``.

    Args:
        params: as for ``torch.optim.AdamW``; ``model.named_parameters()`` puts names into messages.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``; ``amsgrad`` is refused by the first step.
        gate: ``hard`` (q is 0 or 1), ``soft`` (shrinkage in [0, 1]) or ``none`` (AdamW, for comparison: the
            other options stay as they are).
        estimator: ``example``: every block is one example, exact. ``group``: every block is a micro-batch,
            coarser. ``ema``: the authors' streaming form, which needs no blocks: ``hf_poprisk.streaming``.
        ungated: parameters that the gate leaves alone (see ``options.matching``).
        ema_alpha: threshold of ``ema``; default ``(1−β₁)/(1+β₁)``. The published 1 closes almost everything.
        basis: ``coordinate``, or ``eigen``: the moments and the gate are in an eigenbasis of each layer's
            gradients, which ``set_bases`` must be given: ``hf_poprisk.eigen``.
        kahan: for weights of bfloat16: remember what their rounding loses, in one more buffer, and
            add it to the next write. Without it a write below the resolution of a weight is lost.

    Attributes:
        keep_written: if set to True, a gated step leaves its q in ``state[p]["written"]``, for ``risk.py``.

    Raises:
        ValueError: a bad value, an option that would have no effect, or no parameter left to train or gate.
        NotImplementedError: sharded parameters (DTensor) with ``estimator="ema"`` or ``basis="eigen"``.
    """

    def __new__(cls, *args: Any, **options: Any) -> PopRiskAdamW:
        """``basis="eigen"`` and ``estimator="ema"``, which needs no examples, are classes of their own."""
        needed, why = PopRiskAdamW, "basis='eigen'"
        if options.get("basis") == "eigen":
            from hf_poprisk.eigen import EigenPopRiskAdamW as needed
        elif options.get("estimator") == "ema" and options.get("gate") != "none":
            from hf_poprisk.streaming import StreamingPopRiskAdamW as needed

            why = "estimator='ema'"
        cls = needed if cls is PopRiskAdamW else cls
        if not issubclass(cls, needed):
            raise TypeError(f"{cls.__name__} with {why} must subclass {needed.__name__}.")
        return super().__new__(cls)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        gate: str = "hard",
        estimator: str = "example",
        ungated: Iterable[Tensor] = (),
        ema_alpha: float | None = None,
        basis: str = "coordinate",
        kahan: bool = False,
    ) -> None:
        check_options(gate=gate, estimator=estimator, ema_alpha=ema_alpha, basis=basis, kahan=kahan)
        self.gate, self.estimator, self.ema_alpha, self.basis = gate, estimator, ema_alpha, basis
        self.kahan = kahan
        self.statistics, self._ungated = GateStatistics(), set(ungated)
        self._names: dict[Tensor, str] = {}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)
        self._check_ungated()

    def _rows(self, group: dict[str, Any]) -> list[Row]:
        """Of the parameters of a group that have a gradient."""
        if unsupported := [name for name in _UNSUPPORTED if group.get(name)]:
            raise ValueError(f"{unsupported[0]}=True is not supported by PopRiskAdamW: leave it off.")
        columns: list[list[Tensor]] = [[], [], [], [], []]
        if self._init_group(group, *columns[:4], [], columns[4]):
            raise NotImplementedError("complex parameters are not supported by PopRiskAdamW.")
        return list(zip(*columns, strict=True))

    def _update(self) -> None:
        bases = self.bases
        for group in self.param_groups:
            plain = list[Row]()
            for row in self._rows(group):
                self.state[row[0]].pop("written", None)
                if (q := self._openness_of(group, row)) is not None and self.keep_written:
                    self.state[row[0]]["written"] = q.clone()
                if row[0] in bases:
                    adamw_in_basis(group, row, q, bases[row[0]])
                elif self.kahan:
                    self.state[row[0]].setdefault("lost", torch.zeros_like(row[0]))
                    compensated_adamw(group, tuple(map(local, row)), q, local(self.state[row[0]]["lost"]))  # type: ignore[arg-type]
                elif q is None:
                    plain.append(row)
                else:
                    gated_adamw(group, tuple(map(local, row)), q)  # type: ignore[arg-type]
            plain_adamw(group, plain)

    def _openness_of(self, group: dict[str, Any], row: Row) -> Tensor | None:
        """q of this step, the one after ``step``; None where it is not gated."""
        return (self._openness or {}).get(row[0])

    def __getstate__(self) -> dict[str, Any]:
        """As in torch, with the gate's options: copies and pickles are gated as well."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().__getstate__(), **kept, "statistics": GateStatistics()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As in torch; also takes a ``torch.optim.AdamW`` state of this basis, from any of its kernels."""
        states = state_dict["state"].values()
        if states and any("basis_left" in s or "basis_right" in s for s in states) != (self.basis == "eigen"):
            raise ValueError(
                f"the moments to be loaded are not of basis={self.basis!r}: keep the basis of that run, or "
                "start from its weights alone."
            )
        here = {"foreach": None, "fused": None, "capturable": False}
        groups = [{**group, **here} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for name in ("lr", "eps", "weight_decay"):  # torch takes inf
            if not math.isfinite(float(value := self.param_groups[-1][name])):
                raise ValueError(f"{name} must be finite; got {value}.")
        params = self.param_groups[-1]["params"]
        if self.gate != "none" and any(p.dtype is torch.float16 for p in params):
            raise ValueError(
                "float16 cannot hold AdamW's second moments of small gradients: load them in bfloat16, "
                "or in float32 (fp16=True computes in float16 all the same)."
            )
        others = (p.dtype for p in params if p.dtype is not torch.bfloat16)
        if self.kahan and (dtype := next(others, None)):
            raise ValueError(
                f"kahan=True is for weights of bfloat16, and one is {dtype}: leave it off, or train all in "
                "bfloat16."
            )
        if any(isinstance(p, DTensor) for p in params):
            if self.gate != "none" and self.estimator == "ema":
                raise NotImplementedError(
                    "estimator='ema' cannot serve sharded parameters (FSDP2, tensor parallelism): set "
                    "estimator='example', or gate='none'."
                )
            if self.basis == "eigen":
                raise NotImplementedError(
                    "basis='eigen' cannot serve sharded parameters (FSDP2, tensor parallelism): train with "
                    "DDP, or set basis='coordinate'."
                )
        self._window = self._sharded = None
