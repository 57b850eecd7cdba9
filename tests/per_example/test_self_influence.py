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
from hf_poprisk.per_example import BatchedGradients, Rows, products
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example.sinks import SelfInfluence

BETAS, EPS, LR = (0.9, 0.99), 1e-6, 1e-2


def after_two_steps(model: nn.Module, inputs: Any, pairs: bool, gate: str = "hard") -> PopRiskAdamW:
    optimizer = PopRiskAdamW(trainable(model).values(), lr=LR, betas=BETAS, eps=EPS, gate=gate)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        half = {k: v[rows] for k, v in inputs.items()}
        for i in range(len(half["input_ids"]) // (2 if pairs else 1)):
            n = len(half["input_ids"]) // (2 if pairs else 1)
            with optimizer.example():
                example_losses(model, {k: v[i::n] for k, v in half.items()}, pairs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def textbook(
    model: nn.Module, optimizer: PopRiskAdamW, inputs: Any, pairs: bool, scale: float, stride: int = 1
) -> Any:
    """[N] by the loop; with a stride over every so many rows or columns of each matrix alone."""
    params = trainable(model)
    gradients = reference.per_example_gradients(
        params,
        lambda example: example_losses(model, example, pairs).sum() / N,
        [{k: v[i::N] for k, v in inputs.items()} for i in range(N)],
    )
    zeros = {name: (torch.zeros_like(p),) * 2 for name, p in params.items()}
    state = {n: optimizer.state.get(p) for n, p in params.items()}
    moments = {n: (s["exp_avg"], s["exp_avg_sq"]) if s else zeros[n] for n, s in state.items()}
    steps = {int(s["step"]) for s in state.values() if s} or {0}
    assert len(steps) == 1
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "scale": scale}
    sums = torch.zeros(N, dtype=torch.float64)
    for name, p in params.items():
        taken, times = taken_of(p, min(steps), stride)
        for i, h in enumerate(gradients):
            found = reference.influence({name: h[name] * taken}, moments, min(steps), **settings)
            sums[i] += times * found[0]
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
    model: nn.Module, optimizer: PopRiskAdamW, inputs: Any, pairs: bool, scale: float, together: bool
) -> torch.Tensor:
    if together:
        influence = SelfInfluence(AdamMetric(optimizer, scale), N)
        layers = BatchedGradients(model, influence.params)
        with optimizer.batch(layers, Rows(N, len(inputs["input_ids"])), influence):
            (example_losses(model, inputs, pairs).sum() / N).backward()
        return influence.energy
    found = []
    for i in range(N):
        influence = SelfInfluence(AdamMetric(optimizer, scale), 1)
        with optimizer.example(influence):
            example = {k: v[i::N] for k, v in inputs.items()}
            (example_losses(model, example, pairs).sum() / N).backward()
        found.append(influence.energy)
    return torch.cat(found)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("gate", ["hard", "none"])
