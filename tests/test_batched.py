"""Several examples per backward: the same G and Q as the textbook loop, for every architecture."""

from typing import Any

import pytest
import torch
from models import text, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk import reference
from hf_poprisk.batched import BatchedGradients
from hf_poprisk.moments import ExampleWindow

N = 4
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "bert")


def adapted(model: nn.Module, adapter: str) -> nn.Module:
    if adapter == "full":
        return model
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        use_dora=adapter == "dora",
        use_rslora=adapter == "rslora",
        modules_to_save=["lm_head"] if adapter == "modules_to_save" else None,
        init_lora_weights=False,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def batch(rows: int, side: str = "right") -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    texts = [text(i, 4 + 2 * (i % 4)) for i in range(rows)]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


def example_losses(model: nn.Module, inputs: dict[str, Tensor], pairs: bool) -> Tensor:
    """[examples], in the model's own dtype; with pairs, of rows i and i + N together."""
    logits = model(**inputs).logits
    if logits.dim() == 2:
        rows = F.cross_entropy(logits, inputs["input_ids"][:, 1] % logits.shape[-1], reduction="none")
    else:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
        rows = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(1)
    if not pairs:
        return rows
    chosen, rejected = rows.chunk(2)
    return -F.logsigmoid(rejected - chosen)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def textbook(
    model: nn.Module, inputs: dict[str, Tensor], n: int, pairs: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    examples = [{k: v[i::n] for k, v in inputs.items()} for i in range(n)]
    gradients = reference.per_example_gradients(
        trainable(model), lambda example: example_losses(model, example, pairs).sum() / n, examples
    )
    return {name: reference.grad_and_square_sums(gradients, name) for name in trainable(model)}


def captured(
    model: nn.Module, batches: list[tuple[dict[str, Tensor], int]], pairs: bool, total: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """G and Q after one window of backwards, one for each (inputs, examples)."""
    params = trainable(model)
    layers = BatchedGradients(model, params.values())
    assert not layers.uncovered
    window = ExampleWindow(params.values(), {p: name for name, p in params.items()})
    for inputs, n in batches:
        with window.batch(layers, n, inputs["input_ids"].shape[0]) as capture:
            (example_losses(model, inputs, pairs).sum() / total).backward()
        assert not capture.misfits
    b, sq_sums = window.reduce()
    assert b == total
    return {name: (p.grad, sq_sums[p]) for name, p in params.items() if p.grad is not None}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    seen = 0
    largest = max(g.abs().max().item() for g, _ in expected.values())
    for name, pair in expected.items():
        if pair[0].abs().max() < 1e-6 * largest:  # zero but for rounding: BERT's key biases
            continue
        if name not in got:  # a parameter that nothing reaches
            assert not pair[0].any()
            continue
        for ours, theirs in zip(got[name], pair, strict=True):
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max(), name
        seen += pair[1].count_nonzero().item()
    assert seen > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ["full", "lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_equal_the_loop(
    kind: str, adapter: str, checkpointing: bool, pairs: bool, dtype: torch.dtype
) -> None:
    left = kind in ("qwen3", "mistral")  # eager attention gives NaN for a row of nothing but padding
    model = adapted(tiny_model(kind, kind == "gpt2", dtype, "sdpa" if left else "eager"), adapter)
    with torch.no_grad():  # at this size the weights are so large that float32 rounding is amplified
        for name, p in model.named_parameters():
            p.mul_(0.25 if "lora_" in name else 0.5 if p.dim() == 2 else 1.0)
    inputs = batch(2 * N if pairs else N, "left" if left else "right")
    expected = textbook(model, inputs, N, pairs)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    got = captured(model, [(inputs, N)], pairs, N)
    exact = dtype == torch.float64 and kind != "gemma3"  # whose norms run in float32 whatever the model is in
    assert_same(got, expected, 1e-12 if exact else 1e-5)
