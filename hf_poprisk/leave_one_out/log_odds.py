"""The log-odds of the observed labels, found inside a loss, and a factor on each example's gradient.

A loss that judges labels computes ``−log σ(z_i)``: TRL's preference losses as ``logsigmoid`` of the reward
margin, a classifier's as ``cross_entropy`` of its logits. Whatever stands around it (means, accumulation,
loss scaling), all of an example's gradient flows through z_i, so a factor put there weights the example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class LogOddsTap(TorchFunctionMode):
    """While it is entered, the one loss that is computed gives up its log-odds and takes weights.

    Args:
        preferences: the loss is ``logsigmoid`` of [N] margins; otherwise it is ``cross_entropy`` of [N, K]
            logits.
        sample_weight: z → [N]: the factor on example i's gradient.

    Attributes:
        log_odds: z, [N] float32, once the forward is done; None if no such loss was met. K-class:
            ``o_y − logsumexp_{k≠y} o_k``.
        asleep: whether a loss is to be let through, because it is of a part of the examples.

    Raises (inside, as ``LogOddsError``): several such terms, class weights, label smoothing. What else is
    added to the loss cannot be seen here.
    """

    def __init__(self, preferences: bool, sample_weight: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._preferences, self._sample_weight = preferences, sample_weight
        self.log_odds: Tensor | None = None
        self.asleep: Callable[[], bool] = lambda: False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = F.logsigmoid if self._preferences else F.cross_entropy
        if func is not wanted or self.asleep():
            return func(*args, **kwargs)
        if self.log_odds is not None:
            raise LogOddsError("it takes more than one log-probability of an example")
        if self._preferences:
            margin, *rest = args
            if margin.dim() != 1:
                raise LogOddsError(f"its margins are {list(margin.shape)} and not one per pair")
            factor = self._see(margin.detach().float())
            return func(_Weighted.apply(margin, factor), *rest, **kwargs)
        logits, labels, *rest = args
        _check_cross_entropy(logits, labels, rest, kwargs)
        factor = self._see(class_log_odds(logits.detach().float(), labels))
        return func(_Weighted.apply(logits, factor[:, None]), labels, *rest, **kwargs)

    def _see(self, log_odds: Tensor) -> Tensor:
        self.log_odds = log_odds
        return self._sample_weight(log_odds)


class ClassLogits(TorchFunctionMode):
    """While it is entered, keeps the logits that the one cross-entropy is computed of.

    Attributes:
        logits: [N, K] with their graph; None if no such loss was met.
        labels: [N] int64, negative where the loss ignores them.

    Raises (inside, as ``LogOddsError``): as ``LogOddsTap``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits: Tensor | None = None
        self.labels: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            if self.logits is not None:
                raise LogOddsError("it takes more than one log-probability of an example")
            logits, labels, *rest = args
            _check_cross_entropy(logits, labels, rest, kwargs)
            self.logits, self.labels = logits, labels.detach()
        return func(*args, **kwargs)


class LogOddsError(RuntimeError):
    """The loss is not a function of the examples' log-odds alone."""


def class_log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``o_y − logsumexp_{k≠y} o_k``; logits [N, K], labels [N]; NaN where the label is negative (ignored)."""
    observed = labels.clamp(min=0)[:, None]
    others = logits.scatter(1, observed, -torch.inf).logsumexp(1)
    return torch.where(labels < 0, torch.nan, logits.gather(1, observed)[:, 0] - others)


def _check_cross_entropy(logits: Tensor, labels: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> None:
    if logits.dim() != 2 or labels.dim() != 1 or logits.shape[1] < 2:
        raise LogOddsError(f"its logits are {list(logits.shape)} and not [examples, labels]")
    if rest or kwargs.get("weight") is not None or kwargs.get("label_smoothing"):
        raise LogOddsError("its cross-entropy has class weights or label smoothing")
    if kwargs.get("ignore_index", -100) >= 0:
        raise LogOddsError("its cross-entropy ignores a label that is not negative")
    if kwargs.get("reduction", "mean") not in ("mean", "sum", "none"):
        raise LogOddsError(f"its reduction is {kwargs['reduction']}")


class _Weighted(Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (grad.float() * ctx.factor).to(grad.dtype), None
