"""Q over all ranks: one reduction of 4 bytes per parameter and step."""

from __future__ import annotations

from itertools import accumulate, groupby
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

# Elements per all-reduce: large enough to fill the link, small against the model.
_BUCKET_NUMEL = 1 << 24


def average_squares(sums: dict[Tensor, Tensor]) -> None:
    """``Q ← (Σ_ranks Q) / W²`` in place: in the units of gradients that DDP averages over W ranks.

    Args:
        sums: parameter → Q of this rank; the same parameters in the same order on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or (world := dist.get_world_size()) == 1:
        return
    _all_reduce(list(sums.values()), scale=1.0 / world**2)
    if world & (world - 1):
        # Dividing by such a world size rounds G, and an element that one example touched has
        # G² = Q exactly before it: rounding alone must not open it.
        for p, sum_ in sums.items():
            sum_.mul_(1.0 + 2.0 * torch.finfo(p.dtype).eps + 8.0 * torch.finfo(sum_.dtype).eps)


def _all_reduce(tensors: list[Tensor], scale: float) -> None:
    """Sum each tensor over the ranks and multiply it by ``scale``, in place, in flat buckets."""
    before = accumulate((t.numel() for t in tensors), initial=0)
    kinds = [(t.dtype, t.device, numel // _BUCKET_NUMEL) for t, numel in zip(tensors, before, strict=False)]
    for _, found in groupby(zip(kinds, tensors, strict=True), key=itemgetter(0)):
        bucket = [t for _, t in found]
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat)
        flat.mul_(scale)
        for tensor, reduced in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(reduced.view_as(tensor))
