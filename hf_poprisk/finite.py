"""Gradients that are not finite: whether there are any, and whether there is anything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_poprisk.per_example.fsdp2 import local


def all_finite(grads: Iterable[Tensor | None]) -> bool:
    """Whether every number of every gradient is finite; waits for the device, and the ranks if sharded."""
    return bool(total_norm(grads).isfinite())


def total_norm(grads: Iterable[Tensor | None]) -> Tensor:
    """The norm of all gradients together; every rank must ask if they are sharded."""
    norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def none_finite(params: Iterable[Tensor]) -> bool:
    """Whether no gradient is finite; zeros, as of experts that no token was sent to, say nothing.

    Waits for the device, as a rule for one gradient.
    """
    grads = [p.grad for p in params if p.grad is not None]
    shards = (local(grad.detach()) for grad in grads)
    found = any(0 < float(grad.abs().max()) < math.inf for grad in shards if grad.numel())
    if any(isinstance(grad, DTensor) for grad in grads):
        anywhere = torch.tensor(float(found), device=local(grads[0]).device)
        dist.all_reduce(anywhere)
        found = bool(anywhere)
    return not found


def why_none_is(params: Iterable[Tensor], describe: Callable[[Tensor], str]) -> str:
    """One sentence: the weights were damaged before training, or the loss is not finite.

    Args:
        describe: gives the name of a parameter.
    """
    bad = next((p for p in params if not local(p).isfinite().all()), None)
    if bad is None:
        return (
            "no gradient of the first step is finite, although the weights are: look for examples whose "
            "loss is not, or train in bfloat16 or float32."
        )
    return (
        f"no gradient of the first step is finite, because {describe(bad)} is not: load the weights again, "
        "or train in bfloat16 or float32."
    )
