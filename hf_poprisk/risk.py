"""Population risk without a validation set: does the next batch confirm what the last ones taught?

To first order, the step made at time t − 1 lowers the loss of any batch with gradient G by
``lr · Σ_k q_k P_k m̂_k G_k``, P = 1/(√v̂ + ε) being Adam's preconditioner and q what the gate let through (1
without one). Put the *next* batch's gradient there, which had no part in m̂ or q, and the average over batches
estimates how much one step lowers the population loss; put the gradient of the step's own batch there, and it
is the empirical loss. What the first lacks of the second is the memorised share: the part of a step's gain on
its own batch that no other batch confirms. Source: arXiv:2605.01172, section on training on population risk;
the next-batch form is ours. (From the batch's own G and Q the share comes out right for plain AdamW, which
forms no Q, and too small for a gated step, whose gate was chosen by that batch.)

Both are held out from steps, not from the weights: an example seen in an earlier epoch is not fresh.
And gains are first order, the first at the end of its step: where steps are so large that they overshoot (a
large learning rate, late in training), it is below zero although nothing is memorised.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_poprisk.eigen import LEFT, RIGHT
from hf_poprisk.per_example.basis import rotated
from hf_poprisk.record import write_json

logger = logging.getLogger(__name__)

POPULATION, EMPIRICAL, SPREAD = "poprisk/gain_population", "poprisk/gain_empirical", "poprisk/gain_spread"
TOTAL, SHARE = "poprisk/gain_total", "poprisk/memorised_share"
GAINS_NAME = "poprisk_gains.json"  # in a checkpoint


@torch.no_grad()
def gains(optimizer: torch.optim.Optimizer, scale: float = 1.0, clip: Tensor | float = 1.0) -> Tensor | None:
    """What the last step is worth on the gradients at hand, and what the coming step is.

    Call it when the gate is decided and before the step, with gradients that are reduced over ranks and not
    clipped.

    Args:
        optimizer: of the Adam family. A ``PopRiskAdamW`` with a gate needs ``keep_written=True``.
        scale: what the gradients are multiplied by (a loss scaler's scale).
        clip: what the coming step will multiply them by, c ≤ 1; see ``clip_factor``.

    Returns:
        [2] float32, in units of the loss per step: ``lr Σ q P m̂ G`` with m̂, q and P of the last step
        (population), and with those of the coming one, which has seen this G (empirical); with the lr of the
        coming one; None before the first. With ``estimator="ema"`` both have q of the last step, and the
        second is too small.

    Raises:
        ValueError: an optimizer without Adam's moments, or a gate whose q is not kept.
        NotImplementedError: sharded parameters.
    """
    if getattr(optimizer, "gate", "none") != "none" and not getattr(optimizer, "keep_written", True):
        raise ValueError("the gains of a gated step need its q: set optimizer.keep_written = True.")
    if any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        raise NotImplementedError("the gains of sharded parameters are not computed: train with DDP.")
    total, clip = None, torch.as_tensor(clip)
    openness = getattr(optimizer, "_openness", None) or {}
    for p, group in _with_gradient(optimizer):
        if not (state := optimizer.state.get(p)):
            continue
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            raise no_moments(optimizer)
        beta1, beta2 = group["betas"]
        step = torch.as_tensor(state["step"]).double()  # on the device if fused: not read here
        # in the basis of the moments
        sides = state.get(LEFT), state.get(RIGHT)
        grad, square = rotated(sides, p.grad.float() / scale), state["exp_avg_sq"].float()
        written, coming_q = state.get("written", 1.0), openness.get(p, state.get("written", 1.0))
        root = square.sqrt().div_((1 - beta2**step).sqrt()).add_(group["eps"])
        moment = state["exp_avg"].float()
        last = (written * grad * moment / root).sum() / (1 - beta1**step)
        clipped = grad * clip.to(grad.device)
        moment = torch.lerp(moment, clipped, 1 - beta1)
        square = torch.addcmul(square * beta2, clipped, clipped, value=1 - beta2)
        root = square.sqrt_().div_((1 - beta2 ** (step + 1)).sqrt()).add_(group["eps"])
        coming = (coming_q * grad * moment / root).sum() / (1 - beta1 ** (step + 1))
        both = float(group["lr"]) * torch.stack([last, coming]).float()
        total = both if total is None else total + both.to(total.device)
    return total


def clip_factor(
    optimizer: torch.optim.Optimizer, scale: float = 1.0, max_norm: float | None = None
) -> Tensor | float:
    """What gradients times ``scale`` are multiplied by when they are clipped to ``max_norm``, if at all."""
    if not max_norm:
        return 1.0
    norm = torch.nn.utils.get_total_norm([p.grad for p, _ in _with_gradient(optimizer)])
    return (max_norm * scale / (norm + 1e-6)).clamp(max=1.0)


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Parameters and their groups."""
    return [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def no_moments(optimizer: torch.optim.Optimizer) -> ValueError:
    return ValueError(
        f"poprisk_risk needs the moments of Adam, which {type(optimizer).__name__} does not keep: set "
        "poprisk_risk=false or another optim."
    )


class RiskMeter:
    """Collects ``gains`` on the device and reads them once per logging interval."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []  # [2] each

    def save(self, folder: str | Path) -> None:
        """What has been seen since the last log, for a run that goes on from a checkpoint."""
        write_json(Path(folder, GAINS_NAME), [seen.tolist() for seen in self._seen if seen.isfinite().all()])

    def load(self, folder: str | Path | None, device: torch.device) -> None:
        """Start over, or go on from where ``save`` was."""
        self._seen.clear()
        if folder is not None and Path(folder, GAINS_NAME).is_file():
            seen = json.loads(Path(folder, GAINS_NAME).read_text())
            self._seen += [torch.tensor(both, device=device) for both in seen]

    def observe(
        self, optimizer: torch.optim.Optimizer, scale: float = 1.0, max_norm: float | None = None
    ) -> None:
        """``gains`` of gradients that the coming step will clip to ``max_norm``."""
        if (found := gains(optimizer, scale, clip_factor(optimizer, scale, max_norm))) is not None:
            self._seen.append(found)

    def pop(self, history: list[dict[str, float]]) -> dict[str, float]:
        """The log entries since the last call; empty if there was no step to judge.

        Args:
            history: the logs so far, which hold the running sum (and come back with a checkpoint).

        ``gain_population`` and ``gain_empirical`` are means over the interval's batches, ``gain_spread`` the
        standard error of the first (not for a single batch), ``memorised_share`` one minus the first over the
        second (where steps gain anything on their own batches), ``gain_total`` the sum of the first since the
        start. Batches that are not finite are left out.
        """
        seen = torch.stack(self._seen).double().cpu() if self._seen else torch.zeros(0, 2)
        self._seen.clear()
        seen = seen[seen.isfinite().all(1)]
        if not len(seen):
            return {}
        population, empirical = seen.mean(0).tolist()
        before = next((entry[TOTAL] for entry in reversed(history) if TOTAL in entry), 0.0)
        logs = {POPULATION: population, EMPIRICAL: empirical, TOTAL: before + seen[:, 0].sum().item()}
        if empirical > 0:
            logs[SHARE] = 1 - population / empirical
        if len(seen) > 1:
            logs[SPREAD] = (seen[:, 0].std() / math.sqrt(len(seen))).item()
        return logs


class PopRiskEarlyStoppingCallback(TrainerCallback):
    """Stops when the next batches no longer confirm what training teaches; needs no validation set.

    It follows the sum of ``poprisk/gain_population`` from its highest point on, and stops when the sum has
    fallen below that by ``threshold`` standard errors. Training stays where it is then: the gain is taken at
    the end of each step, where it is lowest, so at its zero the loss of unseen examples still falls a little.

    Args:
        threshold: standard errors of the sum since its highest point.

    Attributes:
        stopped_at: the optimizer step; None if it has not stopped training.

    Raises (in ``train``):
        ValueError: ``poprisk_risk=false``, or logs that hold no spread.
    """

    def __init__(self, threshold: float = 3.0) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be a number of standard errors > 0; got {threshold!r}.")
        self.threshold = threshold
        self.stopped_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(args, "poprisk_risk", False):
            raise ValueError(
                f"{type(self).__name__} reads {POPULATION} from the logs: set poprisk_risk=true, with one of "
                "the trainers of hf_poprisk."
            )
        by_steps = args.logging_strategy == "steps"  # a share of the run is in steps in the state
        every = state.logging_steps if by_steps else state.max_steps // state.num_train_epochs
        if args.logging_strategy == "no" or every < 2:
            raise ValueError(
                f"{type(self).__name__} needs the spread of the gain over the batches of a log: set "
                "logging_strategy=steps and logging_steps=2 or more."
            )
        self.stopped_at, self._sum, self._variance, self._last = None, 0.0, 0.0, 0
        for entry in state.log_history:  # of a run that is resumed
            self._follow(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or not self._follow(logs, state.global_step):
            return
        error = math.sqrt(self._variance)
        if state.global_step > args.get_warmup_steps(state.max_steps) and self._sum < -self.threshold * error:
            self.stopped_at = state.global_step
            control.should_training_stop = True
            logger.warning(
                f"stopped at step {state.global_step}: since its highest point the population gain has "
                f"summed to {self._sum:.2g} ± {error:.2g}: the next batches do not confirm what is learned."
            )

    def _follow(self, entry: Any, step: int) -> bool:
        """Add one log; False if it brings nothing to judge by."""
        if POPULATION not in entry:
            return False
        steps, self._last = step - self._last, step
        self._sum += steps * entry[POPULATION]
        self._variance += (steps * entry.get(SPREAD, 0.0)) ** 2
        if self._sum >= 0:
            self._sum = self._variance = 0.0
        return SPREAD in entry and self._variance > 0
