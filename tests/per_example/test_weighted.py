"""Weights at the outputs of a model: where they can be put, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.per_example.examples import NotSeparable
from hf_poprisk.per_example.weighted import NotASum, OutputWeights

N, TOKENS, WIDTH = 4, 3, 5
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.0])


class Net(nn.Module):
    """Returns whatever ``shape`` makes of its two layers, [N, TOKENS, WIDTH] each."""

    def __init__(self, shape: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x).tanh()
        return self.shape(hidden, self.last(hidden))


def inputs(count: int) -> Tensor:
    return torch.randn(count, TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(
    shape: Callable[..., Any], loss: Callable[[Any, int], Tensor], count: int = N
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted gradient in one backward, and the textbook's; loss: (outputs, N) → a mean over N."""
    net, x = Net(shape), inputs(count)
    outputs_weights, params = OutputWeights(net), dict(net.named_parameters())
    if count > 1:
        outputs_weights.learn(lambda: loss(net(x[:2]), 2), lambda: loss(net(x[:1]), 1), 1e-9)
    with outputs_weights.recorded() as outputs:
        value = loss(net(x), count)
    outputs_weights.weigh(outputs, value, WEIGHTS[:count])
    value.backward()
    got = {name: p.grad for name, p in params.items()}
    net.zero_grad()
    for i in range(count):
        (WEIGHTS[i] * loss(net(x[i : i + 1]), 1) / count).backward()
    return got, {name: p.grad for name, p in params.items()}


def squares(outputs: Any, count: int) -> Tensor:
    """Of every tensor that is returned."""
    tensors = outputs.values() if isinstance(outputs, dict) else outputs
    tensors = [outputs] if isinstance(outputs, Tensor) else tensors
    return sum((x - 1).square().sum() for x in tensors) / count


RIGHT: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "a tensor": (lambda h, o: o, squares),
    "a vector": (lambda h, o: o[:, 0, 0], squares),
    "tokens first": (lambda h, o: o.transpose(0, 1), squares),
    "rows and tokens on one axis": (lambda h, o: o.flatten(0, 1), squares),
    "two of one layer": (lambda h, o: o.split([2, 3], -1), squares),
    "only the last one is used": (
        lambda h, o: {"hidden": h, "logits": o},
        lambda x, n: squares(x["logits"], n),
    ),
    "linear": (lambda h, o: o, lambda x, n: x.sum() / n),
    "cornered": (lambda h, o: o, lambda x, n: F.relu(0.1 - x).sum() / n),
    "the model's own": (
        lambda h, o: {"loss": squares(o, len(o)), "logits": o, "hidden": (h, h)},
        lambda x, n: x["loss"],
    ),
    "of a copy": (
        lambda h, o: {"loss": squares(o, len(o)), "logits": o.float()},
        lambda x, n: x["loss"],
    ),
}


@pytest.mark.parametrize("count", [N, 1])
@pytest.mark.parametrize("name", RIGHT)
def test_the_gradient_is_the_weighted_sum(name: str, count: int) -> None:
    got, expected = run(*RIGHT[name], count)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-12, atol=1e-12)
    assert expected["first.weight"].abs().max() > 1e-2


WRONG: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], str]] = {
    "no outputs": (
        lambda h, o: {"loss": squares(o, len(o))},
        lambda x, n: x["loss"],
        "reaches .* another way",
    ),
    "a number": (lambda h, o: o.sum(), lambda x, n: x / n, "reaches .* another way"),
    "both layers": (lambda h, o: {"h": h, "o": o}, squares, "from what they are made of"),
    "both precisions": (
        lambda h, o: {"loss": o.sum(), "o": o.float()},
        lambda x, n: (x["loss"] + x["o"].sum()) / n,
        "from what they are made of",
    ),
    "similarities": (lambda h, o: o[:, 0] @ o[:, 0].T, squares, "is .2, 2. for two examples"),
    "a centred output": (lambda h, o: o - o.mean(0), squares, "of an example depends on the others"),
    "a term of the mean": (
        lambda h, o: o,
        lambda x, n: squares(x, n) + x.mean(0).square().sum(),
        "compares the examples",
    ),
    "contrasts": (
        lambda h, o: o[:, 0],
        lambda x, n: F.cross_entropy(x @ x.T, torch.arange(n)),
        "compares the examples",
    ),
    "ranks": (
        lambda h, o: o[:, 0, 0],
        lambda x, n: F.relu(1 - (x[:, None] - x)).triu(1).sum() / n,  # linear, alone nothing
        "compares the examples",
    ),
    "no second derivative": (
        lambda h, o: o.log_softmax(-1),
        lambda x, n: F.ctc_loss(x.transpose(0, 1), torch.ones(n, 1).long(), [TOKENS] * n, [1] * n),
        "cannot be seen",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_sum_over_outputs_is_refused(name: str) -> None:
    shape, loss, sentence = WRONG[name]
    with pytest.raises(NotSeparable, match=sentence) as caught:
        run(shape, loss)
    other_layouts_help = ("is .2, 2.", "depends on", "cannot be seen")
    assert isinstance(caught.value, NotASum) == (not any(x in sentence for x in other_layouts_help))


@pytest.mark.parametrize("count", [N, 1])
def test_a_term_of_the_weights_is_refused(count: int) -> None:
    net, x = Net(lambda h, o: o), inputs(count)
    weights = OutputWeights(net)
    with weights.recorded() as outputs:
        loss = squares(net(x), count) + net.first.weight.square().sum()
    with pytest.raises(NotASum, match="reaches first.weight by another way"):
        weights.weigh(outputs, loss, WEIGHTS[:count])


def test_outputs_of_another_shape_are_refused_later_too() -> None:
    net, x = Net(lambda h, o: o), inputs(N)
    weights = OutputWeights(net)
    weights.learn(lambda: squares(net(x[:2]), 2), lambda: squares(net(x[:1]), 1), 1e-9)
    with weights.recorded() as outputs:
        loss = squares(net(x[:3]), 3)
    with pytest.raises(NotSeparable, match="is .3, 3, 5. for 4 examples"):
        weights.weigh(outputs, loss, WEIGHTS)


def test_nothing_is_learned_from_a_loss_that_is_not_finite() -> None:
    net, x = Net(lambda h, o: o), inputs(2)
    weights = OutputWeights(net)
    weights.learn(lambda: squares(net(x), 2), lambda: squares(net(x[:1]), 1) * torch.nan, 1e-9)
    assert not weights.learned


def test_a_reference_without_a_graph_is_no_output() -> None:
    net, x = Net(lambda h, o: o), inputs(2)
    with OutputWeights(net).recorded() as outputs:
        with torch.no_grad():
            net(x)
        net(x)
    assert list(outputs) == [(0, "")]
