"""The arithmetic of a gated step, on one tensor at a time: q from G and Q, and AdamW times q.

A fused kernel does it where one can; the torch code beside it gives the same numbers, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_poprisk.gate import openness
from hf_poprisk.per_example import kernels_cpu, kernels_gpu
from hf_poprisk.per_example.basis import Sides, rotated, rotated_back

Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # param, grad, exp_avg, exp_avg_sq, step
_PIECE = 1 << 18  # elements that are worked on together: they stay in a core's cache


def decide(grad: Tensor, sq_sum: Tensor, num_examples: int, gate: str) -> Tensor:
    """Write q over Q, which needs no memory beyond Q.

    Args:
        grad: G, any shape and dtype.
        sq_sum: Q, same shape, float32 or float64; overwritten.
        num_examples: b, at least 2.
        gate: ``hard`` or ``soft``.

    Returns:
        [4] float32, the sums of ``GateStatistics.add``: Σ q over the elements with Q > 0, their number,
        ΣG², ΣQ.
    """
    if not grad.numel():  # a rank without a part of it
        return torch.zeros(4, device=grad.device)
    for fused in (kernels_gpu, kernels_cpu):
        if fused.usable(grad, sq_sum):
            return fused.decide(grad, sq_sum, num_examples, gate == "soft")
    pieces = [(grad, sq_sum)]
    if grad.device.type == "cpu" and grad.is_contiguous() and sq_sum.is_contiguous():
        # every pass over a piece but the first is in the cache
        pieces = list(zip(*(x.view(-1).split(_PIECE) for x in (grad, sq_sum)), strict=True))
    sums = []
    for g, s in pieces:
        g = g.to(s.dtype)
        live, noise = torch.gt(s, 0, out=torch.empty_like(s)), s.sum()
        energy = torch.dot(g.reshape(-1), g.reshape(-1))
        openness(g, s, num_examples, gate, out=s)
        sums += [torch.dot(s.reshape(-1), live.reshape(-1)), live.sum(), energy, noise]
    return torch.stack(sums).view(-1, 4).sum(0).float()


def plain_adamw(group: dict[str, Any], rows: list[Row]) -> None:
    """``torch.optim.AdamW`` on the rows, in place."""
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
        lr=group["lr"],
        **_settings(group),
    )


def gated_adamw(group: dict[str, Any], row: Row, q: Tensor) -> None:
    """AdamW with its write multiplied by q, in place; moments and decay are AdamW's own.

    Without a kernel: AdamW's own update, and then back towards where the weight would be without its write.

    Args:
        group: the parameter group: lr, betas, eps, weight_decay.
        row: of the parameter.
        q: its openness, same shape, floating point.
    """
    *tensors, step = row
    if not q.numel():
        step += 1
        return
    fused = next((k for k in (kernels_gpu, kernels_cpu) if k.usable(*tensors, q)), None)
    if fused is not None:
        step += 1
        fused.gated_adamw(*tensors, q, step.item(), group)
        return
    kept = 1 - float(group["lr"]) * float(group["weight_decay"])
    param = tensors[0]
    if param.device.type == "cpu" and all(x.is_contiguous() for x in (*tensors, q)):
        step += 1
        lr, settings = float(group["lr"]), _settings(group)
        for w, g, m, v, piece_q in zip(*(x.view(-1).split(_PIECE) for x in (*tensors, q)), strict=True):
            unwritten = w * kept  # what is touched twice is in the cache the second time
            # the kernel of torch.optim.AdamW(fused=True) alone; step counts this one already
            torch._fused_adamw_([w], [g], [m], [v], [], [step], lr=lr, **settings)
            take_back(w, unwritten, piece_q)
    else:
        unwritten = param * kept
        plain_adamw(group, [row])
        take_back(param, unwritten, q)


def compensated_adamw(group: dict[str, Any], row: Row, q: Tensor | None, lost: Tensor) -> None:
    """AdamW in float32 on weights of low precision; what their rounding loses is added back the next time.

    Args:
        group, row, q: as for ``gated_adamw``; q is None for no gate.
        lost: by the roundings so far, of the weights' shape and dtype; overwritten.
    """
    *kept, step = (row[1], *row[2:4], row[0], row[4])
    grad, exp_avg, exp_avg_sq, exact = (x.float() for x in kept)
    exact += lost
    wide: Row = (exact, grad, exp_avg, exp_avg_sq, step)
    if q is None:
        plain_adamw(group, [wide])
    else:
        gated_adamw(group, wide, q)
    for x, rounded in zip((exp_avg, exp_avg_sq, exact), kept[1:], strict=True):
        rounded.copy_(x)
    lost.copy_(exact.sub_(row[0]))


def adamw_in_basis(group: dict[str, Any], row: Row, q: Tensor | None, sides: Sides) -> None:
    """AdamW in a basis, with its write multiplied by q there: weight decay is the same in every basis.

    Args:
        group: as for ``gated_adamw``.
        row: of a matrix; its moments are in the basis, the gradient is not.
        q: in the basis; None for no gate.
        sides: the basis.
    """
    param, grad, *moments = row
    write = torch.zeros_like(param)
    turned: Row = (write, rotated(sides, grad).to(param.dtype), *moments)  # type: ignore[assignment]
    undecayed = {**group, "weight_decay": 0.0}
    if q is None:
        plain_adamw(undecayed, [turned])
    else:
        gated_adamw(undecayed, turned, q)
    param.mul_(1 - float(group["lr"]) * float(group["weight_decay"]))
    param.add_(rotated_back(sides, write))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What AdamW and its kernel both take by name, the learning rate aside."""
    beta1, beta2 = group["betas"]
    off = {"amsgrad": False, "maximize": False}
    return {"beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"], "eps": group["eps"], **off}


def take_back(param: Tensor, unwritten: Tensor, q: Tensor) -> None:
    """``unwritten + q·(param − unwritten)``, in place."""
    # q = 0 gives unwritten and q = 1 param, bit for bit
    torch.lerp(unwritten, param, q.to(param.dtype), out=param)
