"""What a network's outputs are, and what loss stands on them.

A task is any object with two methods::

    outputs(forward, batch) -> [b, k]        one row of outputs u per example of the batch
    losses(outputs, batch) -> [b]            each example's loss Φ_i, a function of its row alone

``forward`` is called like the model. The training loss is the mean of Φ_i over the examples; a task describes
a run if that is what its trainer minimises. Notation of arXiv:2605.01172: outputs u, loss Φ, g = ∇Φ(u).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.nn import functional as F

Batch = Mapping[str, Tensor]
Forward = Callable[..., Any]
Outputs = Callable[[Forward, Batch], Tensor]


class Task(Protocol):
    """See the module."""

    def outputs(self, forward: Forward, batch: Batch) -> Tensor: ...

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor: ...


class ClassLogits:
    """A classifier: the logits [b, k], and cross-entropy against ``batch["labels"]``."""

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        return forward(**batch)["logits"]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="none")


class SquaredError:
    """A regression head: the predictions [b, k], and transformers' mean squared error, without a half."""

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        predictions = forward(**batch)["logits"]
        return predictions.reshape(len(predictions), -1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch["labels"].reshape(outputs.shape)).square().mean(1)


class SequenceLogProb:
    """A language model: the log-probability of each sequence [b, 1] in nats, and its loss per token.

    Tokens whose label is -100 do not count. The mean over sequences is the trainer's loss if they are of
    one length; the trainer weighs tokens alike.
    """

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
        return _log_prob(logits, batch["input_ids"], batch["labels"][:, 1:] != -100)[:, None]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return -outputs[:, 0] / (batch["labels"][:, 1:] != -100).sum(1)


class DPOMargin:
    """DPO: the reward margin of each pair [b, 1], and the sigmoid loss.

    The batch is TRL's: rows ``[chosen…, rejected…]`` with ``completion_mask``, and the reference's
    log-probabilities ``ref_chosen_logps`` and ``ref_rejected_logps`` [b] (``precompute_ref_log_probs=True``).

    Args:
        beta: as in the DPO config.
    """

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
        kept = batch["completion_mask"][:, 1:].bool()
        chosen, rejected = _log_prob(logits, batch["input_ids"], kept).chunk(2)
        reference = batch["ref_chosen_logps"] - batch["ref_rejected_logps"]
        return self.beta * (chosen - rejected - reference)[:, None]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.softplus(-outputs[:, 0])


def _log_prob(logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """[b]: the summed log-probability of ids[:, 1:] where ``kept`` [b, T − 1] is true."""
    targets = ids[:, 1:, None]
    logps = (logits[:, :-1].gather(-1, targets) - logits[:, :-1].logsumexp(-1, keepdim=True)).squeeze(-1)
    return torch.where(kept, logps, 0).sum(1)


def loss_terms(task: Task, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Each example's loss [b], and its gradient [b, k] and curvature [b, k, k] in its own outputs [b, k]."""

    def total(u: Tensor) -> tuple[Tensor, Tensor]:
        losses = task.losses(u, batch)
        return losses.sum(), losses

    gradient, pull, losses = vjp(grad(total, has_aux=True), outputs.detach(), has_aux=True)
    columns = torch.eye(outputs.shape[1]).to(outputs)
    return losses, gradient, torch.stack([pull(e.expand_as(outputs))[0] for e in columns], 1)
