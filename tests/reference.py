"""The textbook: per-example gradients by a loop, the mean, the variance, the rule as it is written.

Slow and obvious on purpose. Nothing in the package calls it; the tests compare everything with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def per_example_gradients(
    params: Mapping[str, nn.Parameter],
    loss_fn: Callable[[Any], Tensor],
    examples: Iterable[Any],
) -> list[dict[str, Tensor]]:
    """One backward for each example, nothing accumulated.

    Args:
        params: name → parameter.
        loss_fn: example → scalar loss, already scaled as it enters the accumulated loss.
        examples: the b examples of one optimizer step.

    Returns:
        For each example a dict name → ``h_i``, the parameter's shape and dtype (zeros where the
        example does not reach the parameter).
    """
    gradients = []
    for example in examples:
        grads = torch.autograd.grad(
            loss_fn(example), list(params.values()), allow_unused=True, materialize_grads=True
        )
        gradients.append(dict(zip(params, grads, strict=True)))
    return gradients


def parts_of_the_loss(
    trainer: Any, batches: Sequence[Any], owners: Sequence[Tensor], scale: float
) -> list[dict[str, Tensor]]:
    """What each unit of a step adds to the gradient of a stock trainer's own loss, one backward for each.

    The loss is that of the whole micro-batch; of the model's outputs only the unit's rows have a gradient.

    Args:
        trainer: a stock one.
        batches: the micro-batches of the step.
        owners: of each, the unit of every row that the model is called on, [rows] int64.
        scale: by which the trainer multiplies the loss of a micro-batch.
    """
    model, params = trainer.model, {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    model.train()
    gradients = []
    for unit in range(1 + max(int(owner.max()) for owner in owners)):

        def part(batch: Any, unit: int = unit) -> Tensor:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                for name, x in output.items() if torch.is_grad_enabled() else ():
                    if isinstance(x, Tensor) and x.requires_grad:
                        mine = (owner == unit).view(-1, *(1,) * (x.dim() - 1))
                        output[name] = torch.where(mine, x, x.detach())

            inputs, owner = batch
            hook = model.register_forward_hook(keep)
            try:
                return scale * trainer.compute_loss(model, dict(inputs))
            finally:
                hook.remove()

        steps = per_example_gradients(params, part, zip(batches, owners, strict=True))
        gradients.append({n: sum(h[n] for h in steps) for n in params})
    return gradients


def grad_and_square_sums(gradients: Sequence[Mapping[str, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """``G = Σ h_i`` and ``Q = Σ h_i²`` of one parameter, accumulated in float64."""
    stacked = torch.stack([h[name].double() for h in gradients])  # [b, *shape]
    return stacked.sum(0), stacked.square().sum(0)


def assert_sums(
    window: Mapping[str, tuple[Tensor, Tensor]], parts: Sequence[Mapping[str, Tensor]], gates: bool = True
) -> None:
    """G and Q of a window are those of the parts, and so are the hard gates."""
    different, written = 0, 0
    for name, (g, q) in window.items():
        grad, squares = grad_and_square_sums(parts, name)
        for got, expected in ((g, grad), (q, squares)):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        # where one example alone reaches a coordinate, G² = Q but for the rounding of the loop
        tie = (grad**2 - squares).abs() <= 1e-6 * squares
        different += int(((g**2 > q) != (grad**2 > squares))[~tie].sum())
        written += int((g**2 > q).sum())
    assert not gates or different == 0 and written > 100


def openness(stacked: Tensor, gate: str = "hard") -> Tensor:
    """The rule with mu and sigma², before any algebra (arXiv:2605.01172; equation in ``gate``).

    Args:
        stacked: [b, *shape], the per-example gradients.
        gate: ``hard``, ``soft`` or ``none``.

    Returns:
        ``q``, [*shape], float64.
    """
    h = stacked.double()
    b = h.shape[0]
    mu = h.mean(0)
    sigma2 = (h - mu).square().mean(0)
    signal, noise = mu.square(), sigma2 / (b - 1)
    if gate == "none":
        return torch.ones_like(mu)
    if gate == "hard":
        return (signal > noise).double()
    excess = (signal - noise).clamp(min=0)
    total = excess + noise
    return torch.where(total > 0, excess / torch.where(total > 0, total, 1.0), 0.0)


def adamw_step(
    weight: Tensor,
    grad: Tensor,
    q: Tensor | float,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One gated AdamW step, written as the equations are: ``w ← w − lr·q·m̂/(√v̂ + ε)``.

    Returns:
        The new weight, first and second moment; the inputs are left alone.
    """
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
    m_hat = exp_avg / (1 - beta1**step)
    v_hat = exp_avg_sq / (1 - beta2**step)
    weight = weight * (1 - lr * weight_decay)
    return weight - lr * q * m_hat / (v_hat.sqrt() + eps), exp_avg, exp_avg_sq
