"""The Kronecker eigenbasis of a layer's per-example gradients, and features of the examples in it.

With ``H_i = D_iᵀ A_i`` the gradient of example i, the basis is the eigenvectors U_L of ``Σ H_i H_iᵀ`` and U_R
of ``Σ H_iᵀ H_i``; in it the gradient is ``H'_i = U_Lᵀ H_i U_R = (D_i U_L)ᵀ (A_i U_R)``: the factors are
rotated, and H_i is never formed. V = mean (H'_i)², elementwise, gives Adam's preconditioner there,
P = 1/(√V + δ·mean √V).
(SOAP, arXiv 2409.11321; EKFAC, arXiv 1806.03884.)

A side longer than ``LONGEST``, a vocabulary, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST = 2048  # sides that are rotated
DAMPING = 1e-3  # δ


@dataclass
class LayerBasis:
    """Of one layer [out, in].

    Attributes:
        left: U_L, [out, out]; None where it stays.
        right: U_R, [in, in]; None where it stays.
        second_moment: V, [out, in] float32.
    """

    left: Tensor | None
    right: Tensor | None
    second_moment: Tensor

    def rotate(self, a: Tensor, d: Tensor) -> Tensor:
        """H' of some examples, [N, out, in] float32; a: [N, tokens, in], d: [N, tokens, out]."""
        a, d = a.float(), d.float()
        d = d if self.left is None else d @ self.left
        a = a if self.right is None else a @ self.right
        return torch.bmm(d.mT, a)

    def preconditioner(self) -> Tensor:
        """P, [out, in]."""
        root = self.second_moment.sqrt()
        return 1.0 / (root + DAMPING * root.mean()).clamp(min=torch.finfo(root.dtype).tiny)


def measure_bases(run: Callable[[Callable[[str, Tensor, Tensor], None]], None]) -> dict[str, LayerBasis]:
    """The bases of some layers, from two passes over some examples.

    Args:
        run: ``run(see)`` passes over the examples and calls ``see(name, A, D)`` per layer and micro-batch;
            A: [N, tokens, in], D: [N, tokens, out]. Every rank must call it, with examples of its own.

    Returns:
        Name → basis, the same on every rank.
    """
    sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def see_sides(name: str, a: Tensor, d: Tensor) -> None:
        a, d = a.float(), d.float()
        if name not in sides:
            left, right = (
                x.new_zeros(x.shape[-1], x.shape[-1]) if x.shape[-1] <= LONGEST else None for x in (d, a)
            )
            sides[name] = left, right
        left, right = sides[name]
        if left is not None:  # Σ_i D_iᵀ (A_i A_iᵀ D_i)
            left.addmm_(d.flatten(0, 1).T, (a @ a.mT @ d).flatten(0, 1))
        if right is not None:
            right.addmm_(a.flatten(0, 1).T, (d @ d.mT @ a).flatten(0, 1))

    run(see_sides)
    rotations = {name: tuple(map(_eigenvectors, pair)) for name, pair in sorted(sides.items())}
    sides.clear()
    moments: dict[str, Tensor] = {}
    counts = dict.fromkeys(rotations, 0)

    def see_moments(name: str, a: Tensor, d: Tensor) -> None:
        h = LayerBasis(*rotations[name], None).rotate(a, d)
        counts[name] += len(h)
        squares = h.square_().sum(0)
        moments[name] = moments[name].add_(squares) if name in moments else squares

    run(see_moments)
    total = _summed(torch.tensor(list(counts.values()), dtype=torch.float64))
    return {
        name: LayerBasis(*rotation, _summed(moments[name]) / float(count))
        for (name, rotation), count in zip(rotations.items(), total, strict=True)
    }


class Features:
    """``φ_i = Σ_layers S · P^½ H'_i``, S a sparse random projection: one sign and one bucket per coordinate.

    Args:
        bases: of the layers that are summed over.
        k: buckets; fewer if there are fewer coordinates.
        seed: of S.
    """

    def __init__(self, bases: Mapping[str, LayerBasis], k: int, seed: int = 0) -> None:
        self._bases, self._k = bases, min(k, sum(b.second_moment.numel() for b in bases.values()))
        generator = torch.Generator().manual_seed(seed)
        self._offsets: dict[str, int] = {}
        self._scales: dict[str, Tensor] = {}  # ±P^½, [out · in]
        for name, basis in bases.items():
            root = basis.preconditioner().sqrt_().flatten()
            sign = torch.randint(0, 2, root.shape, generator=generator, dtype=torch.int8).to(root.device)
            self._scales[name] = root.mul_(sign.mul_(2).sub_(1))
            self._offsets[name] = int(torch.randint(self._k, (), generator=generator))
        self._sum: Tensor | None = None

    def see(self, name: str, a: Tensor, d: Tensor) -> None:
        """a: [N, tokens, in], d: [N, tokens, out]."""
        if name not in self._bases:
            return
        h = self._bases[name].rotate(a, d).flatten(1).mul_(self._scales[name])
        # consecutive coordinates go to consecutive buckets, from the layer's own first one on
        whole = h.shape[1] // self._k * self._k
        phi = h[:, :whole].view(len(h), -1, self._k).sum(1)
        phi[:, : h.shape[1] - whole] += h[:, whole:]
        phi = phi.roll(self._offsets[name], 1)
        self._sum = phi if self._sum is None else self._sum.add_(phi)

    def take(self) -> Tensor:
        """The features of the examples seen since the last call, [N, k] float32."""
        found, self._sum = self._sum, None
        assert found is not None, "no layer was seen"
        return found


def _eigenvectors(side: Tensor | None) -> Tensor | None:
    """By falling eigenvalue, the same on every rank."""
    if side is None:
        return None
    side = _summed(side)
    if not side.isfinite().all():
        raise ValueError("the gradients of the labels' log-odds are not finite: the model gives NaN or inf.")
    vectors = torch.linalg.eigh(side.double())[1].flip(1).to(side.dtype).contiguous()
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(vectors, 0)  # signs are free
    return vectors


def _summed(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
