"""The rule, as pure functions of two sums.

One optimizer step sees ``b`` examples. For a scalar parameter let ``h_i`` be example i's contribution
to the accumulated gradient, ``G = Σ h_i`` and ``Q = Σ h_i²``. Treating each example as held out from
the other ``b − 1``, a step along this parameter is expected to help an unseen example if and only if

    mu² > sigma² / (b − 1)        (sigma² is the 1/b variance)        ⇔        G² > Q.

Source: E. Litman and G. Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

GATES = ("hard", "soft", "none")


def margin(grad_sum: Tensor, sq_sum: Tensor) -> Tensor:
    """Leave-one-out evidence ``G² − Q = Σ_{i≠j} h_i h_j``; positive where the gate opens.

    Its expectation over independent examples is ``b (b − 1)`` times the squared population gradient.

    Args:
        grad_sum: ``G = Σ h_i``, any shape, floating point.
        sq_sum: ``Q = Σ h_i²``, same shape.

    Returns:
        Same shape and dtype as ``grad_sum``.
    """
    return grad_sum * grad_sum - sq_sum


def openness(
    grad_sum: Tensor,
    sq_sum: Tensor,
    num_examples: int,
    gate: str = "hard",
    out: Tensor | None = None,
) -> Tensor:
    """How far each parameter may move: ``q`` in [0, 1], the factor on the optimizer's write.

    * ``hard``: 1 where ``G² > Q``, else 0.
    * ``soft``: ``D / (D + V)`` with ``D = (b/(b−1))·(G² − Q)₊`` (mu² − sigma²/(b−1) in G's units) and
      ``V = (bQ − G²)/(b − 1)``, the estimated variance of G. Where the gate is open ``D + V = G²``,
      so this is the positive-part shrinkage ``(1 − V/G²)₊``.
    * ``none``: 1 everywhere.

    Args:
        grad_sum: ``G``, any shape, float32 or float64 (a bfloat16 square would decide ties wrongly).
        sq_sum: ``Q``, same shape and dtype.
        num_examples: ``b``, at least 2: with one example ``G² = Q`` and there is no evidence.
        gate: one of ``GATES``.
        out: where to write q; may be ``sq_sum``.

    Returns:
        Same shape and dtype as ``grad_sum``.

    Raises:
        ValueError: an unknown ``gate``, or fewer than two examples.
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {GATES}, got {gate!r}.")
    if out is None:
        out = torch.empty_like(grad_sum)
    if gate == "none":
        return out.fill_(1.0)
    if num_examples < 2:
        raise ValueError(f"the gate needs at least 2 examples per step, got {num_examples}.")
    energy = grad_sum * grad_sum
    if gate == "hard":
        return torch.gt(energy, sq_sum, out=out)  # several times faster than by way of bool
    shrunk = (num_examples / (num_examples - 1)) * margin(grad_sum, sq_sum) / energy
    # 0/0 where no example touched the parameter: nothing to write, and no evidence for it either.
    # G² ≥ Q / b, so values above 1 can only be rounding.
    return torch.clamp(shrunk.nan_to_num_(nan=0.0), 0.0, 1.0, out=out)


@lru_cache(maxsize=4096)
def null_openness(num_examples: int, gate: str) -> float:
    """Mean openness when the population gradient is zero and the ``h_i`` are independent Gaussians.

    Pure noise opens the gate by chance: with ``t`` Student's statistic of the b contributions,
    ``G² > Q`` is ``|t| > 1`` and the soft value is ``(1 − 1/t²)₊``; b = 2 gives 0.5, large b 0.317.

    Args:
        num_examples: ``b ≥ 2``.
        gate: ``hard`` or ``soft``.
    """
    from scipy import integrate, stats  # scipy.stats is slow to import and only logging needs it

    ratio = stats.f(1, num_examples - 1)  # t² = G²/V
    open_share = float(ratio.sf(1.0))
    if gate == "hard":
        return open_share
    # Split where the density is small: for few examples the tail beyond is heavy, which one adaptive
    # quadrature up to infinity would miss.
    split = 1.0 + 12.0 * math.sqrt(2.0 * num_examples / (num_examples - 1))
    pieces = [
        integrate.quad(lambda r: ratio.pdf(r) / r, low, high)[0]
        for low, high in ((1.0, split), (split, math.inf))
    ]
    return open_share - sum(pieces)
