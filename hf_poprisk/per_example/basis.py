"""The Kronecker eigenbasis of a layer's per-example gradients, and features of the examples in it.

With ``H_i = D_iᵀ A_i`` the gradient of example i, the basis is the leading eigenvectors U_L of ``Σ H_i H_iᵀ``
and U_R of ``Σ H_iᵀ H_i``; in it the gradient is ``H'_i = U_Lᵀ H_i U_R = (D_i U_L)ᵀ (A_i U_R)``: the factors
are rotated, and H_i is not formed where it is larger than these. V = mean (H'_i)², elementwise, gives Adam's
preconditioner there, P = 1/(√V + δ·mean √V).
(SOAP, arXiv 2409.11321; EKFAC, arXiv 1806.03884.)

The other directions are left out. Few examples have a part in them, which P would make as large as what they
have in common. Of a long side, a vocabulary, the leading ones are found from a sketch (Nyström's
approximation; Tropp et al., arXiv 1706.05736, algorithm 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_poprisk.per_example.ranks import gathered

LEADING = 256  # directions of a side
SKETCH = 2 * LEADING  # columns of the sketch of a side that is more than twice as long
LONGEST = 2048  # a side whose complete basis is wanted; its eigenvectors take time as the cube
DAMPING = 1e-3  # δ
SEED = 0  # of the projection


Sides = tuple[Tensor | None, Tensor | None]  # U_L [out, out] and U_R [in, in]; None does not rotate a side


def rotated(sides: Sides, x: Tensor) -> Tensor:
    """U_Lᵀ X U_R, [..., out, in], in the dtype of the bases; x itself where there is none."""
    left, right = sides
    with torch.autocast(x.device.type, enabled=False):
        x = x if left is None else left.T @ x.to(left.dtype)
        return x if right is None else x.to(right.dtype) @ right


def rotated_back(sides: Sides, x: Tensor) -> Tensor:
    """U_L X U_Rᵀ, the inverse."""
    left, right = sides
    return rotated((None if left is None else left.T, None if right is None else right.T), x)


@dataclass
class LayerBasis:
    """Of one layer [out, in]; l and r are the directions that are kept of its sides.

    Attributes:
        left: U_L, [out, l].
        right: U_R, [in, r].
        second_moment: V, [l, r] float32.
    """

    left: Tensor
    right: Tensor
    second_moment: Tensor

    def rotate(self, a: Tensor, d: Tensor) -> Tensor:
        """H' of some examples, [N, l, r] float32; a: [N, tokens, in], d: [N, tokens, out]."""
        return torch.bmm((d.float() @ self.left).mT, a.float() @ self.right)

    def preconditioner(self) -> Tensor:
        """P, [l, r]; zero where no gradient was measured, of which the scale is not known."""
        root = self.second_moment.sqrt()
        if not root.any():
            return root
        return 1.0 / (root + DAMPING * root.mean()).clamp(min=torch.finfo(root.dtype).tiny)


def measure_bases(run: Callable[[Callable[[str, Tensor, Tensor], None]], None]) -> dict[str, LayerBasis]:
    """The bases of some layers, from two passes over some examples.

    Args:
        run: ``run(see)`` passes over the examples and calls ``see(name, A, D)`` per layer and micro-batch;
            A: [N, tokens, in], D: [N, tokens, out]. Every rank must call it, with examples of its own.

    Returns:
        Name → basis, the same on every rank.
    """
    sides: dict[str, list[Tensor]] = {}
    test_matrix = _TestMatrices()

    def see_sides(name: str, a: Tensor, d: Tensor) -> None:
        a, d = a.float(), d.float()
        if name not in sides:
            widths = d.shape[-1], a.shape[-1]
            sides[name] = [d.new_zeros(n, SKETCH if _is_long(n) else n) for n in widths]
        left, right = sides[name]  # Σ_i D_iᵀ A_i A_iᵀ D_i Ω, and the same of the other side
        if d.shape[-1] * a.shape[-1] <= a.shape[1] * (d.shape[-1] + a.shape[-1]):
            h = torch.bmm(d.mT, a)  # smaller than its factors, and then faster
            for total, x in ((left, h.transpose(0, 1)), (right, h.permute(2, 0, 1))):
                x, omega = x.flatten(1), test_matrix.of(total)
                total.addmm_(x, x.T if omega is None else x.T @ omega)
            return
        left.addmm_(d.flatten(0, 1).T, (a @ a.mT @ test_matrix.times(d)).flatten(0, 1))
        right.addmm_(a.flatten(0, 1).T, (d @ d.mT @ test_matrix.times(a)).flatten(0, 1))

    device = _on_all_ranks(run, see_sides, sides)
    rotations = {
        name: tuple(_leading(x, test_matrix.of(x), LEADING) for x in sides[name]) for name in sorted(sides)
    }
    sides.clear()
    moments = {
        name: torch.zeros(*(x.shape[1] for x in pair), device=device) for name, pair in rotations.items()
    }
    counts = dict.fromkeys(rotations, 0)

    def see_moments(name: str, a: Tensor, d: Tensor) -> None:
        h = LayerBasis(*rotations[name], None).rotate(a, d)
        counts[name] += len(h)
        moments[name] += h.square_().sum(0)

    run(see_moments)
    total = summed(torch.tensor(list(counts.values()), device=device))
    return {
        name: LayerBasis(*rotation, summed(moments[name]) / float(count))
        for (name, rotation), count in zip(rotations.items(), total, strict=True)
    }


