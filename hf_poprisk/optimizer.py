"""PopRiskAdamW: AdamW whose write the gate multiplies."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from hf_poprisk import kernels, kernels_cpu
from hf_poprisk.batched import BatchedGradients, Capture, Layout
from hf_poprisk.gate import (
    GATES,
    null_openness,
    openness,
    streaming_null_openness,
    streaming_openness,
)
from hf_poprisk.influence import Influence
from hf_poprisk.moments import ExampleWindow
from hf_poprisk.statistics import GateStatistics

logger = logging.getLogger(__name__)

ESTIMATORS = ("example", "group", "ema")
EMA_DECAY = 0.99  # ρ of the streaming noise estimate, as published
_UNDERFLOW = 1e-30  # below this ΣG² says nothing: the squares of such gradients underflow in float32
_NOTHING_TO_TRAIN = (
    "nothing to train: no parameter requires a gradient; unfreeze some, or load an adapter with "
    "is_trainable=True."
)
_PIECE = 1 << 18  # elements that are worked on together: they stay in a core's cache
_OPTIONS = ("gate", "estimator", "warmup_steps", "ema_alpha")

_Row = tuple[Tensor, ...]  # param, grad, exp_avg, exp_avg_sq, step


class PopRiskAdamW(torch.optim.AdamW):
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

    Under ``torch.distributed`` the gradients must be averaged over the default process group, as DDP
    does, by the time the window closes.

    Args:
        params: parameters or groups, as for ``torch.optim.AdamW``. With ``model.named_parameters()`` messages
            name the parameter that they are about.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        gate: ``hard`` (q is 0 or 1), ``soft`` (shrinkage in [0, 1]) or ``none`` (AdamW, for comparison: the
            other options stay as they are).
        estimator: ``example``: every block is one example, exact. ``group``: every block is a
            micro-batch, a valid test with fewer and coarser units. ``ema``: the authors' streaming form;
            needs no blocks.
        ungated: parameters that the gate leaves alone (see ``matching``).
        warmup_steps: ungated steps at the start.
        ema_alpha: threshold of ``ema``; default ``(1−β₁)/(1+β₁)``. 1 is as published and closes almost
            everything.
        amsgrad: not supported; present so that it is refused by name.

    Attributes:
        open_share: once the window is closed, how much of the coordinates that some example touched this step
            will write: the mean of q, 1 for ungated parameters. Of ``ema``, which decides in the step, what
            it writes of noise.
        keep_written: set it to True and every gated step leaves its q in the parameter's state, as
            ``written``, in the parameter's shape: for ``hf_poprisk.risk``.

    Raises:
        ValueError: a bad value, an option that would have no effect, or no parameter left to train or gate.
        NotImplementedError: sharded parameters (DTensor).
    """

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
        warmup_steps: int = 0,
        ema_alpha: float | None = None,
    ) -> None:
        check_gate_options(gate, estimator, warmup_steps, ema_alpha)
        if amsgrad:
            raise ValueError("amsgrad=True is not supported by PopRiskAdamW: leave it off.")
        self.gate = gate
        self.estimator = estimator
        self.warmup_steps = warmup_steps
        self.ema_alpha = ema_alpha
        self.statistics = GateStatistics()
        self.open_share: Tensor | float = 1.0
        self.keep_written = False
        self._ungated = set(ungated)
        self._names: dict[Tensor, str] = {}
        self._window: ExampleWindow | None = None
        self._openness: dict[Tensor, Tensor] | None = None  # q of the closed window
        self._skip_step = False
        self._hopeless: bool | None = None  # no step was ever taken, nor will be; None until it is asked
        self._said_single = False
        super().__init__(params, lr, betas, eps, weight_decay)
        known = set(self._all_parameters())
        if not self._ungated <= known:
            raise ValueError("`ungated` names parameters that this optimizer does not hold.")
        if not any(p.requires_grad for p in known):
            raise ValueError(_NOTHING_TO_TRAIN)
        if gate != "none" and not known - self._ungated:
            raise ValueError("every parameter is ungated: use gate='none' if that is what you want.")

    @property
    def needs_examples(self) -> bool:
        """Whether backwards must run inside ``example()``."""
        return self.gate != "none" and self.estimator != "ema"

    @property
    def gated_parameters(self) -> list[Tensor]:
        """The trainable parameters under the gate, in group order; empty when it is off."""
        if self.gate == "none":
            return []
        return [p for p in self._all_parameters() if p.requires_grad and p not in self._ungated]

    def name_parameters(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Let error messages say which parameter they are about, if the optimizer was not given names."""
        self._names = {p: name for name, p in named_parameters}
        self._window = None

    @property
    def names(self) -> Mapping[Tensor, str]:
        """What ``name_parameters`` was told, before the names that the optimizer was given.

        A parameter without a name is left out of records.
        """
        given = {
            p: name
            for group in self.param_groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        return {**given, **self._names}

    def example(self, influence: Influence | None = None, index: int = 0) -> AbstractContextManager[None]:
        """Block around the backward of one example (of one micro-batch with ``estimator="group"``).

        Args:
            influence: ``Influence(optimizer, N)``, to be filled; works with the gate off too.
            index: of this example among its N.

        Raises:
            RuntimeError: see ``ExampleWindow.example``; or the window was closed and not stepped.
        """
        if not self.needs_examples and influence is None:
            return nullcontext()
        return self._free_window().example(influence, index)

    def no_example(self, allowed: Iterable[Tensor]) -> AbstractContextManager[set[Tensor]]:
        """Block around a backward whose gradients belong to no example; see ``ExampleWindow.no_example``."""
        return self._free_window().no_example(allowed)

    def batch(
        self, layers: BatchedGradients, layout: Layout, influence: Influence | None = None
    ) -> AbstractContextManager[Capture | None]:
        """Block around the forward and the backward of several examples; the sums are those of ``example``.

        Args:
            layers: ``BatchedGradients(model, optimizer.gated_parameters)`` with nothing uncovered.
            layout: ``Rows(N, rows)`` for N examples in a batch whose tensors have ``rows`` rows, of which row
                j belongs to example j mod N; or ``Packed(lengths)`` for sequences packed into one row.
            influence: ``Influence(optimizer, N)``, to be filled, for which ``layers`` must hold
                every trainable parameter; works with the gate off too.

        Raises:
            RuntimeError: see ``ExampleWindow.batch``.
            ValueError: with ``estimator="group"``, whose unit is the batch: use ``example``.
        """
        if self.estimator == "group":
            raise ValueError("estimator='group' takes a batch as one unit: use optimizer.example().")
        if not self.needs_examples and influence is None:
            return nullcontext()
        return self._free_window().batch(layers, layout, influence)

    def _free_window(self) -> ExampleWindow:
        """The window, not closed."""
        window = self._open_window()
        if self._openness is not None or self._skip_step:
            if any(p.grad is not None for p in self.gated_parameters):
                raise RuntimeError(
                    "an example after close_window(): call optimizer.step() and "
                    "optimizer.zero_grad() before the next example."
                )
            self._end_window()  # the step was skipped, by a loss scaler for instance
        return window

    @torch.no_grad()
    def close_window(self) -> None:
        """Decide the gate: after the gradients are reduced over ranks, before they are clipped.

        Every rank must call it once per step. ``step`` calls it if you did not and nothing touched the
        gradients since the last example.

        Raises:
            RuntimeError: see ``ExampleWindow.reduce``; or a gradient whose parts were never seen.
        """
        self.open_share = 1.0
        if self.gate != "none" and self.estimator == "ema" and not self._warming_up(self._all_parameters()):
            # what opens is known after the step only; of noise it opens this much
            beta1 = self.param_groups[0]["betas"][0]
            self.open_share = streaming_null_openness(self._alpha(beta1), beta1, self.gate)
        self._hopeless = self._nothing_finite()  # before clipping, which spreads a NaN over all gradients
        if not self.needs_examples:
            return
        window = self._open_window()
        num_examples, sq_sums = window.reduce()
        if num_examples < 2:
            self._openness = {}
            self._skip_step = not self._finite(p.grad for p in self._all_parameters())
            if not self._said_single and sq_sums:
                logger.warning(
                    "a step with a single example cannot be gated and was taken as plain AdamW; this "
                    "is said once."
                )
                self._said_single = True
            return
        sums = [self._decide(p.grad, sq_sum, num_examples) for p, sq_sum in sq_sums.items()]
        self._openness = sq_sums
        if not sums:
            return
        device = sums[0].device
        stacked = torch.stack([s.to(device) for s in sums])
        _, _, energy, noise = stacked.unbind(1)
        unseen = (noise == 0) & (energy > _UNDERFLOW)
        if window.shared:  # a penalty may reach what no example does
            unseen &= torch.tensor([p not in window.shared for p in sq_sums], device=device)
        # the only wait for the device in a step
        finite, any_missed = torch.stack([torch.isfinite(stacked.sum(0)).all(), unseen.any()]).tolist()
        if any_missed:
            names = [window.describe(p) for p, u in zip(sq_sums, unseen, strict=True) if bool(u)]
            raise RuntimeError(
                f"no example's gradient was seen for {', '.join(names[:3])}, which has one after the "
                "window: sharded parameters are not supported, and every backward must run inside "
                "`with optimizer.example():`."
            )
        if finite and self._ungated:
            finite = self._finite(p.grad for p in self._ungated)
        self._skip_step = not finite
        if finite:
            null = null_openness(num_examples, self.gate)
            self.statistics.add(list(sq_sums), stacked, null, num_examples)
            if not self._warming_up(sq_sums):
                openness, live = stacked[:, 0].sum(), stacked[:, 1].sum()
                ungated = sum(p.numel() for p in self._ungated if p.grad is not None)
                self.open_share = (openness + ungated) / (live + ungated).clamp(min=1)

    def _warming_up(self, params: Iterable[Tensor]) -> bool:
        """Whether the next step is not gated yet."""
        return self.warmup_steps > 0 and all(
            float(self.state.get(p, {}).get("step", 0)) < self.warmup_steps for p in params
        )

    def _decide(self, grad: Tensor, sq_sum: Tensor, num_examples: int) -> Tensor:
        """Write q over Q, which needs no memory beyond Q; returns the sums of ``GateStatistics.add``."""
        for fused in (kernels, kernels_cpu):
            if fused.usable(grad, sq_sum):
                return fused.decide(grad, sq_sum, num_examples, self.gate == "soft")
        pieces = [(grad, sq_sum)]
        whole = not (grad.is_contiguous() and sq_sum.is_contiguous())
        if grad.device.type == "cpu" and not whole:  # every pass over a piece but the first is in the cache
            pieces = list(zip(*(x.view(-1).split(_PIECE) for x in (grad, sq_sum)), strict=True))
        sums = []
        for g, s in pieces:
            g = g.to(s.dtype)
            live, noise = torch.gt(s, 0, out=torch.empty_like(s)).sum(), s.sum()
            energy = torch.dot(g.reshape(-1), g.reshape(-1))
            openness(g, s, num_examples, self.gate, out=s)
            sums += [s.sum(), live, energy, noise]
        return torch.stack(sums).view(-1, 4).sum(0).float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one gated step.

        A step whose gradient is not finite is left out: moments, decay and weights stay as they are,
        because one NaN in a moment would close the gate for good.

        Raises:
            RuntimeError: see ``close_window``; or no gradient of the very first step is finite, and neither
                would those of the next ones be.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.needs_examples and self._openness is None and not self._skip_step:
            self.close_window()
        if self.gate != "none" and self.estimator == "ema":
            self._skip_step = not self._finite(p.grad for p in self._all_parameters())
            if self._hopeless is None:  # the window was not closed, which this estimator does not ask for
                self._hopeless = self._nothing_finite()
        if self._skip_step:
            if self._hopeless:  # a loss scaler, which expects that, does not come by here
                self._end_window()
                raise RuntimeError(self._why_hopeless())
            logger.warning("a gradient is not finite: this optimizer step was left out.")
            self.statistics.skip()
        else:
            self._update()
        self._end_window()
        return loss

    def _nothing_finite(self) -> bool:
        """Whether no step was taken yet and no gradient is finite; zeros, as of unused experts, say nothing.

        Waits for the device, but before the first step only, and as a rule for one gradient.
        """
        if self.gate == "none" or any(self.state.values()):
            return False
        grads = (p.grad for p in self._all_parameters() if p.grad is not None)
        return not any(0 < float(grad.detach().abs().max()) < math.inf for grad in grads if grad.numel())

    def _why_hopeless(self) -> str:
        bad = next((p for p in self._all_parameters() if not p.isfinite().all()), None)
        if bad is None:
            return (
                "no gradient of the first step is finite, although the weights are: look for examples whose "
                "loss is not, or train in bfloat16 or float32."
            )
        return (
            f"no gradient of the first step is finite, because {self._open_window().describe(bad)} is not: "
            "load the weights again, or train in bfloat16 or float32."
        )

    def _update(self) -> None:
        streamed: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            _check_group(group)
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_avg_sqs: list[Tensor] = []
            steps: list[Tensor] = []
            if self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps):
                raise NotImplementedError("complex parameters are not supported by PopRiskAdamW.")
            rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True))
            for param in params:
                self.state[param].pop("written", None)
            gated = [row for row in rows if self._is_gated(row[0], row[4])]
            _adamw(group, [row for row in rows if row[0] not in {r[0] for r in gated}])
            if self.estimator == "ema":
                for row in gated:
                    self._streamed_update(group, *row, streamed)
                continue
            self._gated_update(group, gated)
        if streamed:
            beta1 = self.param_groups[0]["betas"][0]
            null = streaming_null_openness(self._alpha(beta1), beta1, self.gate)
            self.statistics.add(list(streamed), torch.stack(list(streamed.values())), null, None)

    def _is_gated(self, param: Tensor, step: Tensor) -> bool:
        if self.gate == "none" or param in self._ungated:
            return False
        if self.estimator == "ema":
            return True  # the noise estimate must run through the warm-up
        return step.item() >= self.warmup_steps and param in (self._openness or {})

    def _gated_update(self, group: dict[str, Any], rows: list[_Row]) -> None:
        """AdamW's own update, then back towards where the weights would be without its write."""
        decay = float(group["lr"]) * float(group["weight_decay"])
        for param, grad, exp_avg, exp_avg_sq, step in rows:
            q = self._openness[param]  # type: ignore[index]
            if self.keep_written:
                self.state[param]["written"] = q.clone()
            tensors = param, grad, exp_avg, exp_avg_sq
            fused = next((k for k in (kernels, kernels_cpu) if k.usable(*tensors, q)), None)
            if fused is not None:
                step += 1
                fused.gated_adamw(*tensors, q, step.item(), group)
            elif param.device.type == "cpu" and all(x.is_contiguous() for x in (*tensors, q)):
                step += 1
                pieces = zip(*(x.view(-1).split(_PIECE) for x in (*tensors, q)), strict=True)
                for *piece, piece_q in pieces:  # what is touched twice is in the cache the second time
                    unwritten = piece[0] * (1 - decay)
                    _fused_adamw(group, *piece, step)
                    _take_back(piece[0], unwritten, piece_q)
            else:
                unwritten = param * (1 - decay)
                _adamw(group, [(*tensors, step)])
                _take_back(param, unwritten, q)

    def _streamed_update(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        streamed: dict[Tensor, Tensor],
    ) -> None:
        """Update one parameter of the streaming form in place; adds its statistics, [4]."""
        beta1, beta2 = group["betas"]
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        step += 1
        t = step.item()
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        noise = self._track_noise(param, grad - exp_avg)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        signal = (exp_avg / correction1).square_()
        q = streaming_openness(signal, noise, self._alpha(beta1), self.gate)
        live = torch.count_nonzero(noise)
        streamed[param] = torch.stack([x.float() for x in (q.sum(), live, live * 0, live * 0)])
        if t <= self.warmup_steps:
            q.fill_(1.0)
        if self.keep_written:
            self.state[param]["written"] = q
        if decay:
            param.mul_(1 - lr * decay)
        denom = exp_avg_sq.sqrt().div_(correction2**0.5).add_(group["eps"])
        param.addcmul_(exp_avg / denom, q, value=-lr / correction1)

    def _track_noise(self, param: Tensor, surprise: Tensor) -> Tensor:
        """``s ← ρ s + (1−ρ)(G − m_prev)²``; returns it bias-corrected."""
        state = self.state[param]
        if "noise" not in state:  # counts its own steps: AdamW's moments may be older
            state["noise"], state["noise_steps"] = torch.zeros_like(param), 0
        state["noise_steps"] += 1
        state["noise"].lerp_(surprise.square_(), 1 - EMA_DECAY)
        return state["noise"] / (1 - EMA_DECAY ** state["noise_steps"])

    def _alpha(self, beta1: float) -> float:
        return (1 - beta1) / (1 + beta1) if self.ema_alpha is None else self.ema_alpha

    def _all_parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @staticmethod
    def _finite(grads: Iterable[Tensor | None]) -> bool:
        norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
        return bool(norm.isfinite())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the window's examples are forgotten with their gradients."""
        super().zero_grad(set_to_none)
        self._end_window()

    def __getstate__(self) -> dict[str, Any]:
        """As in torch, with the gate's options: copies and pickles are gated as well."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        fresh = {"statistics": GateStatistics(), "open_share": 1.0, "_window": None, "_openness": None}
        fresh["_hopeless"] = None
        kept = {name: getattr(self, name) for name in ("_ungated", "_names", "_said_single", "keep_written")}
        return {**super().__getstate__(), **options, **kept, **fresh, "_skip_step": False}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As in torch; also takes a ``torch.optim.AdamW`` state, whatever kernel wrote it."""
        here = {"foreach": None, "fused": None, "capturable": False}
        groups = [{**group, **here} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if self.gate != "none" and isinstance(p, DTensor):
                raise NotImplementedError(
                    "the gate cannot serve sharded parameters (FSDP2, tensor parallelism): train "
                    "with DDP, or set gate='none'."
                )
        self._window = None

    def _open_window(self) -> ExampleWindow:
        if self._window is None:
            self._window = self.new_window()
        return self._window

    def new_window(self) -> ExampleWindow:
        """An empty window over the parameters, apart from the optimizer's own."""
        # with those that are frozen now: they may be trained later
        every = list(self._all_parameters())
        gated = dict.fromkeys(p for p in every if self.needs_examples and p not in self._ungated)
        return ExampleWindow(gated, self.names, [p for p in every if p not in gated])

    def _end_window(self) -> None:
        self._openness, self._skip_step, self._hopeless = None, False, None
        if self._window is not None:
            self._window.reset()


def _adamw(group: dict[str, Any], rows: list[_Row]) -> None:
    """``torch.optim.AdamW`` on (param, grad, exp_avg, exp_avg_sq, step) rows, in place."""
    if not rows:
        return
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*rows, strict=True))
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=group["foreach"],
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _fused_adamw(
    group: dict[str, Any], param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor
) -> None:
    """The kernel of ``torch.optim.AdamW(fused=True)`` alone; step counts this one already."""
    torch._fused_adamw_(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _take_back(param: Tensor, unwritten: Tensor, q: Tensor) -> None:
    # q = 0 gives unwritten and q = 1 param, bit for bit
    torch.lerp(unwritten, param, q.to(param.dtype), out=param)


def matching(named_parameters: Iterable[tuple[str, Tensor]], patterns: Sequence[str]) -> list[Tensor]:
    """The trainable parameters whose name matches one of the regular expressions (``re.search``).

    Raises:
        ValueError: a pattern that is not a regular expression, or that matches no trainable parameter, of
            which there may be none.
    """
    check_patterns(patterns)
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if patterns and not named:
        raise ValueError(_NOTHING_TO_TRAIN)
    found: dict[Tensor, None] = {}
    for pattern in patterns:
        hits = [p for name, p in named if re.search(pattern, name)]
        if not hits:
            raise ValueError(f"the pattern {pattern!r} matches no trainable parameter.")
        found.update(dict.fromkeys(hits))
    return list(found)


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise ``ValueError`` for the first pattern that is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error


def check_gate_options(
    gate: str,
    estimator: str,
    warmup_steps: int,
    ema_alpha: float | None,
    prefix: str = "",
) -> None:
    """Refuse bad values and options that would have no effect.

    Args:
        prefix: how the caller's users spell the names, for the messages.

    Raises:
        ValueError: one sentence that names the option and the way out.
    """
    for name, value, choices in (
        ("gate", gate, GATES),
        ("estimator", estimator, ESTIMATORS),
    ):
        if value not in choices:
            raise ValueError(f"{prefix}{name} must be one of {', '.join(choices)}; got {value!r}.")
    if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
        raise ValueError(f"{prefix}warmup_steps must be an integer ≥ 0; got {warmup_steps!r}.")
    if ema_alpha is not None:
        number = isinstance(ema_alpha, int | float) and not isinstance(ema_alpha, bool)
        if not number or not 0 < ema_alpha < math.inf:
            raise ValueError(f"{prefix}ema_alpha must be a number > 0; got {ema_alpha!r}.")
        if estimator != "ema":
            raise ValueError(
                f"{prefix}ema_alpha has no effect with {prefix}estimator={estimator!r}: remove it or "
                f"set {prefix}estimator='ema'."
            )


def _check_group(group: dict[str, Any]) -> None:
    for option in ("amsgrad", "maximize", "differentiable"):
        if group.get(option):
            raise ValueError(f"{option}=True is not supported by PopRiskAdamW: leave it off.")
