"""What multiplies the gradient in a step: the diagonal P of K_P = J P Jᵀ, read from the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_poprisk.optimizer import PopRiskAdamW

NONE, ADAM, GATED = "none", "adam", "gated adam"


def kind(optimizer: torch.optim.Optimizer) -> str:
    """``none`` for SGD, ``adam`` or ``gated adam``.

    Raises:
        ValueError: an optimizer whose step is not a diagonal times the gradient, as far as we know, or whose
            gate is decided inside the step.
    """
    wrong, ours = None, isinstance(optimizer, PopRiskAdamW)
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam)  # AdamW is an Adam in torch
    if not known or any(g.get("amsgrad") or g.get("maximize") for g in optimizer.param_groups):
        wrong = (
            f"the preconditioner of this {type(optimizer).__name__}: set optim to sgd, adamw_torch or "
            "poprisk_adamw, without amsgrad and maximize."
        )
    elif ours and optimizer.gate != "none" and optimizer.estimator == "ema":
        wrong = (
            "a gate of poprisk_estimator='ema', which is decided inside the step: set poprisk_estimator to "
            "example or group, or poprisk_gate to none."
        )
    elif ours and optimizer.basis != "coordinate":
        wrong = (
            f"a step of poprisk_basis={optimizer.basis!r}, which is diagonal in another basis: set "
            "poprisk_basis to coordinate."
        )
    if wrong:
        raise ValueError(f"OutputSpaceCallback cannot read {wrong}")
    if isinstance(optimizer, torch.optim.SGD):
        return NONE
    return GATED if ours and optimizer.needs_examples else ADAM


@torch.no_grad()
def scales(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor] | None:
    """P per trainable parameter for the step about to be taken: its gradient is there, its moments are old.

    Adam's is 1/(√v̂ + ε) with this step's gradient in v̂, times the gate's q where there is one; all times
    the group's learning rate over the first group's. What the step does not write has 0. None is the
    identity.
    """
    first = float(optimizer.param_groups[0]["lr"])
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    descends = isinstance(optimizer, torch.optim.SGD)
    if descends and all(p in group_of and group_of[p]["lr"] == first for p in named.values()):
        return None
    found = {}
    for name, p in named.items():
        if p not in group_of or p.grad is None:
            found[name] = torch.zeros_like(p)
            continue
        found[name] = torch.ones_like(p) if descends else _adam(optimizer, group_of[p], p)
        if first:  # at 0, where a warm-up begins, every group is
            found[name] *= float(group_of[p]["lr"]) / first
    return found


def _adam(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    beta2, state = group["betas"][1], optimizer.state.get(p, {})
    step = torch.as_tensor(state.get("step", 0.0))
    second = (1 - beta2) * p.grad.to(torch.promote_types(p.dtype, torch.float32)).square()
    if state:
        second += beta2 * state["exp_avg_sq"]
    root = (second / (1 - beta2 ** (step.item() + 1))).sqrt() + group["eps"]
    inverse = (second != 0) / root  # 1/ε would stand where no gradient ever was
    if isinstance(optimizer, PopRiskAdamW):
        inverse *= (optimizer._openness or {}).get(p, 1)
    return inverse
