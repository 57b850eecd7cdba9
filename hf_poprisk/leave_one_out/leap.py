"""The leap: one step to where the judge's regression already is, without an optimizer or a learning rate.

The coefficients a of ``regression.py`` are a direction of the weights too. With its dual solution, of the fit
that is weighted by w = p_correct,

    Δ = P Σ_i α_i ∇z_i,    α_i = w_i σ(−f_i) / (λ |φ_i|),

in every layer's eigenbasis: one backward over the data with the examples weighted by α. To first order the
mean of z grows by ⟨mean ∇z, Δ⟩, which says how long the step must be for a margin that is asked for.
(The analytic step that arXiv:2605.01172 has in its outlook.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_poprisk.options import SHORTEST_LEAP
from hf_poprisk.per_example.basis import LayerBasis, summed
from hf_poprisk.per_example.factors import LinearFactors, linear_layers
from hf_poprisk.per_example.undisturbed import mode, undisturbed

_AGREE = 0.2  # how far the margin reached may be from the one predicted, of that
_HALVINGS = 4


class Leap(NamedTuple):
    """Mean margins gained by the training set, in nats; both 0 if the weights were left as they were."""

    predicted: float
    reached: float


def trained_layers(model: nn.Module, option: str = "poprisk_leap", off: str = "0") -> dict[str, Any]:
    """Name → linear layer that is trained.

    Args:
        option: what works on them, and the value that turns it off, for the message.

    Raises:
        ValueError: there is none, or an adapter is trained.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{option} works on the weights of linear layers, which an adapter keeps: train without one, "
            f"or set {option}={off}."
        )
    layers = {name: layer for name, layer in linear_layers(model).items() if layer.weight.requires_grad}
    if not layers:
        raise ValueError(
            f"{option} works on the weights of linear layers, and none of them is trained: train them, "
            f"or set {option}={off}."
        )
    return layers


def leap(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    log_odds: Callable[[nn.Module, Any], Tensor],
    rows_per_example: int,
    bases: Sequence[Mapping[str, LayerBasis]],
    alpha: Tensor,
    weights: Tensor,
    margin: float,
) -> Leap:
    """Move the linear layers that are trained until the mean margin has grown by so much.

    Where the model does not follow, the step is halved, up to four times and not below a thousandth of a
    nat, and then taken back.

    Args:
        model: not wrapped.
        batches: iterates over this rank's examples, in the same order each time.
        log_odds: (model, micro-batch) → z [N].
        rows_per_example: of what the layers see; row j belongs to example j mod N.
        bases: of the layers of each part.
        alpha: the judge's dual solution of this rank's examples, [n, parts] float32.
        weights: of the mean margin, [n] float32; zero for an example that another rank has too.
        margin: nats.

    Raises:
        ValueError: as ``trained_layers``, or the margin grows in no direction.
    """
    layers = trained_layers(model)
    of = {n: (part, basis) for part, each in enumerate(bases) for n, basis in each.items() if n in layers}
    if not of:
        raise ValueError("poprisk_leap: the margin depends on no linear layer that is trained: set it to 0.")
    layers = {name: layers[name] for name in of}
    device = next(iter(layers.values())).weight.device
    alpha, weights = alpha.to(device), weights.to(device)
    weights = weights / summed(weights.sum()[None])  # of the mean over all ranks
    # Σ α_i H'_i and the mean H'_i
    sums = {
        name: basis.second_moment.new_zeros(2, *basis.second_moment.shape) for name, (_, basis) in of.items()
    }

    def mean_margin(look: bool) -> float:
        """In a pass over the examples, which adds up ``sums`` if it is to look at the gradients."""
        mean, rows = torch.zeros(1, device=device), slice(0, 0)

        def see(name: str, a: Tensor, d: Tensor) -> None:
            part, basis = of[name]
            scales = torch.stack([alpha[rows, part], weights[rows]]).to(a.device)
            sums[name] += torch.einsum("sn,nlr->slr", scales, basis.rotate(a, d))

        for batch in batches():
            factors = LinearFactors(model, layers, see)
            with factors.forward() if look else nullcontext():
                z = log_odds(model, batch)
            rows = slice(rows.stop, rows.stop + len(z))
            mean += weights[rows] @ z.detach().to(device, torch.float32)
            if look:
                factors.backward(z, rows_per_example)
        return float(summed(mean))

    with undisturbed(model, model.parameters()), mode(model, False), torch.enable_grad():
        before = mean_margin(look=True)
    steps, slope = {}, 0.0
    for name, (_, basis) in of.items():
        pulled, mean = summed(sums.pop(name))
        steps[name] = basis.preconditioner() * pulled
        slope += float((steps[name] * mean).sum())
    if not 0 < slope < float("inf"):
        raise ValueError("poprisk_leap finds no direction in which the margin grows: set poprisk_leap=0.")
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with mode(model, False), torch.no_grad():
        for predicted in (margin / 2**halvings for halvings in range(_HALVINGS + 1)):
            if predicted < SHORTEST_LEAP:
                break
            with ExitStack() as back:  # by errors too
                for name, layer in layers.items():
                    back.callback(layer.weight.copy_, kept[name])
                    basis = of[name][1]
                    step = basis.left @ (steps[name] * (predicted / slope)) @ basis.right.T
                    layer.weight.add_(step.T if isinstance(layer, Conv1D) else step)
                reached = mean_margin(look=False) - before
                if abs(reached - predicted) <= _AGREE * predicted:
                    back.pop_all()
                    return Leap(predicted, reached)
    return Leap(0.0, 0.0)
