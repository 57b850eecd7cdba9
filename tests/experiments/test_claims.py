"""The experiments on the claims of the source: one small run of each, and what their parts compute."""

import math
import sys
from pathlib import Path
from typing import Any

import common
import double_descent
import grokking_add
import grokking_divide
import image
import numpy as np
import pinn
import pytest
import text_noise
import torch
import training
from experiment import load
from models import save_tiny_model

from hf_poprisk import PopRiskAdamW

SMALL = {  # options that make a run of an experiment a matter of a second
    "grokking_add": {"steps": 10, "every": 5, "p": 11, "examples_per_step": 16},
    "grokking_divide": {"steps": 10, "every": 5, "p": 13, "width": 16, "examples_per_step": 16},
    "pinn": {"steps": 10, "every": 5},
    "image": {"steps": 10, "every": 5, "size": 24},
    "double_descent": {"steps": 10, "every": 5, "num_train": 200},
    "text_noise": {"epochs": 2, "max_length": 4, "examples_per_step": 128},
}


def cell_of(name: str, **options: Any) -> dict[str, Any]:
    """The options of an experiment's first cell, with others in place of some."""
    experiment = load(name)
    return experiment.options(experiment.cells()[0]) | SMALL[name] | options


@pytest.mark.parametrize("name", SMALL)
def test_every_arm_of_every_experiment_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, small, ends = load(name), SMALL[name], {}
    if name == "text_noise":
        small = small | {"model": str(save_tiny_model(tmp_path / "model", "llama", tied=True))}
    script = sys.modules["grokking_add" if name.startswith("grokking") else name]

    def watched(model: Any, *args: Any) -> Any:
        curves = training.fit(model, *args)
        ends[arm] = torch.cat([p.detach().flatten() for p in model.parameters()])
        return curves

    monkeypatch.setattr(script, "fit", watched)
    for arm, cell in {cell["arm"]: cell for cell in reversed(experiment.cells())}.items():
        found = experiment.run(experiment.options(cell) | small)
        names = [name for report in experiment.reports for name in (report.select, report.result)]
        assert all(isinstance(found[name], int | float | None) for name in (*names, *experiment.columns)), arm
    same = {frozenset((a, b)) for a in ends for b in ends if a != b and torch.equal(ends[a], ends[b])}
    assert same <= {frozenset(("adamw", "weight"))}  # the model is too small to judge


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_the_random_mask_writes_as_much_as_the_gate(gate: str) -> None:
    signal = torch.linspace(-1, 1, 20000)
    gradients = [torch.randn(20000) + signal for _ in range(8)]
    written = []
    for kind in (PopRiskAdamW, training.RandomMaskAdamW):
        weight = torch.nn.Parameter(torch.zeros(20000))
        optimizer = kind([weight], lr=1.0, weight_decay=0.0, gate=gate)
        for gradient in gradients:
            with optimizer.example():
                (weight * gradient).sum().backward()
        optimizer.step()
        written.append(weight.detach().abs())  # the first step of Adam is lr, times q
    assert written[1].mean().item() == pytest.approx(written[0].mean().item(), rel=0.05)
    assert set(written[1].round(decimals=3).tolist()) == {0.0, 1.0}  # a mask, and not by the signal
    assert abs(torch.corrcoef(torch.stack([written[1], signal.abs()]))[0, 1]) < 0.03


def test_fit_trains_as_a_loop_of_its_own() -> None:
    """The same steps by hand with torch's AdamW: order of the rows, learning rate and decay arrive."""
    x, y = torch.randn(12, 64), torch.arange(12) % 10
    options = {"seed": 3, "steps": 6, "examples_per_step": 4, "learning_rate": 0.01, "weight_decay": 0.1}
    model, by_hand = double_descent.Network(8), double_descent.Network(8)
    by_hand.load_state_dict(model.state_dict())
    seen: list[Any] = []
    forward = model.forward
    model.forward = lambda x, labels: (seen.append((x, labels)), forward(x, labels))[1]  # type: ignore[method-assign]
    options |= {"every": 2, "poprisk_gate": "none"}
    curves = training.fit(model, training.Rows(x=x, labels=y), options, lambda s: {"a": s})
    assert curves == {"step": [2, 4, 6], "a": [2, 4, 6]} and len(seen) == 6
    assert sorted(int(row) for _, labels in seen[:3] for row in labels) == sorted(y.tolist())
    weights, biases = ([p for p in by_hand.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for inputs, labels in seen:
        optimizer.zero_grad()
        by_hand(inputs, labels)["loss"].backward()
        optimizer.step()
    for got, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


OPTIONS = {"seed": 0, "steps": 6, "every": 1, "examples_per_step": 4, "learning_rate": 0.01}
OPTIONS |= {"poprisk_gate": "none"}


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, 6),
        ({4: None}, 3),  # measuring may end the training
        ({s: {"held": value} for s, value in enumerate((0.5, 0.3, math.nan, 0.2, 0.4, 0.3), 1)}, 4),
        ({s: {"held": math.nan} for s in range(1, 7)}, 6),
    ],
)
def test_what_is_measured_ends_a_run(values: dict[int, Any], steps: int) -> None:
    data = training.Rows(x=torch.randn(12, 64), labels=torch.arange(12) % 10)
    curves = training.fit(double_descent.Network(4), data, OPTIONS, lambda s: values.get(s, {}))
    assert curves["step"] == list(range(1, steps + 1)) and len(curves.get("held", curves["step"])) == steps


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 5}, "steps=5 must be a multiple of every=2"),
        ({"examples_per_step": 13}, "examples_per_step=13 of 12 examples"),
        ({"random_mask": True}, "random_mask takes the place of a gate"),
    ],
)
def test_a_training_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    data = training.Rows(x=torch.randn(12, 64), labels=torch.arange(12) % 10)
    with pytest.raises(common.RecipeError, match=message):
        training.fit(double_descent.Network(4), data, OPTIONS | {"every": 2} | changed, lambda s: {})


