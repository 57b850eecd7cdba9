"""One pass over memory on a GPU: Triton kernels for the three places where a step moves many bytes.

    weight gradient    G and Q of a layer from the inputs' tiles: h_i never leaves the registers
    decide             reads G and Q, writes q over Q: 12 bytes per float32 parameter
    gated_adamw        reads w, G, m, v, q and writes w, m, v: 32 bytes per float32 parameter

Each has a plain PyTorch twin where it is called, which is also what runs on a CPU. The tests compare the
two in Triton's interpreter; **none of them has been timed on a GPU**, which is why ``faster`` times the
weight gradient against its twin on the machine it runs on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform; the plain code serves
    triton = None

_ELEMENTS = 2048  # per program of the elementwise kernels
# Three float32 accumulators of a tile fit the registers of eight warps (128 × 128 would spill on sm_90).
_TILE_OUT, _TILE_IN, _TILE_TOKENS = 128, 64, 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_chosen: dict[tuple[Any, ...], bool] = {}
_interpreted = False  # tests set it: take CPU tensors in Triton's interpreter


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: on a GPU, contiguous, not float64."""
    if triton is None or not all(t.is_contiguous() and t.dtype in _DTYPES for t in tensors):
        return False
    return all(t.is_cuda for t in tensors) or _interpreted


