"""A sink of one's own is shown every example's gradients."""

import pytest
import torch
from models import tiny_model
from torch import Tensor

from hf_poprisk import PopRiskAdamW
from hf_poprisk.per_example import BatchedGradients, Rows

N = 3


class Norms:
    """The squared norm of each example's gradient."""

    def __init__(self) -> None:
        self.found = torch.zeros(N, dtype=torch.float64)

    def wants(self, param: Tensor) -> bool:
        return True

    def add(self, param: Tensor, first: int, h: Tensor, start: int = 0) -> None:
        self.found[first : first + len(h)] += h.flatten(1).square().sum(1)

    def add_rows(self, param: Tensor, rows: Tensor, examples: Tensor, h: Tensor) -> None:
        self.found.index_add_(0, examples, h.square().sum(1))


@pytest.mark.parametrize("gate", ["none", "hard"])
@pytest.mark.parametrize("together", [True, False])
def test_norms_are_those_of_single_backwards(gate: str, together: bool) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    ids = torch.randint(4, 60, (N, 8), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    expected = []
    for example in examples:
        grads = torch.autograd.grad(model(**example).loss / N, list(model.parameters()))
        expected.append(sum(g.square().sum() for g in grads))
    optimizer, sink = PopRiskAdamW(model.parameters(), gate=gate), Norms()
    if together:
        layers = BatchedGradients(model, model.parameters())
        with optimizer.batch(layers, Rows(N, N), sink):
            model(input_ids=ids, labels=ids).loss.backward()
    else:
        for i, example in enumerate(examples):
            with optimizer.example(sink, i):
                (model(**example).loss / N).backward()
    torch.testing.assert_close(sink.found, torch.stack(expected), rtol=1e-9, atol=0)