@pytest.mark.parametrize("script", [image, double_descent, pinn])
def test_early_stopping_looks_at_noisy_data_that_were_kept_apart(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, seen = script.__name__, []

    def made_up_fit(model: Any, data: Any, options: Any, measure: Any) -> dict[str, list[float]]:
        found = measure(options["every"])
        seen.append((model, data, found.get("held", math.nan)))
        return {"step": [1, 2], **{name: [0.1, 0.2] for name in found}}

    monkeypatch.setattr(script, "fit", made_up_fit)
    found = [script.run(cell_of(name, early=early)) for early in (False, True)]
    result = "test_psnr" if script is image else "test_error"
    assert [row[result] for row in found] == [0.2, 0.2]  # the last of what fit returns
    (_, every, nothing), (model, fewer, value) = seen
    assert len(fewer) == len(every) - len(every) // 10 and math.isnan(nothing)
    first = [next(iter(data._columns.values())).reshape(len(data), -1).tolist() for data in (every, fewer)]
    apart = every.__getitems__([i for i, row in enumerate(first[0]) if row not in first[1]])
    if script is double_descent:
        error = model(**apart)["loss"]
    else:
        points = (
            torch.stack([apart["initial"], torch.zeros(len(apart["initial"]))], 1) if script is pinn else 0
        )
        values = model.u(points) if script is pinn else model(**apart)["logits"].clamp(0, 1)
        error = (values - apart["labels"]).square().mean()
    assert value == pytest.approx(error.item(), rel=1e-5)  # as noisy as they were given


def never_trained(model: Any, data: Any, options: Any, measure: Any) -> dict[str, list[float]]:
    return {"step": [options["every"]], **{name: [x] for name, x in measure(options["every"]).items()}}


def test_quotients_are_modulo_p() -> None:
    pairs, quotient = grokking_divide.divisions(13)
    assert len(pairs) == 13 * 12 and torch.equal(quotient * pairs[:, 1] % 13, pairs[:, 0])


def test_the_loss_is_that_of_the_equation() -> None:
    """Against the value and its derivatives by autograd."""
    model = pinn.Network(8, 2, 5.0).double()
    interior = torch.rand(20, 2, dtype=torch.float64) * torch.tensor([2 * math.pi, 1.0])
    initial, labels, times = torch.rand(3, 20, dtype=torch.float64)
    points = interior.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.u(points).sum(), points)
    zero, end = torch.zeros(20), torch.full((20,), 2 * math.pi)
    at_start = model.u(torch.stack([initial, zero], 1))
    left, right = (model.u(torch.stack([x, times], 1)) for x in (zero, end))
    parts = [(slope[:, 1] + 5.0 * slope[:, 0]) ** 2, (at_start - labels) ** 2, (left - right) ** 2]
    assert min(part.mean() for part in parts) > 1e-3
    found = model(interior, initial, labels, times)["loss"]
    torch.testing.assert_close(found, sum(parts).mean(), check_dtype=False, rtol=1e-5, atol=0)


def test_psnr_is_that_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "fit", never_trained)
    monkeypatch.setattr(image, "picture", lambda size: np.full((size, size), 0.25))
    constant = {"logits": torch.tensor(0.35).expand(24 * 24)}
    monkeypatch.setattr(image.Network, "forward", lambda self, points, labels: constant)
    found = image.run(cell_of("image"))
    assert found["test_psnr"] == pytest.approx(20.0, abs=1e-3)  # an error of 0.1
    assert found["noisy_psnr"] == pytest.approx(-20 * math.log10(0.18), abs=0.7)  # 0.2, cut at 0
    monkeypatch.undo()
    grey = image.picture(24)
    assert grey.shape == (24, 24) and 0 <= grey.min() < 0.3 < 0.6 < grey.max() <= 1


def test_wrong_labels_are_as_many_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        double_descent, "fit", lambda model, data, *a: (seen.append(data), never_trained(model, data, *a))[1]
    )
    for noise in (0.0, 0.2):
        double_descent.run(cell_of("double_descent", noise=noise))
    clean, noisy = (data.__getitems__(list(range(200)))["labels"] for data in seen)
    assert (clean != noisy).sum() == 40 and len(set(noisy[clean != noisy].tolist())) > 5


def test_the_first_crossing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def crossing(model: Any, data: Any, options: Any, measure: Any) -> dict[str, list[float]]:
        for step in range(5, 50, 5):
            steps.append(step)
            wrong = step not in (10, 20)
            model.logits = lambda pairs, wrong=wrong: torch.eye(11)[(pairs.sum(1) + wrong) % 11]
            if measure(step) is None:
                break
        return {}

    monkeypatch.setattr(grokking_add, "fit", crossing)
    found = grokking_add.run(cell_of("grokking_add"))
    assert found["test_steps"] == found["validation_steps"] == 10 and steps == [5, 10, 15]
    monkeypatch.setattr(grokking_add, "fit", never_trained)
    assert grokking_add.run(cell_of("grokking_add"))["test_steps"] is None


def test_a_missing_model_is_said() -> None:
    with pytest.raises(common.RecipeError, match=r"model=outputs/none is not a folder"):
        text_noise.run(cell_of("text_noise", model="outputs/none"))