@pytest.mark.parametrize("adapter", ["full", "lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "bert"])
def test_sums_equal_the_loop(kind: str, adapter: str, gate: str, together: bool) -> None:
    model = adapted(tiny_model(kind.split("-")[0], tied="tied" in kind, dtype=torch.float64), adapter)
    inputs = batch(2 * N)
    optimizer = after_two_steps(model, inputs, pairs=True, gate=gate)
    expected = textbook(model, optimizer, inputs, True, scale=0.5)
    got = measured(model, optimizer, inputs, True, 0.5, together)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (expected > 0).all()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("gate", ["hard", "none"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "bert"])
def test_some_rows_or_columns_stand_for_all(
    kind: str, adapter: str, gate: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_poprisk.per_example.sinks.FEWEST", 1)
    monkeypatch.setattr("hf_poprisk.per_example.sinks.STRIDE", 4)
    monkeypatch.setattr("hf_poprisk.per_example.sinks._PIECE", 48)
    if adapter == "full":  # the others are kept side by side
        monkeypatch.setattr(capturing, "_SMALL", 0)
    monkeypatch.setattr(products, "_BLOCK", 64)
    monkeypatch.setattr(products, "_SIDE_BY_SIDE", 128)
    model = adapted(tiny_model(kind.split("-")[0], tied="tied" in kind, dtype=torch.float64), adapter)
    inputs = batch(2 * N)
    optimizer = after_two_steps(model, inputs, pairs=True, gate=gate)
    got = measured(model, optimizer, inputs, True, 0.5, together)
    torch.testing.assert_close(
        got, textbook(model, optimizer, inputs, True, 0.5, stride=4), rtol=1e-9, atol=1e-12
    )
    gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    (example_losses(model, inputs, True).sum() / N).backward()
    if together:
        for name, p in trainable(model).items():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-12)
    everything = textbook(model, optimizer, inputs, True, 0.5)
    assert (got / everything - 1).abs().max() > 1e-3  # that it is a sample shows


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gate", ["hard", "none"])
@pytest.mark.parametrize("together", [True, False])
def test_blocks_of_a_large_weight_are_all_seen(
    together: bool, gate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "_SMALL", 0)
    monkeypatch.setattr(products, "_BLOCK", 64)
    monkeypatch.setattr(products, "_SIDE_BY_SIDE", 128)
    monkeypatch.setattr("hf_poprisk.per_example.sinks._PIECE", 48)
    model = tiny_model("llama", dtype=dtype)
    inputs = batch(2 * N)
    optimizer = after_two_steps(model, inputs, pairs=True, gate=gate)
    expected = textbook(model, optimizer, inputs, True, 1.0)
    got = measured(model, optimizer, inputs, True, 1.0, together)
    exact = dtype == torch.float64
    torch.testing.assert_close(
        got.double(), expected, rtol=1e-9 if exact else 2e-3, atol=1e-12 if exact else 1e-3
    )
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (example_losses(model, inputs, True).sum() / N).backward()
    if together:  # the sums are taken while the gradient is formed
        for ours, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("together", [True, False])
def test_the_first_step_has_the_bound_alone(together: bool) -> None:
    """Without moments, a gradient moves every parameter by the learning rate: energy = lr·scale⁰·Σ|h|."""
    model, inputs = tiny_model("llama", dtype=torch.float64), batch(2 * N)
    optimizer = PopRiskAdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    found = measured(model, optimizer, inputs, True, 1.0, together)
    gradients = reference.per_example_gradients(
        trainable(model),
        lambda example: example_losses(model, example, True).sum() / N,
        [{k: v[i::N] for k, v in inputs.items()} for i in range(N)],
    )
    sums = [LR * sum(x.abs().sum().item() for x in h.values()) for h in gradients]
    largest = torch.tensor(sums, dtype=torch.float64)
    assert (found <= largest * (1 + 1e-9)).all() and (found > 0.5 * largest).all()


def test_the_gate_decides_the_same_with_the_sums_beside_it() -> None:
    model, inputs = tiny_model("llama"), batch(2 * N)
    optimizer = after_two_steps(model, inputs, pairs=True)
    seen = []
    for influence in (None, SelfInfluence(AdamMetric(optimizer), N)):
        layers = BatchedGradients(model, optimizer.gated_parameters)
        with optimizer.batch(layers, Rows(N, 2 * N), influence):
            (example_losses(model, inputs, True).sum() / N).backward()
        optimizer.close_window()
        seen.append({n: optimizer._openness[p].clone() for n, p in trainable(model).items()})
        optimizer.zero_grad()
    flips = sum((seen[0][n] != seen[1][n]).sum().item() for n in seen[0])
    assert flips <= 1e-4 * sum(q.numel() for q in seen[0].values())


def test_a_parameter_that_is_not_gated_has_its_share() -> None:
    model, inputs = tiny_model("llama", dtype=torch.float64), batch(2 * N)
    params = dict(model.named_parameters())
    head = params["lm_head.weight"]
    optimizer = PopRiskAdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, ungated=[head])
    expected = textbook(model, optimizer, inputs, True, 1.0)
    got = measured(model, optimizer, inputs, True, 1.0, together=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