def faster(key: tuple[Any, ...], ways: Callable[[], tuple[Callable[[], None], Callable[[], None]]]) -> bool:
    """Whether the first of two ways beats the second; timed the first time a key is seen.

    Which one is ahead depends on the GPU, the tokens per example and the layer. Where reproducible runs
    are asked for, a clock must not decide about rounding: the answer is no.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    if key not in _chosen:
        fused, plain = ways()
        _chosen[key] = _seconds(fused) < _seconds(plain)
    return _chosen[key]


def _seconds(run: Callable[[], None]) -> float:
    run()  # compiles
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def weight_gradient(
    d: Tensor, a: Tensor, num_examples: int, grad: Tensor, square: Tensor, fresh: bool
) -> None:
    """``G = Σ_i h_i`` and ``Q += Σ_i h_i²`` of one use of a weight, ``h_i = D_iᵀ A_i``.

    Args:
        d: gradient of the layer's output, [rows, tokens, out]; row j belongs to example j mod N.
        a: its input, [rows, tokens, in], same dtype.
        num_examples: N.
        grad: [out, in], float32, overwritten.
        square: Q, [out, in], float32; overwritten if ``fresh``.
        fresh: whether Q has not been written to in this window.
    """
    (rows, tokens, out), width = d.shape, a.shape[-1]
    grid = (triton.cdiv(out, _TILE_OUT), triton.cdiv(width, _TILE_IN))
    with torch.cuda.device_of(grad):
        _weight_gradient[grid](
            d, a, grad, square, rows, tokens, out, width,
            N=num_examples, FRESH=fresh, BO=_TILE_OUT, BI=_TILE_IN, BT=_TILE_TOKENS, num_warps=8,
        )  # fmt: skip


def decide(grad: Tensor, sq_sum: Tensor, num_examples: int, soft: bool) -> Tensor:
    """Write q over Q, element by element; see ``gate.openness``.

    Returns:
        [4] float32: Σ q over the elements with Q > 0, their number, ΣG², ΣQ.
    """
    programs = triton.cdiv(grad.numel(), _ELEMENTS)
    sums = torch.empty(programs, 4, device=grad.device)
    scale = num_examples / (num_examples - 1)
    with torch.cuda.device_of(grad):
        _decide[(programs,)](grad, sq_sum, sums, grad.numel(), scale, SOFT=soft, BLOCK=_ELEMENTS)
    return sums.sum(0)


def gated_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    openness: Tensor,
    step: float,
    group: dict[str, Any],
) -> None:
    """One AdamW update in place, its write multiplied by q; the arithmetic is float32.

    Args:
        param, grad, exp_avg, exp_avg_sq: same shape.
        openness: q, same shape, float32.
        step: t, the number of this step, from 1.
        group: the parameter group: lr, betas, eps, weight_decay.
    """
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    with torch.cuda.device_of(param):
        _gated_adamw[(triton.cdiv(param.numel(), _ELEMENTS),)](
            param, grad, exp_avg, exp_avg_sq, openness, param.numel(),
            lr * group["weight_decay"], lr / (1 - beta1**step), 1 - beta1, 1 - beta2,
            math.sqrt(1 - beta2**step), group["eps"], BLOCK=_ELEMENTS,
        )  # fmt: skip
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))  # as torch's own operations do


if triton is not None:

    @triton.jit
    def _weight_gradient(
        d, a, grad, square, rows, tokens, out, width,
        N: tl.constexpr, FRESH: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        """A tile of G and Q; d is [rows, tokens, out] and a is [rows, tokens, width], contiguous."""
        o = tl.program_id(0) * BO + tl.arange(0, BO)
        i = tl.program_id(1) * BI + tl.arange(0, BI)
        t = tl.arange(0, BT)
        g = tl.zeros((BO, BI), tl.float32)
        q = tl.zeros((BO, BI), tl.float32)
        wide = tl.full((), 0, tl.int64) + tokens  # offsets of a large batch exceed 32 bits
        for example in range(N):
            h = tl.zeros((BO, BI), tl.float32)
            for row in range(example, rows, N):
                first = wide * row
                for start in range(0, tokens, BT):
                    here = start + t
                    token = first + here
                    dt = tl.load(
                        d + token[None, :] * out + o[:, None],
                        mask=(here[None, :] < tokens) & (o[:, None] < out),
                        other=0.0,
                    )
                    at = tl.load(
                        a + token[:, None] * width + i[None, :],
                        mask=(here[:, None] < tokens) & (i[None, :] < width),
                        other=0.0,
                    )
                    h = tl.dot(dt, at, h, input_precision="ieee")  # tf32 would decide gates
            h = h.to(d.dtype.element_ty).to(tl.float32)  # rounded as autograd rounds it
            g += h
            q += h * h
        where = o[:, None].to(tl.int64) * width + i[None, :]
        inside = (o[:, None] < out) & (i[None, :] < width)
        if not FRESH:
            q += tl.load(square + where, mask=inside, other=0.0)
        tl.store(grad + where, g, mask=inside)
        tl.store(square + where, q, mask=inside)

    @triton.jit
    def _decide(grad, sq_sum, sums, numel, scale, SOFT: tl.constexpr, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        k = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + k, mask=k < numel, other=0.0).to(tl.float32)
        s = tl.load(sq_sum + k, mask=k < numel, other=0.0)
        energy = g * g
        q = tl.where(energy > s, 1.0, 0.0)  # first, so that no contraction of g·g − s opens a tie
        if SOFT:
            q = tl.where(q > 0, tl.minimum(scale * (energy - s) / energy, 1.0), 0.0)
        tl.store(sq_sum + k, q, mask=k < numel)
        tl.store(sums + program * 4, tl.sum(tl.where(s > 0, q, 0.0)))
        tl.store(sums + program * 4 + 1, tl.sum(tl.where(s > 0, 1.0, 0.0)))
        tl.store(sums + program * 4 + 2, tl.sum(energy))
        tl.store(sums + program * 4 + 3, tl.sum(s))

    @triton.jit
    def _gated_adamw(
        param, grad, exp_avg, exp_avg_sq, openness, numel, decay, rate, new1, new2, root, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = k < numel
        w = tl.load(param + k, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + k, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + k, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + k, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(openness + k, mask=inside, other=0.0)
        # 1 − β is rounded once: a GPU takes scalars as float32, where 1 − 0.99999 is coarse
        m += new1 * (g - m)
        v += new2 * (g * g - v)
        w -= decay * w
        w -= rate * q * m / (tl.sqrt(v) / root + eps)
        tl.store(param + k, w.to(param.dtype.element_ty), mask=inside)
        tl.store(exp_avg + k, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + k, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
