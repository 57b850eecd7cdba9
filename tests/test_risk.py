"""The gains: unbiased where the population is known, nothing touched, logged by every trainer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import causal
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState

from hf_poprisk import PopRiskAdamW, PopRiskEarlyStoppingCallback, PopRiskTrainingArguments
from hf_poprisk.risk import RiskMeter, clip_factor, gains

TRUTH = torch.linspace(-1, 1, 20, dtype=torch.float64)


def draw(count: int, generator: torch.Generator) -> Tensor:
    return TRUTH + torch.randn(count, 20, generator=generator, dtype=torch.float64)


def adamw(size: int = 20, **options: Any) -> tuple[nn.Parameter, torch.optim.AdamW]:
    theta = nn.Parameter(torch.zeros(size, **options))
    return theta, torch.optim.AdamW([theta], lr=0.1, weight_decay=0.0)


def distance(values: list[float], truth: Tensor) -> float:
    """Of their mean from the truth, in standard errors."""
    seen = torch.tensor(values)
    return ((seen.mean() - truth) / (seen.std() / math.sqrt(len(seen)))).item()


def test_the_population_gain_is_unbiased_and_the_tempting_ones_are_not() -> None:
    """The mean of a Gaussian, learned for five steps: the population gradient is θ − TRUTH."""
    generator, lr = torch.Generator().manual_seed(0), 0.1
    theta, optimizer = adamw(dtype=torch.float64)
    for _ in range(5):
        theta.grad = (theta.detach() - draw(8, generator)).mean(0)
        optimizer.step()
    state = optimizer.state[theta]
    m = state["exp_avg"] / (1 - 0.9**5)
    p = 1 / ((state["exp_avg_sq"] / (1 - 0.999**5)).sqrt() + 1e-8)
    population = theta.detach() - TRUTH
    next_batch, own, opened = [], [], []
    for _ in range(3000):
        h = (theta.detach() - draw(8, generator)) / 8
        theta.grad = h.sum(0)
        margin = theta.grad.square() - h.square().sum(0)
        found = gains(optimizer).tolist()
        next_batch.append(found[0])
        own.append(found[1])
        opened.append((lr * p * margin * 8 / 7 * (margin > 0)).sum().item())

    unbiased_square = (lr * p * population.square()).sum()
    assert abs(distance(next_batch, (lr * p * m * population).sum())) < 4
    assert distance(own, unbiased_square) > 20  # its own batch confirms a step's noise as well
    assert distance(opened, unbiased_square) > 20  # so does keeping what looks confirmed


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_the_empirical_gain_is_that_of_the_batchs_own_step(gate: str) -> None:
    """Of a step that is really made, so small that the loss is a line; clipped as it will be."""
    theta = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = PopRiskAdamW([theta], lr=1e-6, weight_decay=0.0, gate=gate)
    optimizer.keep_written = True
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        optimizer.zero_grad()
        batch, before = draw(8, generator), theta.detach().clone()
        for x in batch:
            with optimizer.example():
                (theta - x).square().sum().div(2 * 8).backward()
        optimizer.close_window()
        found = gains(optimizer, clip=clip_factor(optimizer, max_norm=0.5))
        nn.utils.clip_grad_norm_([theta], 0.5)
        optimizer.step()
    losses = ((w.detach() - batch).square().sum() / 16 for w in (before, theta))
    assert found[1].item() == pytest.approx((next(losses) - next(losses)).item(), rel=1e-4)


@pytest.mark.parametrize(("max_norm", "scale"), [(None, 1.0), (1.0, 1.0), (1.0, 64.0), (100.0, 1.0)])
def test_batches_that_agree_confirm_each_other_clipped_or_not(max_norm: float | None, scale: float) -> None:
    gradient = torch.tensor([6.0, 8.0], dtype=torch.float64)  # of norm 10
    theta, optimizer = adamw(2, dtype=torch.float64)
    for _ in range(20):
        theta.grad = gradient * scale
        found = gains(optimizer, scale, clip_factor(optimizer, scale, max_norm))
        theta.grad = gradient * min(1.0, (max_norm or math.inf) / 10)
        optimizer.step()
    assert found.tolist() == pytest.approx([0.1 * 14] * 2, rel=1e-5)  # lr Σ |G|


@pytest.mark.parametrize(
    "options",
    [{"gate": "none"}, {"gate": "hard"}, {"gate": "soft"}, {"gate": "soft", "estimator": "ema"}],
    ids=str,
)
def test_the_gains_are_those_of_the_losses(options: dict[str, Any]) -> None:
    """Of every batch and of the population, whose loss is known, before and after each step."""
    theta = nn.Parameter(0.6 * TRUTH)
    optimizer = PopRiskAdamW([theta], lr=1e-3, weight_decay=0.0, **options)
    optimizer.keep_written = True
    generator, meter = torch.Generator().manual_seed(0), RiskMeter()
    history: list[dict[str, float]] = []
    gained = torch.zeros(2, dtype=torch.float64)
    for step in range(400):
        optimizer.zero_grad()
        batch, before = draw(16, generator), theta.detach().clone()
        for x in batch:
            with optimizer.example():
                (theta - x).square().sum().div(2 * 16).backward()
        optimizer.close_window()
        meter.observe(optimizer)
        optimizer.step()
        if step:  # the first has none before it
            for w, sign in ((before, 1), (theta.detach(), -1)):
                population, own = (w - TRUTH).square().sum(), (w - batch).square().sum(1).mean()
                gained += sign * torch.stack([population, own]) / 2
        if step % 100 == 99:
            history.append(meter.pop(history))
    population, share = gained[0].item(), 1 - (gained[0] / gained[1]).item()
    assert history[-1]["poprisk/gain_total"] == pytest.approx(population, rel=0.1) and population > 0.2
    counts, names = (99, 100, 100, 100), ("poprisk/gain_population", "poprisk/gain_empirical")
    sums = [sum(n * e[name] for n, e in zip(counts, history, strict=True)) for name in names]
    assert sums[0] == pytest.approx(history[-1]["poprisk/gain_total"])
    known = 0.1 if options.get("estimator") == "ema" else 0.03  # ema: with q of the step before
    assert 1 - sums[0] / sums[1] == pytest.approx(share, abs=known) and 0.1 < share < 0.6
    for e in history:
        assert e["poprisk/memorised_share"] == pytest.approx(1 - e[names[0]] / e[names[1]])
        assert e["poprisk/gain_spread"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_is_touched(dtype: torch.dtype) -> None:
    theta, optimizer = adamw(6, dtype=dtype)
    theta.grad = torch.randn(6).to(dtype)
    assert gains(optimizer) is None
    optimizer.step()
    held = [theta.detach(), theta.grad, *optimizer.state[theta].values()]
    before = [x.clone() for x in held]
    found = gains(optimizer)
    assert all(map(torch.equal, held, before))
    theta.grad *= 2
    torch.testing.assert_close(gains(optimizer, scale=2.0), found)


def test_an_optimizer_that_keeps_too_little_is_refused() -> None:
    theta, _ = adamw(6)
    theta.grad = torch.randn(6)
    sgd = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match="which SGD does not keep: set poprisk_risk=false or another optim"):
        gains(sgd)
    gated = PopRiskAdamW([theta])
    with pytest.raises(ValueError, match="set optimizer.keep_written = True"):
        gains(gated)
    gated.keep_written = True
    assert gains(gated) is None  # no step before it is no error


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    meter = RiskMeter()
    theta, optimizer = adamw(6)
    assert meter.pop([]) == {}
    for value in (1.0, 1.0, math.nan, 2.0):
        theta.grad = torch.full((6,), value)
        meter.observe(optimizer)
        if math.isfinite(value):
            optimizer.step()
    logs = meter.pop([{"poprisk/gain_total": 5.0}])
    assert logs["poprisk/gain_total"] == pytest.approx(5 + 2 * logs["poprisk/gain_population"])
    assert all(map(math.isfinite, logs.values())) and meter.pop([]) == {}


# In the trainers


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch", "adamw_torch_fused"])
def test_every_optimizer_of_the_family_is_logged(optim: str, tmp_path: Path) -> None:
    trainer = causal(tmp_path, optim=optim, poprisk_risk=True, save_strategy="no")
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert "poprisk/gain_population" not in logs[0]  # there was no step before the first batch
    assert len(logs) == 5 and all(e["poprisk/gain_empirical"] > 0 for e in logs[1:])
    total = sum(e["poprisk/gain_population"] for e in logs[1:])
    assert logs[-1]["poprisk/gain_total"] == pytest.approx(total)
    assert ("poprisk/fraction_open" in logs[0]) == (optim == "poprisk_adamw")


def test_the_gains_are_those_of_the_gradient_before_it_is_clipped(tmp_path: Path) -> None:
    seen = []
    # Adam's step does not know the scale of its gradients; at this rate all steps are as good as none
    options = {"optim": "adamw_torch", "learning_rate": 1e-6, "max_steps": 2, "save_strategy": "no"}
    for norm in (0.0, 0.5):
        trainer = causal(tmp_path, poprisk_risk=True, max_grad_norm=norm, **options)
        trainer.train()
        seen.append(trainer.state.log_history[1]["poprisk/gain_population"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-2)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_logs_the_same_gains(every: int, tmp_path: Path) -> None:
    """With a log every second step, one of them is over a step before and a step after the checkpoint."""
    whole, resumed = (causal(tmp_path, poprisk_risk=True, logging_steps=every) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    names = ("poprisk/gain_total", "poprisk/gain_spread", "poprisk/gain_empirical")
    one, other = ([[e.get(n) for n in names] for e in t.state.log_history[:-1]] for t in (whole, resumed))
    assert one == other and one[-1][0] is not None and (one[-1][1] is None) == (every == 1)


# Early stopping


def follow(
    gained: list[float],
    spread: float,
    threshold: float = 3.0,
    seen: int = 0,
    every: int | None = None,
    **options: Any,
) -> int | None:
    """Feed the callback logs of ten steps each, ``seen`` of them from before it resumed; where it stops.

    every: what the trainer makes of ``logging_steps``.
    """
    callback, control = PopRiskEarlyStoppingCallback(threshold), TrainerControl()
    settings = {"logging_steps": 10, "poprisk_risk": True, "max_steps": 10_000, **options}
    args = PopRiskTrainingArguments("unused", use_cpu=True, report_to="none", **settings)
    state = TrainerState(max_steps=10_000, num_train_epochs=int(args.num_train_epochs))
    state.logging_steps = every or args.logging_steps
    names = ("poprisk/gain_population", "poprisk/gain_spread", "step")
    logs = [dict(zip(names, (gain, spread, 10 * n), strict=True)) for n, gain in enumerate(gained, 1)]
    state.log_history = logs[:seen]
    callback.on_train_begin(args, state, control)
    for log in logs[seen:]:
        state.global_step = log["step"]
        callback.on_log(args, state, control, logs=log)
        assert callback.stopped_at == (state.global_step if control.should_training_stop else None)
        if control.should_training_stop:
            break
    return callback.stopped_at


def test_it_stops_when_the_gain_is_negative_beyond_its_error() -> None:
    falling = [1.0] * 5 + [-0.5] * 20
    # after n logs of −0.5 ± 0.5 the sum is −n/2 ± √n/2: three standard errors at n > 9
    assert follow(falling, 0.5) == 150
    assert follow(falling, 0.5, seen=12) == 150  # a resumed run goes on counting
    assert follow(falling, 0.5, threshold=2.0) == 100
    assert follow(falling, 0.05) == 60
    assert follow([1.0] * 5 + [-0.5, 0.6] * 20, 0.5) is None  # the sum rises
    assert follow([-1.0] * 30, 0.1) == 10
    assert follow([-1.0] * 30, 0.1, warmup_steps=200) == 210
    assert follow([-1.0] * 30, 0.1, logging_steps=0.05, every=5) == 10  # a share of the run


def test_noise_about_zero_seldom_stops_it() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 + 0.5 * torch.randn(50, 40, generator=generator)
    assert sum(follow(gained.tolist(), 0.5) is not None for gained in noise) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poprisk_risk": False}, "set poprisk_risk=true"),
        ({"logging_steps": 1}, "logging_steps=2 or more"),
        ({"logging_steps": 0.05, "every": 1}, "logging_steps=2 or more"),
        ({"logging_strategy": "no"}, "logging_strategy=steps"),
        ({"logging_strategy": "epoch", "num_train_epochs": 10_000}, "logging_strategy=steps"),
        ({"threshold": 0.0}, "number of standard errors > 0"),
    ],
)
def test_what_it_cannot_read_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        follow([1.0], 0.1, **options)


def test_a_run_stops_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels that are pure noise: nothing that is learned is confirmed once they are known by heart."""
    options = {"max_steps": -1, "num_train_epochs": 300, "learning_rate": 1e-2, "logging_steps": 4}
    trainer = causal(tmp_path, poprisk_risk=True, save_strategy="no", **options)
    torch.manual_seed(0)
    for row in trainer.train_dataset:
        row["labels"] = torch.randint(5, 300, row["labels"].shape)
    callback = PopRiskEarlyStoppingCallback()
    trainer.add_callback(callback)
    trainer.train()
    assert callback.stopped_at == trainer.state.global_step < trainer.state.max_steps
    assert "do not confirm what is learned" in caplog.text
