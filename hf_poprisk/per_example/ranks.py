"""What ranks have in common: Q, in one reduction of 4 bytes per parameter and step, and what they say."""

from __future__ import annotations

import math
from itertools import accumulate, groupby
from operator import itemgetter
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Elements per all-reduce: large enough to fill the link, small against the model.
_BUCKET_NUMEL = 1 << 24
_T = TypeVar("_T")


def gathered(own: _T) -> list[_T]:
    """A small object of every rank, in their order: before one of them refuses what others go on with."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def average_squares(sums: dict[Tensor, Tensor]) -> None:
    """``Q ← (Σ_ranks Q) / W²`` in place: in the units of gradients that DDP averages over W ranks.

    Args:
        sums: parameter → Q of this rank; the same parameters in the same order on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or (world := dist.get_world_size()) == 1:
        return
    add_over_ranks(list(sums.values()))
    divide_squares(sums, world)


def divide_squares(sums: dict[Tensor, Tensor], divisor: float) -> None:
    """``Q ← Q / divisor²`` in place: in the units of gradients that are divided by ``divisor``."""
    for p, sum_ in sums.items():
        scale = 1.0 / divisor**2
        if math.frexp(divisor)[0] != 0.5:
            # Dividing by what is no power of two rounds G, and an element that one example touched has
            # G² = Q exactly before it: rounding alone must not open it.
            scale *= 1.0 + 2.0 * torch.finfo(p.dtype).eps + 8.0 * torch.finfo(sum_.dtype).eps
        sum_.mul_(scale)


def add_over_ranks(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum each tensor over the ranks of a group (default: all), in place, in flat buckets."""
    before = accumulate((t.numel() for t in tensors), initial=0)
    kinds = [(t.dtype, t.device, numel // _BUCKET_NUMEL) for t, numel in zip(tensors, before, strict=False)]
    for _, found in groupby(zip(kinds, tensors, strict=True), key=itemgetter(0)):
        bucket = [t for _, t in found]
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, reduced in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(reduced.view_as(tensor))
