"""G and Q from leaf hooks against the textbook loop, on real architectures."""

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from models import adapted, tiny_model, token_examples
from torch import nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.per_example.window import ExampleWindow

B = 5


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def captured(model: nn.Module, examples: list[dict[str, torch.Tensor]]) -> Iterator[tuple[str, Any, Any]]:
    """(name, G, Q) after one window of one-example backwards."""
    params = trainable(model)
    window = ExampleWindow(params.values())
    for example in examples:
        with window.example():
            (model(**example).loss / len(examples)).backward()
    b, sq_sums = window.reduce()
    assert b == len(examples) and len(sq_sums) == len(params)
    for name, p in params.items():
        yield name, p.grad, sq_sums[p]


CELLS = [
    (kind, tied, checkpointing, "full")
    for kind in ("llama", "qwen2", "gpt2")
    for tied in (False, True)
    for checkpointing in (False, True)
] + [
    (kind, False, checkpointing, adapter)
    for kind in ("llama", "gpt2")
    for checkpointing in (False, True)
    for adapter in ("lora", "dora", "modules_to_save")
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "tied", "checkpointing", "adapter"), CELLS)
def test_sums_equal_the_loop(
    kind: str, tied: bool, checkpointing: bool, adapter: str, dtype: torch.dtype
) -> None:
    model = adapted(tiny_model(kind, tied, dtype), adapter)
    examples = token_examples(B)
    gradients = reference.per_example_gradients(
        trainable(model), lambda example: model(**example).loss / B, examples
    )
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    seen = 0
    for name, grad, sq_sum in captured(model, examples):
        expected_grad, expected_sq = reference.grad_and_square_sums(gradients, name)
        for got, expected in ((grad, expected_grad), (sq_sum, expected_sq)):
            assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max(), name
        seen += expected_sq.count_nonzero().item()
    assert seen > 100


def test_a_compiled_model_gives_the_same_sums() -> None:
    model = tiny_model("llama", True, torch.float64)
    examples = token_examples(B)
    eager = {name: (p_grad.clone(), sq.clone()) for name, p_grad, sq in captured(model, examples)}
    model.zero_grad()
    model.compile(backend="aot_eager")  # the backward is traced; no code generator needed
    for name, grad, sq_sum in captured(model, examples):
        for got, expected in zip((grad, sq_sum), eager[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


def test_squaring_the_uses_of_a_tied_weight_apart_would_be_seen() -> None:
    """The comparison above can fail: embedding and head squared separately are far off."""
    model = tiny_model("llama", tied=True, dtype=torch.float64)
    examples = token_examples(B)
    weight = model.get_input_embeddings().weight
    whole, apart = torch.zeros_like(weight), torch.zeros_like(weight)
    for example in examples:
        hidden = model.model(input_ids=example["input_ids"], attention_mask=example["attention_mask"])[0]
        head = weight.detach().clone().requires_grad_()
        logits = hidden @ head.T
        loss = nn.functional.cross_entropy(logits[0, :-1], example["labels"][0, 1:])
        as_embedding, as_head = torch.autograd.grad(loss, [weight, head])
        whole += (as_embedding + as_head).square()
        apart += as_embedding.square() + as_head.square()
    _, _, sq_sum = next(captured(model, examples))
    # the library takes its loss in float32 whatever the model is in
    assert (sq_sum * B**2 - whole).abs().max() < 1e-6 * whole.max()
    assert (apart - whole).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_squared_in_float32(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=dtype))
    h = (torch.randn(6, 1000) * 1e-5).to(dtype)
    window = ExampleWindow([p])
    for row in h:
        with window.example():
            (p * row).sum().backward()
    _, sq_sums = window.reduce()
    assert sq_sums[p].dtype == torch.float32
    torch.testing.assert_close(sq_sums[p], h.float().square().sum(0), rtol=1e-6, atol=0)


def test_a_parameter_that_some_examples_do_not_reach() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    window = ExampleWindow([a, b])
    for scale, uses_b in ((1.0, False), (2.0, True), (3.0, True)):
        with window.example():
            (scale * a.sum() + (scale * b.sum() if uses_b else 0.0)).backward()
    count, sq_sums = window.reduce()
    assert count == 3
    assert torch.equal(sq_sums[a], torch.full((3,), 14.0))
    assert torch.equal(sq_sums[b], torch.full((3,), 13.0))


def test_a_parameter_that_no_example_reaches_takes_no_part() -> None:
    a, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = PopRiskAdamW([a, idle])
    for _ in range(2):
        with optimizer.example():
            a.sum().backward()
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(3)) and (a < 1).all()


def test_a_gradient_in_several_parts_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    window = ExampleWindow([p], names={p: "shared.weight"})
    with pytest.raises(RuntimeError, match=r"shared\.weight arrived in several parts"), window.example():
        p.sum().backward()
        p.sum().backward()


def test_a_gradient_nobody_saw_is_refused() -> None:
    """Sharded parameters receive gradients that no hook reports: Q = 0 would open everything."""
    seen, unseen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = PopRiskAdamW([seen, unseen])
    optimizer.name_parameters([("seen", seen), ("unseen", unseen)])
    for _ in range(2):
        with optimizer.example():
            seen.sum().backward()
            unseen.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="no example's gradient was seen for unseen"):
        optimizer.step()


def test_buffers_are_reused_from_step_to_step() -> None:
    p = nn.Parameter(torch.ones(50))
    optimizer = PopRiskAdamW([p])
    addresses = set()
    for _ in range(3):
        for _ in range(2):
            with optimizer.example():
                (p * torch.randn(50)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        addresses.add(optimizer._window.squares._sums[p].data_ptr())
    assert len(addresses) == 1
