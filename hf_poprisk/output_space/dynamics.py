"""From a recording: propagator, dissipation Gramian, signal channel and reservoir, what reaches test outputs.

Between two records K, K_QS and B are taken as constant, at a mean of the two. With M = K^½ B K^½ and τ the
sum of the learning rates in between, everything follows from what a mode of M at rate μ keeps of itself,
r(μ):

    gradient descent    r = Π_j (1 − η_j μ)      as it is: nothing is lost to the size of its steps
    flow                r = exp(−τ μ)            its limit of small steps: mini-batches, momentum, Adam (K_P)

    φ = (1 − r)/μ             P = 1 − B K^½ φ(M) K^½             g ← P g
    ψ = (1 − r²)/(2μ)         W = K^½ ψ(M) K^½                   ΔΦ = −gᵀW g
    χ = (τ − φ)/μ             𝒢 = K_QS (τ − B K^½ χ(M) K^½)      ΔU_Q = −𝒢 g

Both rules share φ, ψ and χ: the sums over steps telescope to the integrals' form. So for a model linear in
its parameters and a squared loss gradient descent is reproduced to rounding, however rarely it was recorded;
ψ then holds the second-order term of the loss, η(1 − ημ/2) per step. Over several intervals, P = P_R … P_1,
W = Σ Pᵀ W_k P and 𝒢 = Σ 𝒢_k P with P up to each interval. ker W ⊆ ker 𝒢 carries over: if every ημ < 2 then
each W_k is positive with the kernel of K_k, on which 𝒢_k = τ K_QS vanishes as well. Source: arXiv:2605.01172,
definitions of P_g, W, 𝒢; the discretisation is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_poprisk.output_space.recording import GRADIENT_DESCENT, Recording

_FLAT = 10**0.5  # a spectrum whose extremes differ by less is of one piece


@dataclass(frozen=True)
class Evolution:
    """What happened between two moments of training; N probe outputs, M test outputs, all float64.

    Attributes:
        propagator: P [N, N]: an output gradient, moved on.
        gramian: W [N, N], symmetric: the loss falls by gᵀW g.
        transfer: 𝒢 [M, N]: the test outputs move by −𝒢 g.
        stable: whether no step overshot, ημ < 2: gradient descent's W ≥ 0 needs it, and a flow never sees it.
    """

    propagator: Tensor
    gramian: Tensor
    transfer: Tensor
    stable: bool = True

    def then(self, later: Evolution) -> Evolution:
        """Both, one after the other."""
        p = self.propagator
        return Evolution(
            later.propagator @ p,
            self.gramian + p.T @ later.gramian @ p,
            self.transfer + later.transfer @ p,
            self.stable and later.stable,
        )


def nothing(n: int, m: int) -> Evolution:
    """The evolution of no time."""
    one = torch.eye(n, dtype=torch.float64)
    return Evolution(one, torch.zeros_like(one), one.new_zeros(m, n))


def evolve(
    kernel: Tensor, cross_kernel: Tensor, curvature: Tensor, learning_rates: Sequence[float], rule: str
) -> Evolution:
    """The evolution over steps of constant K [N, N], K_QS [M, N] and B [N, N], by ``rule``.

    K is positive semidefinite: its eigenvalues below rounding are taken as zero.
    """
    dtype = kernel.dtype
    kernel, cross_kernel, curvature = kernel.double(), cross_kernel.double(), curvature.double()
    values, vectors = torch.linalg.eigh(kernel)
    values = values.where(values > len(values) * torch.finfo(dtype).eps * values.abs().max(), 0)
    root = (vectors * values.sqrt()) @ vectors.T
    rates, modes = torch.linalg.eigh(root @ curvature @ root)
    basis = root @ modes  # K^½ V: every function of M stands between it and its transpose
    phi, psi, chi = (_descent if rule == GRADIENT_DESCENT else _flow)(rates, learning_rates)
    one = torch.eye(len(values), dtype=torch.float64)
    return Evolution(
        one - curvature @ (basis * phi) @ basis.T,
        (basis * psi) @ basis.T,
        cross_kernel @ (sum(learning_rates) * one - curvature @ (basis * chi) @ basis.T),
        max(learning_rates, default=0.0) * float(rates.max()) < 2,
    )


def _descent(rates: Tensor, learning_rates: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """φ, ψ, χ as sums over steps, without a division by μ."""
    phi, psi, chi = (torch.zeros_like(rates) for _ in range(3))
    kept = torch.ones_like(rates)
    for rate in learning_rates:
        chi += rate * phi
        phi += rate * kept
        psi += rate * (1 - rate * rates / 2) * kept**2
        kept *= 1 - rate * rates
    return phi, psi, chi


def _flow(rates: Tensor, learning_rates: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """φ, ψ, χ as integrals."""
    time = sum(learning_rates)
    x = rates * time
    return time * _phi1(x), time * _phi1(2 * x), time**2 * _phi2(x)


def _phi1(x: Tensor) -> Tensor:
    """(1 − e^−x)/x."""
    small = x.abs() < 1e-8
    return torch.where(small, 1 - x / 2, -torch.expm1(-x) / x.where(~small, 1))


def _phi2(x: Tensor) -> Tensor:
    """(e^−x − 1 + x)/x²."""
    small = x.abs() < 0.05  # where the difference would cancel; the series' next term is below 1e-16
    series = 1 / 2 - x / 6 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8 * (1 - x / 9))))))
    safe = x.where(~small, 1)
    return torch.where(small, series, (torch.expm1(-safe) + safe) / safe**2)


def intervals(recording: Recording) -> Iterator[Evolution]:
    """The evolution from each record to the next, R − 1 of them.

    A step of gradient descent moves u by the mean of J J_tᵀ along its path, not of J Jᵀ: the symmetric part
    of that lies a quarter, not half of the way from K_t to K_{t+1}. With it the loss is followed to second
    order in the step, displacements to first: the antisymmetric part is left out.
    """
    series = recording.series
    for i, (first, last) in enumerate(zip(recording.steps, recording.steps[1:], strict=False)):
        later = 0.5 - 0.25 / (last - first) if recording.rule == GRADIENT_DESCENT else 0.5
        kernel, cross = (
            torch.lerp(series[name][i], series[name][i + 1], later) for name in ("kernel", "cross_kernel")
        )
        curvature = torch.block_diag(*(series["curvatures"][i] + series["curvatures"][i + 1]) / 2)
        yield evolve(kernel, cross, curvature, recording.learning_rates[first:last], recording.rule)


@dataclass(frozen=True)
class Split:
    """The signal channel and the reservoir of a Gramian.

    Attributes:
        eigenvalues: of W, [N] float64, descending.
        vectors: [N, N], a column each.
        tolerance: the channel's eigenvalues are larger.
        channel: its dimension.
    """

    eigenvalues: Tensor
    vectors: Tensor
    tolerance: float
    channel: int

    def reservoir_share(self, direction: Tensor) -> float:
        """The share, 0 to 1, of the squared length of a direction [N] or [n, k] that is in the reservoir."""
        parts = (self.vectors.T @ direction.reshape(-1).double()).square()
        return float(parts[self.channel :].sum() / parts.sum())


def split(gramian: Tensor, precision: torch.dtype = torch.float64) -> Split:
    """Cut the spectrum of W [N, N], of a kernel computed in ``precision``, where it falls into two groups.

    The tolerance is Otsu's threshold of the logarithms: the cut with the largest variance between its two
    sides. Eigenvalues below rounding, N·eps of the largest, count as that. A spectrum within half a
    decade is of one piece, all channel; of W = 0 all is reservoir.
    """
    values, vectors = torch.linalg.eigh(gramian.double())
    values, vectors, n = values.flip(0), vectors.flip(1), len(gramian)
    if not values[0] > 0:
        return Split(values, vectors, float(values[0].abs()), 0)
    floor = float(n * torch.finfo(precision).eps * values[0])
    raised = values.clamp(min=floor)
    if n == 1 or values[0] < _FLAT * raised[-1]:
        return Split(values, vectors, float(raised[-1] / 2), n)
    logs, upper = raised.log(), torch.arange(1, n, dtype=torch.float64)  # how many are above the cut
    sums = logs.cumsum(0)
    gaps = sums[:-1] / upper - (sums[-1] - sums[:-1]) / (n - upper)
    channel = int((upper * (n - upper) * gaps**2).argmax()) + 1
    return Split(values, vectors, float(logs[channel - 1 : channel + 1].mean().exp()), channel)
