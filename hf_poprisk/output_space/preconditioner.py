"""What multiplies the gradient in a step: the diagonal P of K_P = J P Jᵀ, read from the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_poprisk.optimizer import PopRiskAdamW

NONE, ADAM, GATED = "none", "adam", "gated adam"


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def kind(optimizer: torch.optim.Optimizer) -> str:
    """``none`` for SGD, ``adam`` or ``gated adam``.

    Raises:
        ValueError: an optimizer whose step is not a diagonal times the gradient, as far as we know, or whose
            gate is decided inside the step.
    """
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam)  # AdamW is an Adam in torch
    groups = optimizer.param_groups
    if not known or any(group.get("amsgrad") or group.get("maximize") for group in groups):
        raise ValueError(
            f"OutputSpaceCallback cannot read the preconditioner of this {type(optimizer).__name__}: set "
            "optim to sgd, adamw_torch or poprisk_adamw, without amsgrad and maximize."
        )
    if isinstance(optimizer, torch.optim.SGD):
        return NONE
    if isinstance(optimizer, PopRiskAdamW) and optimizer.gate != "none" and optimizer.estimator == "ema":
        raise ValueError(
            "OutputSpaceCallback cannot read a gate of poprisk_estimator='ema', which is decided inside the "
            "step: set poprisk_estimator to example or group, or poprisk_gate to none."
        )
    return GATED if isinstance(optimizer, PopRiskAdamW) and optimizer.needs_examples else ADAM


def pace(optimizer: torch.optim.Optimizer) -> float:
    """How far a unit of gradient moves the weights in the end, per learning rate: SGD's momentum adds up."""
    group = optimizer.param_groups[0]
    momentum = group.get("momentum", 0.0)
    return (1 - group.get("dampening", 0.0)) / (1 - momentum) if momentum else 1.0


def left_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step about to be taken will not be: PopRiskAdamW's, by a gradient that is not finite."""
    return isinstance(optimizer, PopRiskAdamW) and optimizer._skip_step


@torch.no_grad()
def scales(
    optimizer: torch.optim.Optimizer, model: nn.Module, taken: bool = False
) -> dict[str, Tensor] | None:
    """P per trainable parameter for the step about to be taken: its gradient is there, its moments are old.

    Adam's is 1/(√v̂ + ε) with this step's gradient in v̂, times the gate's q where there is one, times
    the group's learning rate over the first group's. What no gradient has touched is not written: 0. None is
    the identity.

    Args:
        taken: of the step that was taken last, whose gradient is gone; the gate's q is gone as well, so not
            for a gated optimizer.
    """
    first = float(optimizer.param_groups[0]["lr"])
    descends = isinstance(optimizer, torch.optim.SGD)
    ratios = [float(group["lr"]) / first if first else 1.0 for group in optimizer.param_groups]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if descends and set(ratios) == {1.0} and held.issuperset(named.values()):
        return None
    found: dict[Tensor, Tensor] = {}
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        for p in group["params"]:
            if descends:
                found[p] = torch.full_like(p, ratio)
            elif p.grad is None and not taken:
                found[p] = torch.zeros_like(p)
            else:
                found[p] = _adam(optimizer, group, p, taken).mul_(ratio)
    # frozen when the optimizer was made: never written
    return {name: found[p] if p in found else torch.zeros_like(p) for name, p in named.items()}


def _adam(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor, taken: bool) -> Tensor:
    beta2, state = group["betas"][1], optimizer.state.get(p, {})
    step = torch.as_tensor(state.get("step", 0.0))
    second = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    if "exp_avg_sq" in state:
        second += state["exp_avg_sq"]
    count = step.item()
    if not taken:
        second.mul_(beta2).add_(p.grad.to(second).square(), alpha=1 - beta2)
        count += 1
    root = (second / (1 - beta2 ** max(count, 1))).sqrt_().add_(group["eps"])
    inverse = root.reciprocal_().mul_(second != 0)  # 1/ε would stand where no gradient ever was
    gated = isinstance(optimizer, PopRiskAdamW) and optimizer.needs_examples and not taken
    if gated and optimizer._is_gated(p, step):
        inverse *= optimizer._openness[p]
    return inverse
