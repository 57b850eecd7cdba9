"""One pass over memory on a CPU: numba loops for the places where a step moves many bytes.

    add_squares    adds several examples' h_i to G and their squares to Q: reads each h_i once
    decide         reads G and Q, writes q over Q: 12 bytes per parameter
    gated_adamw    reads w, G, m, v, q and writes w, m, v: 32 bytes per parameter

Each has a plain PyTorch twin where it is called, which is what runs without numba (it comes with
``hf_poprisk[cpu]``) and on everything but contiguous float32. They are compiled at their first use, in less
than a second each, and kept beside this file or in the user's cache folder if one of them is writable.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TILE = 2048  # elements that the loops work on together: in the first-level cache, summed in float32
_SHARE = 1 << 16  # elements that are worth a thread
_ZERO, _ONE = np.float32(0), np.float32(1)  # a Python number would make the arithmetic float64


def usable(*tensors: Tensor) -> bool:
    """Whether the loops can take these tensors: on a CPU, contiguous, float32; and numba is there."""
    plain = all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return plain and _loops() is not None


def add_squares(h: Tensor, grad: Tensor, square: Tensor, first: bool, fresh: bool) -> None:
    """``G += Σ h_i`` and ``Q += Σ h_i²``, on one thread: the blocks are too small to share.

    Args:
        h: gradients of n examples, [n, *shape].
        grad: G, [*shape]; overwritten if ``first``.
        square: Q, [*shape]; overwritten if ``fresh``.
    """
    numel = grad.numel()
    _loops().add_squares(h.view(len(h), numel).numpy(), _array(grad), _array(square), first, fresh)


def decide(grad: Tensor, sq_sum: Tensor, num_examples: int, soft: bool) -> Tensor:
    """Write q over Q, element by element; see ``gate.openness``.

    Returns:
        [4] float32: Σ q over the elements with Q > 0, their number, ΣG², ΣQ.
    """
    scale = np.float32(num_examples / (num_examples - 1))
    sums = _shared(_loops().decide, (grad, sq_sum), scale, soft)
    return torch.tensor([math.fsum(column) for column in zip(*sums, strict=True)])


def gated_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    openness: Tensor,
    step: float,
    group: dict[str, Any],
) -> None:
    """AdamW with the write multiplied by q, in place; see ``kernels_gpu.gated_adamw``."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    scalars = (
        1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 - beta1, 1 - beta2,
        1 / math.sqrt(1 - beta2**step), group["eps"],
    )  # fmt: skip
    written = param, exp_avg, exp_avg_sq
    tensors = *written, grad, openness
    _shared(_loops().gated_adamw, tensors, *map(np.float32, scalars))
    torch.autograd.graph.increment_version(written)  # as every in-place operation of torch does


def _array(x: Tensor) -> np.ndarray:
    return x.detach().view(-1).numpy()


def _shared(loop: Callable[..., Any], tensors: Sequence[Tensor], *scalars: Any) -> list[Any]:
    """Run ``loop(*arrays, low, high, *scalars)`` over all elements on as many threads as torch may use.

    Not numba's own threads: a second pool of OpenMP would get in the way of torch's.
    """
    arrays, numel = [_array(t) for t in tensors], tensors[0].numel()
    threads = max(1, min(torch.get_num_threads(), numel // _SHARE))
    edges = [numel * i // threads for i in range(threads + 1)]
    others = [
        _pool().submit(loop, *arrays, low, high, *scalars)
        for low, high in zip(edges[1:-1], edges[2:], strict=True)
    ]
    mine = loop(*arrays, 0, edges[1], *scalars)
    return [mine, *(other.result() for other in others)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hf_poprisk")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads; not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)


@cache
def _loops() -> Any:
    """The loops as machine code; None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None

    def compiled(loop: Callable[..., Any], *fastmath: str) -> Any:
        options = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
        try:
            return numba.njit(cache=True, **options)(loop)
        except RuntimeError:  # nowhere to write
            return numba.njit(**options)(loop)

    return SimpleNamespace(
        add_squares=compiled(_add_squares, "contract"),
        # Lets the sums be vectorised. Nothing else in it has two operations of a kind in a row; no
        # contraction, because g·g must be rounded before it is compared, as torch does: ties stay closed.
        decide=compiled(_decide, "reassoc", "nsz"),
        gated_adamw=compiled(_gated_adamw, "contract"),
    )


# What follows is compiled. [low, high) is this thread's share of the elements. The slices let the compiler
# see that no index is negative.


def _add_squares(h, grad, square, first, fresh):
    for start in range(0, grad.size, _TILE):
        stop = start + _TILE
        g, q = grad[start:stop], square[start:stop]
        if first:
            g[:] = _ZERO
        if fresh:
            q[:] = _ZERO
        for i in range(h.shape[0]):
            h_i = h[i, start:stop]
            for k in range(g.size):
                g[k] += h_i[k]
                q[k] += h_i[k] * h_i[k]


def _decide(grad, sq_sum, low, high, scale, soft):
    all_opened = all_live = all_energy = all_noise = 0.0  # float64
    for start in range(low, high, _TILE):
        stop = min(start + _TILE, high)
        g, s = grad[start:stop], sq_sum[start:stop]
        opened = live = energy = noise = _ZERO
        for k in range(g.size):
            g2 = g[k] * g[k]
            is_live = _ONE if s[k] > _ZERO else _ZERO
            live += is_live
            energy += g2
            noise += s[k]
            if soft:  # comparisons with NaN are false: it closes
                shrunk = scale * (g2 - s[k]) / g2
                q = _ONE if shrunk >= _ONE else (shrunk if shrunk > _ZERO else _ZERO)
            else:
                q = _ONE if g2 > s[k] else _ZERO
            opened += q * is_live
            s[k] = q
        all_opened += opened
        all_live += live
        all_energy += energy
        all_noise += noise
    return all_opened, all_live, all_energy, all_noise


def _gated_adamw(
    param, exp_avg, exp_avg_sq, grad, openness, low, high, kept, rate, new1, new2, scale, eps
):  # fmt: skip
    w, m, v = param[low:high], exp_avg[low:high], exp_avg_sq[low:high]
    g, q = grad[low:high], openness[low:high]
    for k in range(w.size):
        # 1 − β comes rounded once: formed in float32, that of β₂ = 0.99999 would be coarse
        m_k = m[k] + new1 * (g[k] - m[k])
        v_k = v[k] + new2 * (g[k] * g[k] - v[k])
        m[k], v[k] = m_k, v_k
        w[k] = w[k] * kept - rate * q[k] * m_k / (math.sqrt(v_k) * scale + eps)
