"""What a network's outputs are, and what loss stands on them.

A task is any object with the two methods of ``Task``. The training loss is the mean of Φ_i over the examples;
a task describes a run if that is what its trainer minimises. Notation of arXiv:2605.01172: outputs u, loss Φ,
g = ∇Φ(u).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.nn import functional as F

Batch = Mapping[str, Tensor]
Forward = Callable[..., Any]  # called like the model
Outputs = Callable[[Forward, Batch], Tensor]


class Task(Protocol):
    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """One row of outputs u per example of the batch, [b, k]."""

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Each example's loss Φ_i [b], a function of its row of the outputs alone."""


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
        return _log_prob(forward, batch, batch["labels"] != -100)[:, None]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return -outputs[:, 0] / (batch["labels"][:, 1:] != -100).sum(1)


@dataclass
class DPOMargin:
    """DPO: the reward margin of each pair [b, 1], and the sigmoid loss.

    The batch is TRL's: rows ``[chosen…, rejected…]`` with ``completion_mask``, and the reference's
    log-probabilities ``ref_chosen_logps`` and ``ref_rejected_logps`` [b] (``precompute_ref_log_probs=True``).
    """

    beta: float = 0.1  # as in the DPO config

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        chosen, rejected = _log_prob(forward, batch, batch["completion_mask"].bool()).chunk(2)
        reference = batch["ref_chosen_logps"] - batch["ref_rejected_logps"]
        return self.beta * (chosen - rejected - reference)[:, None]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.softplus(-outputs[:, 0])


def _log_prob(forward: Forward, batch: Batch, kept: Tensor) -> Tensor:
    """[rows]: the summed log-probability of the tokens that are ``kept`` [rows, T], the first one aside."""
    logits = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"][:, :-1]
    logps = logits.gather(-1, batch["input_ids"][:, 1:, None]) - logits.logsumexp(-1, keepdim=True)
    return torch.where(kept[:, 1:], logps.squeeze(-1), 0).sum(1)


def loss_terms(task: Task, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Each example's loss [b], and its gradient [b, k] and curvature [b, k, k] in its own outputs [b, k]."""

    def total(u: Tensor) -> tuple[Tensor, Tensor]:
        losses = task.losses(u, batch)
        return losses.sum(), losses

    gradient, pull, losses = vjp(grad(total, has_aux=True), outputs.detach(), has_aux=True)
    columns = torch.eye(outputs.shape[1]).to(outputs)
    return losses, gradient, torch.stack([pull(e.expand_as(outputs))[0] for e in columns], 1)
