"""Mixtures of experts with stacked weights: one backward gives the G and Q of single examples."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_poprisk.per_example import BatchedGradients, Layout, Packed, Rows
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example.window import ExampleWindow

N, LENGTH = 3, 6


def tiny_experts(dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        initializer_range=0.2,
    )
    # the grouped products, which are the default, know no float64
    eager = {"attn_implementation": "eager"} | (
        {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    )
    return Qwen3MoeForCausalLM._from_config(config, **eager).to(dtype)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """[rows]"""
    rows = model(input_ids=ids).logits.log_softmax(-1)
    return -rows[:, :-1].gather(2, ids[:, 1:, None]).flatten(1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [N, 2 * N])  # 2 N: the pairs of a preference loss
@pytest.mark.parametrize("small", [True, False])
def test_sums_equal_the_loop(
    small: bool, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "_SMALL", 1 << 17 if small else 0)
    model = tiny_experts(dtype)
    ids = torch.randint(64, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    params = dict(model.named_parameters())
    singles = [torch.autograd.grad(losses(model, ids[i::N]).sum(), list(params.values())) for i in range(N)]
    layers = BatchedGradients(model, params.values())
    assert not layers.uncovered
    window = ExampleWindow(params.values())
    with window.batch(layers, Rows(N, rows)):
        losses(model, ids).sum().backward()
    _, squares = window.reduce()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for (name, p), *h in zip(params.items(), *singles, strict=True):
        gates = []
        for g, q in ((p.grad, squares[p]), (sum(h), sum(x.square() for x in h))):
            gates.append((g.double().square() - q.double()) / q.double().clamp(min=1e-30))
        assert (p.grad - sum(h)).abs().max() <= tolerance * sum(h).abs().max(), name
        expected = sum(x.square() for x in h)
        assert (squares[p] - expected).abs().max() <= tolerance * expected.abs().max(), name
        apart = (gates[0] > 0) != (gates[1] > 0)  # the gate G² > Q, but for ties
        assert not (apart & (gates[1].abs() > 1e-3)).any(), name


def test_packed_sequences_go_through_the_block_one_by_one() -> None:
    block, lengths = tiny_experts(torch.float64).model.layers[0].mlp, (2, 1, 3)
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    params = list(block.parameters())
    singles = [torch.autograd.grad(block(part).sin().sum(), params) for part in x.split(lengths, 1)]
    window = ExampleWindow(params)
    with window.batch(BatchedGradients(block, params), Packed(lengths)):
        block(x).sin().sum().backward()
    _, squares = window.reduce()
    for p, *h in zip(params, *singles, strict=True):
        torch.testing.assert_close(p.grad, sum(h), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(squares[p], sum(x.square() for x in h), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", [Rows(N, N), Packed((2, 1, 3))])
def test_tokens_of_no_known_example_are_an_error(layout: Layout) -> None:
    block = tiny_experts(torch.float64).model.layers[0].mlp
    window = ExampleWindow(block.parameters())
    x = torch.ones(1, 5, 16, dtype=torch.float64)
    layers = BatchedGradients(block, block.parameters())
    error = pytest.raises(RuntimeError, match="does not see the examples")
    with error, window.batch(layers, layout):
        block(x).sum().backward()