def complete_bases(
    run: Callable[[Callable[[str, Tensor, Tensor], None]], None],
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """All directions of each side, from one pass; ``run`` is as for ``measure_bases``.

    Returns:
        Name → (U_L [out, out], U_R [in, in]) float32, orthogonal, the same on every rank; None for a side
        that is longer than 2,048.
    """
    sides: dict[str, list[Tensor | None]] = {}

    def see(name: str, a: Tensor, d: Tensor) -> None:
        a, d = a.float(), d.float()
        if name not in sides:
            sides[name] = [x.new_zeros(n, n) if (n := x.shape[-1]) <= LONGEST else None for x in (d, a)]
        for total, x, y in zip(sides[name], (d, a), (a, d), strict=True):
            if total is not None:  # Σ_i X_iᵀ Y_i Y_iᵀ X_i
                total.addmm_(x.flatten(0, 1).T, (y @ y.mT @ x).flatten(0, 1))

    _on_all_ranks(run, see, sides)
    return {
        name: tuple(None if x is None else _leading(x, None, len(x)) for x in sides[name])  # type: ignore[misc]
        for name in sorted(sides)
    }


def _on_all_ranks(run: Callable[[Any], None], see: Any, sides: dict[str, Any]) -> torch.device:
    """Run a pass that fills ``sides``, and add zeros for the layers that other ranks alone reached.

    An expert may be one. What is not the same on all ranks cannot be summed over them.

    Returns:
        Where the sums are.

    Raises:
        ValueError: what a rank's pass raised, on all of them.
    """
    refused = None
    try:
        run(see)
    except ValueError as error:
        refused = str(error)
    mine = {name: [x if x is None else x.shape for x in pair] for name, pair in sides.items()}
    kinds = {x.device.type for pair in sides.values() for x in pair if x is not None}
    ranks = gathered((refused, mine, kinds))
    if refused := next((sentence for sentence, *_ in ranks if sentence), None):
        raise ValueError(refused)
    device = torch.device(next((kind for *_, kinds in ranks for kind in kinds), "cpu"))
    for _, shapes, _ in ranks:
        for name, pair in shapes.items():
            sides.setdefault(name, [x if x is None else torch.zeros(x, device=device) for x in pair])
    return device


class Features:
    """``φ_i = Σ_layers S · P^½ H'_i``, S a sparse random projection: one sign and one bucket per coordinate.

    Args:
        bases: of the layers that are summed over.
        k: buckets; fewer if there are fewer coordinates.
    """

    def __init__(self, bases: Mapping[str, LayerBasis], k: int) -> None:
        self._bases, self._k = bases, min(k, sum(b.second_moment.numel() for b in bases.values()))
        generator = torch.Generator().manual_seed(SEED)
        self._offsets: dict[str, int] = {}
        self._scales: dict[str, Tensor] = {}  # ±P^½, [l · r]
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
        if self._sum is None:
            self._sum = h.new_zeros(len(h), self._k)
        # consecutive coordinates go to consecutive buckets, from the layer's own first one on and around
        place = self._offsets[name]
        while h.shape[1]:
            part, h = h[:, : self._k - place], h[:, self._k - place :]
            self._sum[:, place : place + part.shape[1]] += part
            place = 0

    def take(self, num_examples: int) -> Tensor:
        """The features of the N examples seen since the last call, [N, k] float32; zero if no layer ran."""
        found, self._sum = self._sum, None
        return torch.zeros(num_examples, self._k) if found is None else found


class _TestMatrices:
    """Ω of every long side; the same on every rank."""

    def __init__(self) -> None:
        self._drawn: dict[int, Tensor] = {}

    def of(self, sketch: Tensor) -> Tensor | None:
        """[length, columns]; None stands for the identity."""
        length = len(sketch)
        if _is_long(length) and length not in self._drawn:
            generator = torch.Generator().manual_seed(length)
            self._drawn[length] = torch.randn(length, SKETCH, generator=generator).to(sketch.device)
        return self._drawn.get(length)

    def times(self, x: Tensor) -> Tensor:
        """x Ω, [N, tokens, columns], of x [N, tokens, length]."""
        omega = self.of(x[0, 0])
        return x if omega is None else x @ omega


def _is_long(length: int) -> bool:
    """Whether a sketch is faster than the eigenvectors of the side itself."""
    return length > 2 * SKETCH


def _leading(sketch: Tensor, omega: Tensor | None, count: int) -> Tensor:
    """Leading eigenvectors of S, from S Ω [length, columns]; the same on every rank."""
    sketch = summed(sketch)
    if not sketch.isfinite().all():
        raise ValueError("the gradients of the examples are not finite: the model gives NaN or inf.")
    y = sketch.double()
    if omega is None:
        vectors = torch.linalg.eigh(y)[1].flip(1)
    else:
        omega = omega.double()
        shift = float(torch.finfo(sketch.dtype).eps * y.norm())  # makes Ωᵀ S Ω positive definite
        y = y + shift * omega
        core = omega.T @ y
        values, basis = torch.linalg.eigh((core + core.T) / 2)
        root = y @ (basis / values.clamp(min=shift + torch.finfo(y.dtype).tiny).sqrt())  # S ≈ root rootᵀ
        # its left singular vectors; those of small ones would not be quite orthogonal
        vectors = torch.linalg.qr(root @ torch.linalg.eigh(root.T @ root)[1].flip(1)[:, :count])[0]
    vectors = vectors[:, :count].to(sketch.dtype).contiguous()
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(vectors, 0)  # signs are free
    return vectors


def summed(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
