"""Which examples and which weights the features are made of."""

import pytest
import torch
from models import tiny_model
from torch import nn

from hf_poprisk.leave_one_out.features import _share, label_features, num_features, spread
from hf_poprisk.per_example.factors import linear_layers


def test_weights_that_have_no_part_are_said() -> None:
    experts = nn.ModuleDict({"router": nn.Linear(4, 2), "embedding": nn.Embedding(50, 4)})
    experts.register_parameter("stacked", nn.Parameter(torch.randn(2, 4, 10)))
    assert _share(experts, linear_layers(experts)) == pytest.approx(8 / 88)
    assert _share(tiny_model("llama"), linear_layers(tiny_model("llama"))) == 0.0  # layers of another model
    model = tiny_model("llama", tied=True)
    assert _share(model, linear_layers(model)) == 1.0


def test_examples_for_the_bases_are_from_all_of_the_data() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 8) == [0, 1, 2]


def test_features_fit_a_gigabyte() -> None:
    assert [num_features(n) for n in (100, 2048, 10_000, 1_000_000)] == [1 << 17, 1 << 17, 26843, 4096]


class TimeFirst(nn.Module):
    """Works on [tokens, examples, width]; of as many tokens as examples the shapes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1).sum((1, 2))


def test_a_layer_that_holds_no_examples_one_by_one_is_refused() -> None:
    x = torch.randn(5, 5, 4)
    with pytest.raises(ValueError, match="gradients of layer, which does not hold the examples of a micro-b"):
        label_features(TimeFirst(), lambda count: [x], lambda model, batch: model(batch))
