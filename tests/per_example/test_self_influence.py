"""An example's sums in Adam's metric: the same as the loop's, in a batch and one by one."""

from typing import Any

import pytest
import reference
import torch
from models import adapted, tiny_model
from test_layers import N, batch, example_losses, trainable
from torch import nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.adam_metric import AdamMetric
from hf_poprisk.per_example import BatchedGradients, Rows
from hf_poprisk.per_example.sinks import SelfInfluence

BETAS, EPS, LR = (0.9, 0.99), 1e-6, 1e-2


def after_two_steps(model: nn.Module, inputs: Any, gate: str = "hard") -> PopRiskAdamW:
    optimizer = PopRiskAdamW(trainable(model).values(), lr=LR, betas=BETAS, eps=EPS, gate=gate)
    for first in (0, 1):
        half = {k: v[first::2] for k, v in inputs.items()}
        for i in range(N // 2):
            with optimizer.example():
                pair = {k: v[i :: N // 2] for k, v in half.items()}
                example_losses(model, pair, True).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def gradients_of(model: nn.Module, inputs: Any) -> list[dict[str, torch.Tensor]]:
    return reference.per_example_gradients(
        trainable(model),
        lambda example: example_losses(model, example, True).sum() / N,
        [{k: v[i::N] for k, v in inputs.items()} for i in range(N)],
    )


def textbook(
    model: nn.Module, optimizer: PopRiskAdamW, inputs: Any, scale: float = 1.0, stride: int = 1
) -> torch.Tensor:
    """[N] by the loop; with a stride over every so many rows or columns of each matrix alone."""
    params = trainable(model)
    states = {name: optimizer.state[p] for name, p in params.items()}
    moments = {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()}
    [step] = {int(state["step"]) for state in states.values()}
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "scale": scale}
    sums = torch.zeros(N, dtype=torch.float64)
    for i, h in enumerate(gradients_of(model, inputs)):
        for name, p in params.items():
            taken, times = taken_of(p, step, stride)
            sums[i] += times * reference.influence({name: h[name] * taken}, moments, step, **settings)[0]
    return sums


def taken_of(p: torch.Tensor, step: int, stride: int) -> tuple[torch.Tensor, int]:
    """Which coordinates stand for all, and for how many each."""
    taken = torch.zeros_like(p)
    width = p.numel() // p.shape[0]
    stride = min(stride, p.shape[0], width)
    turn, fewer = step % stride, min(p.shape[0], width)
    some = slice(turn * fewer // stride, (turn + 1) * fewer // stride)
    if p.shape[0] < width:
        taken[some] = 1
    else:
        taken.view(p.shape[0], width)[:, some] = 1
    return taken, stride


def measured(
    model: nn.Module, optimizer: PopRiskAdamW, inputs: Any, together: bool, scale: float = 1.0
) -> torch.Tensor:
    if together:
        influence = SelfInfluence(AdamMetric(optimizer, scale), N)
        layers = BatchedGradients(model, influence.params)
        with optimizer.batch(layers, Rows(N, len(inputs["input_ids"])), influence):
            (example_losses(model, inputs, True).sum() / N).backward()
        return influence.energy
    found = []
    for i in range(N):
        influence = SelfInfluence(AdamMetric(optimizer, scale), 1)
        with optimizer.example(influence):
            example = {k: v[i::N] for k, v in inputs.items()}
            (example_losses(model, example, True).sum() / N).backward()
        found.append(influence.energy)
    return torch.cat(found)


BLOCKS = {"capture._SMALL": 0, "products._BLOCK": 64, "products._SIDE_BY_SIDE": 128, "sinks._PIECE": 48}
SIZES = {"small": {}, "blocks": BLOCKS, "sample": {**BLOCKS, "sinks.FEWEST": 1, "sinks.STRIDE": 4}}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("gate", ["hard", "none"])
@pytest.mark.parametrize(
    ("kind", "adapter", "size", "dtype"),
    [
        *(
            (kind, adapter, size, torch.float64)
            for kind in ("llama", "llama-tied", "gpt2", "bert")
            for adapter, sizes in {"full": SIZES, "lora": ("small", "sample"), "dora": ("small",)}.items()
            for size in sizes
        ),
        ("llama", "full", "blocks", torch.float32),
    ],
)
def test_sums_equal_the_loop(
    kind: str,
    adapter: str,
    size: str,
    dtype: torch.dtype,
    gate: str,
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SIZES[size].items():
        monkeypatch.setattr(f"hf_poprisk.per_example.{name}", value)
    model = adapted(tiny_model(kind.split("-")[0], tied="tied" in kind, dtype=dtype), adapter)
    inputs = batch(2 * N)
    optimizer = after_two_steps(model, inputs, gate)
    expected = textbook(model, optimizer, inputs, 0.5, stride=4 if size == "sample" else 1)
    got = measured(model, optimizer, inputs, together, 0.5).double()
    exact = dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-9 if exact else 2e-3, atol=1e-12 if exact else 1e-3)
    assert (expected > 0).all()
    if size == "sample":  # that it is one shows
        assert (got / textbook(model, optimizer, inputs, 0.5) - 1).abs().max() > 1e-3
    if together:  # the sums are taken while the gradient is formed
        gradients = [p.grad.clone() for p in trainable(model).values()]
        model.zero_grad()
        (example_losses(model, inputs, True).sum() / N).backward()
        for ours, p in zip(gradients, trainable(model).values(), strict=True):
            rtol, atol = (1e-9, 1e-12) if exact else (1e-4, 1e-6)
            torch.testing.assert_close(ours, p.grad, rtol=rtol, atol=atol)


def test_all_rows_and_columns_take_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over as many steps as the stride, the sums of a sample have the mean of all coordinates."""
    monkeypatch.setattr("hf_poprisk.per_example.sinks.FEWEST", 32)
    for shape in ((96, 40), (40, 96), (64, 64), (64, 3, 25), (300, 300), (7,), ()):
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        h, found = torch.randn(2, *shape, dtype=torch.float64), []
        optimizer = torch.optim.AdamW([p], lr=LR, betas=(0.0, 0.0))
        for step in range(1, 9):
            moments = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
            influence = SelfInfluence(AdamMetric(optimizer), 2)
            influence.add(p, 0, h)
            found.append(influence.energy)
        expected = LR * (h * h.clamp(-1, 1)).reshape(2, -1).sum(1) / (1 + 1e-8)
        torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=1e-7, atol=1e-12)
        stride = {(64, 64): 2, (64, 3, 25): 2, (300, 300): 8}.get(shape, 1)
        assert influence.stride(p) == stride and (found[0] != found[1]).any() == (stride > 1)


@pytest.mark.parametrize("shape", [(96, 300), (300, 96)])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_rows_of_a_table_are_sampled_as_the_table(
    shape: tuple[int, int], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_poprisk.per_example.sinks.FEWEST", 24)  # one in four
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=LR)
    moments = {"exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
    optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    rows, examples = torch.tensor([0, 25, 49, 80, 30, 49]), torch.tensor([0, 0, 0, 0, 1, 1])
    h, whole = torch.randn(6, shape[1], dtype=torch.float64), torch.zeros(2, *shape, dtype=torch.float64)
    whole[examples, rows] = h
    found, expected = SelfInfluence(AdamMetric(optimizer), 2), SelfInfluence(AdamMetric(optimizer), 2)
    found.add_rows(p, rows, examples, h)
    expected.add(p, 0, whole)
    assert found.stride(p) == 4 and expected.energy.any()
    torch.testing.assert_close(found.energy, expected.energy)


def test_a_sample_is_close_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large matrix, in a perceptron; a language model has hundreds, whose errors cancel out."""
    torch.manual_seed(0)
    layers = nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    model = nn.Sequential(*layers)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-3, gate="none")
    x, y = torch.randn(64, 32), torch.randint(0, 10, (64,))
    for _ in range(20):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    energies = []
    for stride in (8, 1):
        monkeypatch.setattr("hf_poprisk.per_example.sinks.STRIDE", stride)
        influence = SelfInfluence(AdamMetric(optimizer), 64)
        with optimizer.batch(BatchedGradients(model, influence.params), Rows(64, 64), influence):
            nn.functional.cross_entropy(model(x), y).backward()
        energies.append(influence.energy)
        optimizer.zero_grad()
    ratio = (energies[0] / energies[1]).log()
    assert 0.001 < ratio.std() < 0.1, ratio


@pytest.mark.parametrize("together", [True, False])
def test_the_first_step_has_the_bound_alone(together: bool) -> None:
    """Without moments, a gradient moves every parameter by the learning rate: energy = lr·scale⁰·Σ|h|."""
    model, inputs = tiny_model("llama", dtype=torch.float64), batch(2 * N)
    optimizer = PopRiskAdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    found = measured(model, optimizer, inputs, together)
    sums = [LR * sum(x.abs().sum().item() for x in h.values()) for h in gradients_of(model, inputs)]
    largest = torch.tensor(sums, dtype=torch.float64)
    assert (found <= largest * (1 + 1e-9)).all() and (found > 0.5 * largest).all()


def test_the_gate_decides_the_same_with_the_sums_beside_it() -> None:
    model, inputs = tiny_model("llama"), batch(2 * N)
    optimizer = after_two_steps(model, inputs)
    seen = []
    for influence in (None, SelfInfluence(AdamMetric(optimizer), N)):
        layers = BatchedGradients(model, optimizer.gated_parameters)
        with optimizer.batch(layers, Rows(N, 2 * N), influence):
            (example_losses(model, inputs, True).sum() / N).backward()
        optimizer.close_window()
        seen.append(torch.cat([optimizer._openness[p].flatten() for p in model.parameters()]))
        optimizer.zero_grad()
    assert (seen[0] != seen[1]).double().mean() <= 1e-4


def test_a_parameter_that_is_not_gated_has_its_share() -> None:
    model, inputs = tiny_model("llama", dtype=torch.float64), batch(2 * N)
    optimizer = after_two_steps(model, inputs)
    ungated = PopRiskAdamW(model.parameters(), ungated=[model.lm_head.weight])
    ungated.load_state_dict(optimizer.state_dict())
    expected = textbook(model, ungated, inputs)
    got = measured(model, ungated, inputs, together=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
