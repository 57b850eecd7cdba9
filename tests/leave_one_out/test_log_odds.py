"""The log-odds in a loss, and the weight of an example."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_poprisk.leave_one_out.log_odds import ClassLogits, LogOddsError, LogOddsTap, class_log_odds


def test_class_log_odds_are_those_of_the_softmax() -> None:
    logits, labels = torch.randn(50, 7, dtype=torch.float64) * 3, torch.arange(50) % 7
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(class_log_odds(logits, labels), (p / (1 - p)).log())
    labels[3] = -100
    assert class_log_odds(logits, labels).isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("preferences_", [True, False])
def test_a_weight_multiplies_the_examples_gradient(preferences_: bool) -> None:
    x = torch.randn(5, requires_grad=True) if preferences_ else torch.randn(5, 4, requires_grad=True)
    labels, weight = torch.arange(5) % 4, torch.linspace(0, 1, 5)

    def loss(x: Tensor) -> Tensor:
        return -3 * F.logsigmoid(x).mean() if preferences_ else 3 * F.cross_entropy(x, labels)

    rows = -F.logsigmoid(x) if preferences_ else F.cross_entropy(x, labels, reduction="none")
    (expected,) = torch.autograd.grad(3 * (weight * rows).mean(), x)
    with (tap := LogOddsTap(preferences_, lambda z: weight)):
        value = loss(x)
    (got,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(value, loss(x))  # the loss is reported as it is
    z = x.detach() if preferences_ else class_log_odds(x.detach(), labels)
    torch.testing.assert_close(tap.log_odds, z)


@pytest.mark.parametrize(
    ("loss", "preferences_", "message"),
    [
        (lambda x: F.logsigmoid(x[:, 0]) + F.logsigmoid(-x[:, 0]), True, "more than one log-probability"),
        (lambda x: F.logsigmoid(x), True, "not one per pair"),
        (lambda x: F.cross_entropy(x, torch.zeros(3).long(), weight=torch.ones(4)), False, "class weights"),
        (lambda x: F.cross_entropy(x, torch.zeros(3).long(), torch.ones(4)), False, "class weights"),
        (
            lambda x: F.cross_entropy(x, torch.zeros(3).long(), label_smoothing=0.1),
            False,
            "label smoothing",
        ),
        (lambda x: F.cross_entropy(x[None], torch.zeros(1, 4).long()), False, "not \\[examples, labels\\]"),
    ],
)
def test_a_loss_of_more_than_its_log_odds_is_refused(loss: Any, preferences_: bool, message: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    tap = LogOddsTap(preferences_, lambda z: torch.ones_like(z))
    with pytest.raises(LogOddsError, match=message), tap:
        loss(x)
    if not preferences_:  # and where its logits are looked for
        with pytest.raises(LogOddsError, match=message), ClassLogits():
            loss(x)


def test_the_logits_of_a_loss_are_found_with_their_graph() -> None:
    x, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([2, -100, 0])
    with (found := ClassLogits()):
        value = F.cross_entropy(2 * x, labels)
    torch.testing.assert_close(value, F.cross_entropy(2 * x, labels))
    assert torch.equal(found.labels, labels)
    (grad,) = torch.autograd.grad(found.logits.sum(), x)
    assert torch.equal(grad, torch.full_like(x, 2.0))
    with pytest.raises(LogOddsError, match="more than one log-probability"), ClassLogits():
        F.cross_entropy(x, labels), F.cross_entropy(x, labels)
