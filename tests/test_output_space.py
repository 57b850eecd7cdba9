"""Output space against closed forms, from runs that the stock trainer made and the callback recorded."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from models import preferences, save_tiny_model, tiny_model, token_examples
from test_output_space_kernel import pairs
from torch import Tensor, nn
from transformers import PretrainedConfig, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.output_space import (
    ClassLogits,
    DPOMargin,
    OutputSpaceCallback,
    Recording,
    RecordingError,
    SequenceLogProb,
    SquaredError,
    cumulative,
    evolve,
    intervals,
    load_recording,
    split,
)
from hf_poprisk.output_space.analysis import analyse
from hf_poprisk.output_space.dynamics import block_diagonal, nothing
from hf_poprisk.output_space.preconditioner import scales
from hf_poprisk.output_space.recording import FILE_NAME, FLOW, GRADIENT_DESCENT

N, M = 12, 5  # probe and test examples


class HalfSquared(SquaredError):
    """½ |u − y|², for which a mode of the kernel decays as exp(−λt/n)."""

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["labels"].reshape(outputs.shape)).square().sum(1) / 2


class Regression(nn.Module):
    """A network with the half squared loss, in float64."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        predictions = self.body(x)
        error = (predictions - labels.reshape(predictions.shape)).square()
        return {"loss": error.sum(1).mean() / 2, "logits": predictions}


def examples(count: int, inputs: int, outputs: int = 1) -> list[dict[str, Tensor]]:
    return [
        {"x": torch.randn(inputs).double(), "labels": torch.randn(outputs).double()} for _ in range(count)
    ]


def one_each(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{k: v[None] for k, v in row.items()} for row in rows]


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": N,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "max_grad_norm": 0.0,
    }
    return {**common, **settings}


def record(
    folder: Path, model: nn.Module, train: list[Any], test: list[Any], steps: Any, **settings: Any
) -> Recording:
    """Train full-batch gradient descent, and read back what was recorded."""
    callback = OutputSpaceCallback(HalfSquared(), one_each(train), one_each(test), steps)
    args = TrainingArguments(**arguments(folder, **{"optim": "sgd", **settings}))
    Trainer(model, args, train_dataset=train, callbacks=[callback]).train()
    return load_recording(folder)


def displacement(recording: Recording, name: str) -> Tensor:
    """[N] or [M]: how far the outputs went."""
    series = recording.series[name]
    return (series[-1] - series[0]).reshape(-1).double()


def test_linear_regression_is_its_closed_form(tmp_path: Path) -> None:
    """W, channel, reservoir, 𝒢 and every mode of a least-squares run, recorded three times only."""
    d, eta, steps = 4, 0.3, 40
    train, test = examples(N, d), examples(M, d)
    model = Regression(nn.Linear(d, 1, bias=False))
    run = record(tmp_path, model, train, test, [0, 25], learning_rate=eta, max_steps=steps)
    assert run.rule == GRADIENT_DESCENT and run.steps == [0, 25, 40] and len(run.learning_rates) == steps
    x, x_test = (torch.stack([row["x"] for row in rows]) for rows in (train, test))
    u, s, _ = torch.linalg.svd(x, full_matrices=True)
    rates = torch.cat([s**2, torch.zeros(N - d)]) / N
    r = (1 - eta * rates) ** steps
    end = cumulative(run)[-1]
    torch.testing.assert_close(end.gramian, (u * N * (1 - r**2) / 2) @ u.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end.propagator, (u * r) @ u.T, rtol=1e-10, atol=1e-10)
    summed = torch.where(rates > 0, (1 - r) / rates.where(rates > 0, 1), eta * steps)
    torch.testing.assert_close(end.transfer, x_test @ x.T @ (u * summed) @ u.T, rtol=1e-10, atol=1e-10)
    cut = split(end.gramian)
    assert cut.channel == d
    reservoir = cut.vectors[:, d:]
    assert (x.T @ reservoir).abs().max() < 1e-8 and (end.transfer @ reservoir).abs().max() < 1e-8
    g = run.series["gradients"][0].reshape(-1)
    torch.testing.assert_close(
        u.T @ run.series["gradients"][-1].reshape(-1), r * (u.T @ g), atol=1e-12, rtol=1e-9
    )
    real = displacement(run, "test_outputs")
    torch.testing.assert_close(-end.transfer @ g, real, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(-end.displacement @ g, displacement(run, "outputs"), rtol=1e-9, atol=1e-11)
    fallen = run.series["losses"][0] - run.series["losses"][-1]
    torch.testing.assert_close(g @ end.gramian @ g, fallen, rtol=1e-10, atol=0)


def test_a_mode_decays_exponentially_in_the_limit_of_small_steps() -> None:
    j = torch.randn(N, 4).double()
    values, vectors = torch.linalg.eigh(j @ j.T)
    b, time = torch.eye(N).double() / N, 3.0
    found = evolve(j @ j.T, j[:2] @ j.T, b, [time / 7] * 7, FLOW)
    decay = torch.exp(-values * time / N)
    torch.testing.assert_close(found.propagator, (vectors * decay) @ vectors.T, rtol=1e-10, atol=1e-12)
    gaps = []
    for count in (1000, 2000):  # gradient descent tends to it, in proportion to its step
        steps = evolve(j @ j.T, j[:2] @ j.T, b, [time / count] * count, GRADIENT_DESCENT)
        pairs_of = ((getattr(steps, f), getattr(found, f)) for f in ("propagator", "gramian", "transfer"))
        gaps.append(torch.stack([(a - e).abs().max() for a, e in pairs_of]))
    torch.testing.assert_close(gaps[0] / gaps[1], torch.full((3,), 2.0).double(), rtol=0.02, atol=0)
    assert gaps[1].max() < 0.01


def test_a_frozen_kernel_with_two_outputs_is_its_closed_form(tmp_path: Path) -> None:
    """Random features and a trained head: K = (Φ Φᵀ) ⊗ 1 never moves."""
    width, eta, steps = 5, 0.5, 30
    body = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2, bias=False))
    body[0].requires_grad_(False)
    train, test = examples(N, 3, 2), examples(M, 3, 2)
    run = record(tmp_path, Regression(body), train, test, 7, learning_rate=eta, max_steps=steps)
    phi, phi_test = (body[:2](torch.stack([row["x"] for row in rows])) for rows in (train, test))
    two = torch.eye(2).double()
    kernels = run.series["kernel"]
    torch.testing.assert_close(kernels[0], torch.kron(phi @ phi.T, two), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kernels[-1], kernels[0], rtol=1e-12, atol=1e-12)
    values, vectors = torch.linalg.eigh(kernels[0])
    r = (1 - eta * values / N) ** steps
    end = cumulative(run)[-1]
    torch.testing.assert_close(end.gramian, (vectors * N * (1 - r**2) / 2) @ vectors.T, rtol=1e-9, atol=1e-10)
    cut = split(end.gramian)
    assert cut.channel == 2 * width
    assert (end.transfer @ cut.vectors[:, 2 * width :]).abs().max() < 1e-8
    mean = torch.where(values > 1e-9, (1 - r) * N / values, eta * steps)
    transfer = torch.kron(phi_test @ phi.T, two) @ (vectors * mean) @ vectors.T
    torch.testing.assert_close(end.transfer, transfer, rtol=1e-8, atol=1e-9)
    g = run.series["gradients"][0].reshape(-1)
    torch.testing.assert_close(-end.transfer @ g, displacement(run, "test_outputs"), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", [GRADIENT_DESCENT, FLOW])
def test_the_reservoir_is_invisible_at_test_time_whatever_the_kernel_does(rule: str) -> None:
    """K, K_QS and B of four intervals that share nothing but a null space; B as uneven as a classifier's."""
    span, whole = torch.randn(N, 6).double(), nothing(N, M)
    for _ in range(4):
        features = torch.randn(6, 9).double()
        j, j_test = span @ features, torch.randn(M, 9).double()
        curvature = torch.diag(torch.rand(N).double() ** 4) / N
        rates = (torch.rand(8).double() * 0.01).tolist()
        whole = whole.then(evolve(j @ j.T, j_test @ j.T, curvature, rates, rule))
    assert whole.stable
    values, vectors = torch.linalg.eigh(whole.gramian)
    kernel = vectors[:, values < 1e-12 * values[-1]]
    assert kernel.shape[1] == N - 6 and split(whole.gramian).channel == 6
    assert (span.T @ kernel).abs().max() < 1e-8
    assert (whole.transfer @ kernel).abs().max() < 1e-8 < whole.transfer.abs().max()


def narrow(folder: Path, eta: float) -> Recording:
    """A two-layer network from a small start: its kernel must grow before it learns anything."""
    torch.manual_seed(3)
    train, test = examples(N, 3), examples(M, 3)
    for row in (*train, *test):
        row["labels"] = torch.tanh(row["x"][:1] - row["x"][1:2])
    body = nn.Sequential(nn.Linear(3, 20, bias=False), nn.Tanh(), nn.Linear(20, 1, bias=False))
    with torch.no_grad():
        for p in body.parameters():
            p.mul_(0.3)
    steps = round(60 / eta)
    return record(folder, Regression(body), train, test, 1, learning_rate=eta, max_steps=steps)


def test_feature_learning_is_predicted_and_better_with_smaller_steps(tmp_path: Path) -> None:
    """Where it ends within 5 % for every step, on the way better with smaller ones."""
    ends, worst, fallen = [], [], []
    for eta in (1.6, 0.8, 0.4):
        run = narrow(tmp_path / str(eta), eta)
        kernels = run.series["kernel"]
        assert (kernels[-1] - kernels[0]).norm() > kernels[0].norm()  # it moves by more than its own norm
        found = analyse(run)
        ends.append(float(found.transfer_error[-1]))
        worst.append(float(found.transfer_error.max()))
        fallen.append(abs(float(found.predicted.sum() / found.measured.sum()) - 1))
        g, real = run.series["gradients"][0].reshape(-1), displacement(run, "test_outputs")
        blocks = block_diagonal(run.series["curvatures"][0])
        frozen = evolve(kernels[0], run.series["cross_kernel"][0], blocks, run.learning_rates, run.rule)
        assert float((-frozen.transfer @ g - real).norm() / real.norm()) > 0.15  # lazy training is not it
    assert max(ends) < 0.05 and worst[-1] < 0.05 and fallen[-1] < 0.01, (ends, worst, fallen)
    for errors, least in ((ends, 1.5), (worst, 3.0), (fallen, 3.0)):
        assert all(a / b > least for a, b in zip(errors, errors[1:], strict=False)), errors


def descent(eta: float, time: float) -> Recording:
    """Gradient descent of a small network without a trainer, every step recorded."""
    torch.manual_seed(3)
    x, x_test = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    y = torch.tanh(x[:, 0] - x[:, 1])
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False)).double()
    run = Recording(GRADIENT_DESCENT, "SGD", "none", learning_rates=[eta] * round(time / eta))
    none = torch.tensor(0.0).double()
    for step in range(len(run.learning_rates) + 1):
        (u, j), (u_test, j_test) = (with_jacobian(model, part) for part in (x, x_test))
        g = (u - y) / len(y)
        values = {"kernel": j @ j.T, "cross_kernel": j_test @ j.T, "gradients": g[:, None]}
        values |= {"curvatures": torch.ones(6, 1, 1).double() / 6, "losses": (u - y).square().mean() / 2}
        values |= {"outputs": u[:, None], "test_outputs": u_test[:, None], "test_losses": none}
        run.add(step, values)
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(weights - eta * j.T @ g, model.parameters())
    return run


def with_jacobian(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n] and their Jacobian [n, P]."""
    u, params = model(x)[:, 0], list(model.parameters())
    rows = (torch.autograd.grad(value, params, retain_graph=True) for value in u)
    return u.detach(), torch.stack([nn.utils.parameters_to_vector(row) for row in rows])


def test_the_loss_is_followed_to_second_order_and_displacements_to_first() -> None:
    errors = []
    for eta in (0.1, 0.05):
        run = descent(eta, 12.0)
        end, g = cumulative(run)[-1], run.series["gradients"][0].reshape(-1)
        real = displacement(run, "test_outputs")
        fall = sum(
            float(a.reshape(-1) @ part.gramian @ a.reshape(-1))
            for a, part in zip(run.series["gradients"], intervals(run), strict=False)
        )
        fallen = float(run.series["losses"][0] - run.series["losses"][-1])
        errors.append((float((-end.transfer @ g - real).norm()), abs(fall - fallen)))
    (far, loss_far), (near, loss_near) = errors
    assert far / near == pytest.approx(2, abs=0.15) and loss_far / loss_near == pytest.approx(4, abs=0.15)


def test_the_flow_of_a_moving_kernel_is_followed_from_the_middle() -> None:
    """Gradient descent in tiny steps, 60 or 30 of which are given as one: an error of second order."""
    whole, errors = descent(0.01, 6.0), []
    for gap in (60, 30):
        series = {name: values[::gap] for name, values in whole.series.items()}
        count = 600 // gap
        run = Recording(FLOW, "SGD", "none", "", {}, [*range(count + 1)], [0.01 * gap] * count, series)
        fall = sum(
            float(a.reshape(-1) @ part.gramian @ a.reshape(-1))
            for a, part in zip(series["gradients"], intervals(run), strict=False)
        )
        errors.append(abs(fall / float(series["losses"][0] - series["losses"][-1]) - 1))
    assert errors[1] < 0.001 and errors[0] / errors[1] > 2.5


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "poprisk_adamw"])
def test_the_recorded_kernel_is_that_of_the_step_taken(tmp_path: Path, optim: str) -> None:
    """Without momentum a linear model's test outputs move by −η K_QS g, with Adam and the gate too."""
    train, test = examples(N, 3), examples(M, 3)
    callback = OutputSpaceCallback(HalfSquared(), one_each(train), one_each(test), 1)
    settings = {"optim": optim, "learning_rate": 0.05, "max_steps": 6, "adam_beta1": 0.0, "weight_decay": 0.0}
    args = PopRiskTrainingArguments(**arguments(tmp_path, **settings, lr_scheduler_type="linear"))
    PopRiskTrainer(Regression(nn.Linear(3, 1)), args=args, train_dataset=train, callbacks=[callback]).train()
    run = load_recording(tmp_path)
    kinds = {"sgd": "none", "adamw_torch": "adam", "poprisk_adamw": "gated adam"}
    assert run.preconditioner == kinds[optim] and run.steps == list(range(7))
    assert (run.rule == GRADIENT_DESCENT) == (optim == "sgd")
    for i, rate in enumerate(run.learning_rates):
        for kernel, outputs in (("kernel", "outputs"), ("cross_kernel", "test_outputs")):
            u, g = run.series[outputs], run.series["gradients"][i].reshape(-1)
            moved = (u[i + 1] - u[i]).reshape(-1)
            torch.testing.assert_close(-rate * run.series[kernel][i] @ g, moved, rtol=1e-6, atol=1e-9)
    ranks = [int(torch.linalg.matrix_rank(k)) for k in run.series["kernel"]]
    assert (min(ranks) < 4) == (optim == "poprisk_adamw")  # a closed gate takes directions away


def test_groups_with_learning_rates_of_their_own_are_in_the_kernel(tmp_path: Path) -> None:
    train, test = examples(N, 3), examples(M, 3)
    model = Regression(nn.Linear(3, 1))
    groups = [{"params": [model.body.weight], "lr": 0.05}, {"params": [model.body.bias], "lr": 0.5}]
    callback = OutputSpaceCallback(HalfSquared(), one_each(train), one_each(test), 1)
    args = TrainingArguments(**arguments(tmp_path, max_steps=3))
    optimizers = torch.optim.SGD(groups), None
    Trainer(model, args, train_dataset=train, callbacks=[callback], optimizers=optimizers).train()
    run = load_recording(tmp_path)
    assert run.rule == GRADIENT_DESCENT and run.learning_rates == [0.05] * 3
    for i in range(3):
        g, u = run.series["gradients"][i].reshape(-1), run.series["test_outputs"]
        moved = (u[i + 1] - u[i]).reshape(-1)
        torch.testing.assert_close(-0.05 * run.series["cross_kernel"][i] @ g, moved, rtol=1e-6, atol=1e-9)


def test_recording_changes_nothing_in_a_judged_and_gated_run(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2))

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layers(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(24)]
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "poprisk_label_noise": "audit"}
    args, weights = PopRiskTrainingArguments(**arguments(tmp_path, **settings)), []
    for callbacks in ([OutputSpaceCallback(ClassLogits(), one_each(data), one_each(data[:4]), 2)], []):
        torch.manual_seed(0)
        model = Classifier()
        PopRiskTrainer(model, args=args, train_dataset=data, callbacks=callbacks).train()
        weights.append(model.layers[0].weight.detach())
    assert torch.equal(*weights) and load_recording(tmp_path).steps == [0, 2, 4, 6]


def test_a_step_that_is_left_out_leaves_the_recording_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Regression):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            found = super().forward(x, labels)
            if self.training and trainer.state.global_step in (2, 3):
                found["loss"] = found["loss"] * math.nan
            return found

    train, test = examples(N, 3), examples(M, 3)
    callback = OutputSpaceCallback(HalfSquared(), one_each(train), one_each(test), 1)
    args, model = PopRiskTrainingArguments(**arguments(tmp_path, max_steps=6)), Broken(nn.Linear(3, 1))
    trainer = PopRiskTrainer(model, args=args, train_dataset=train, callbacks=[callback])
    trainer.train()
    run = load_recording(tmp_path)
    assert run.steps == [0, 1, 4, 5, 6] and caplog.text.count("is not recorded") == 1
    assert [rate == 0 for rate in run.learning_rates] == [False, False, True, True, False, False]


def test_an_example_whose_loss_is_not_finite_is_refused_before_training(tmp_path: Path) -> None:
    rows = list(token_examples(3))
    bad = [*rows[:2], {**rows[2], "labels": torch.full_like(rows[2]["labels"], -100)}]
    data = [{k: v[0] for k, v in row.items()} for row in rows]
    args = TrainingArguments(**arguments(tmp_path, max_steps=1, per_device_train_batch_size=1))
    for probe, test, name in ((bad, rows, "probe"), (rows, bad, "test")):
        callback = OutputSpaceCallback(SequenceLogProb(), probe, test)
        with pytest.raises(ValueError, match=f"example 2 of {name} has .* not finite"):
            Trainer(tiny_model(), args, train_dataset=data, callbacks=[callback]).train()


def test_momentum_is_counted_and_mini_batches_flow(tmp_path: Path) -> None:
    train, test = examples(N, 2), examples(M, 2)
    model = Regression(nn.Linear(2, 1, bias=False))
    settings = {"optim_args": "momentum=0.9", "learning_rate": 0.002, "max_steps": 600}
    run = record(tmp_path, model, train, test, 100, per_device_train_batch_size=4, **settings)
    assert run.rule == FLOW and run.learning_rates[0] == pytest.approx(0.02)
    g, real = run.series["gradients"][0].reshape(-1), displacement(run, "test_outputs")
    predicted = -cumulative(run)[-1].transfer @ g
    assert float((predicted - real).norm() / real.norm()) < 0.05


def test_only_full_batch_descent_on_the_probe_is_called_that(tmp_path: Path) -> None:
    train, test = examples(N, 2), examples(M, 2)
    for settings, probe, rule in (
        ({}, train, GRADIENT_DESCENT),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, train, GRADIENT_DESCENT),
        ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, train, FLOW),
        ({"max_grad_norm": 1.0}, train, FLOW),
        ({"weight_decay": 0.1, "optim_args": "weight_decay=0.1"}, train, FLOW),
        ({}, train[:5], FLOW),
    ):
        callback = OutputSpaceCallback(HalfSquared(), one_each(probe), one_each(test))
        args = TrainingArguments(**arguments(tmp_path, **{"optim": "sgd", "max_steps": 1, **settings}))
        Trainer(Regression(nn.Linear(2, 1)), args, train_dataset=train, callbacks=[callback]).train()
        run = load_recording(tmp_path)
        assert run.rule == rule and run.steps == [0, 1], settings
        if rule == GRADIENT_DESCENT:  # and then it is
            g, (interval,) = run.series["gradients"][0].reshape(-1), intervals(run)
            torch.testing.assert_close(-interval.transfer @ g, displacement(run, "test_outputs"))


def test_a_step_that_is_not_that_of_the_loss_on_the_probe_flows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What counting examples does not see: dropout, label smoothing, other examples, a change on the way."""

    class Weighted(Regression):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            found = super().forward(x, labels)
            if trainer.state.global_step == 2:
                found["loss"] = found["loss"] * 1.001
            return found

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.config = nn.Linear(4, 3), PretrainedConfig()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.head(x)
            loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
            return {**loss, "logits": logits}

    train = examples(N, 3)
    labelled = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(N)]
    dropping = Regression(nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 1)))
    plain = Regression(nn.Linear(3, 1))
    for model, task, data, probe, settings, off in (
        (dropping, HalfSquared(), train, train, {}, 0),
        (plain, HalfSquared(), train, examples(N, 3), {}, 0),
        (Weighted(nn.Linear(3, 1)), HalfSquared(), train, train, {}, 2),
        (Classifier(), ClassLogits(), labelled, labelled, {"label_smoothing_factor": 0.3}, 0),
        (Classifier(), ClassLogits(), labelled, labelled, {}, None),
        (plain, HalfSquared(), train, train, {"learning_rate": 1.0, "max_steps": 100}, None),  # to rounding
    ):
        caplog.clear()
        callback = OutputSpaceCallback(task, one_each(probe), one_each(data[:2]), 1)
        args = TrainingArguments(**arguments(tmp_path, **{"optim": "sgd", "max_steps": 4, **settings}))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train()
        run = load_recording(tmp_path)
        assert run.rule == (GRADIENT_DESCENT if off is None else FLOW), (type(model), settings)
        assert (f"gradient of step {off} is not that of" in run.optimizer) == (off is not None)
        assert caplog.text.count("the loss on the probe") == (off is not None)


def test_a_resumed_run_has_the_recording_of_the_whole(tmp_path: Path) -> None:
    train, test = examples(N, 3), examples(M, 3)

    def go(folder: Path, steps: int, resume: Path | None = None) -> Recording:
        torch.manual_seed(0)
        callback = OutputSpaceCallback(HalfSquared(), one_each(train), one_each(test), [3, 8])
        settings = {"max_steps": steps, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
        args = TrainingArguments(**arguments(folder, **settings, lr_scheduler_type="linear"))
        body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        trainer = Trainer(Regression(body), args, train_dataset=train, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return load_recording(folder)

    whole = go(tmp_path / "a", 11)
    assert whole.steps == [0, 3, 8, 11]
    for checkpoint in ("checkpoint-3", "checkpoint-9"):
        again = go(tmp_path / "a", 11, tmp_path / "a" / checkpoint)
        assert again.steps == whole.steps and again.learning_rates == whole.learning_rates
        for name, values in whole.series.items():
            assert all(torch.equal(a, b) for a, b in zip(values, again.series[name], strict=True)), name
    (tmp_path / "a" / FILE_NAME).unlink()
    with pytest.raises(RecordingError, match="holds no output_space"):
        go(tmp_path / "a", 11, tmp_path / "a" / "checkpoint-3")


def test_a_run_resumed_with_another_recorder_is_refused_before_training(tmp_path: Path) -> None:
    train, test, noise = examples(N, 3), examples(M, 3), torch.randn(N)

    def go(probe: list[Any], test: list[Any], noise: dict[str, Tensor], resume: bool = True) -> None:
        callback = OutputSpaceCallback(HalfSquared(), one_each(probe), one_each(test), 1, 64, noise)
        settings = {"max_steps": 3 if resume else 2, "save_strategy": "steps", "save_steps": 2}
        args = TrainingArguments(**arguments(tmp_path, **settings))
        trainer = Trainer(Regression(nn.Linear(3, 1)), args, train_dataset=train, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / "checkpoint-2"))

    go(train, test, {"noise": noise}, resume=False)
    before = (tmp_path / FILE_NAME).read_bytes()
    for other in (
        (train[:8], test, {}),
        (examples(N, 3), test, {"noise": noise}),
        (train, examples(M, 3), {"noise": noise}),
        (train, test[:2], {"noise": noise}),
        (train, test, {}),
        (train, test, {"noise": -noise}),
    ):
        with pytest.raises(RecordingError, match="another optimizer, batch size, probe, test or directions"):
            go(*other)
        assert (tmp_path / FILE_NAME).read_bytes() == before
    go(train, test, {"noise": noise})
    assert load_recording(tmp_path).steps == [0, 1, 2, 3]


def test_preference_pairs_of_the_stock_trainer(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    args = DPOConfig(
        **arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, bf16=False),
        precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": "float32"},
        disable_dropout=True,
    )
    trainer = DPOTrainer(str(model), args=args, train_dataset=preferences(4))
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    assert "ref_chosen_logps" in batches[0]
    trainer.add_callback(OutputSpaceCallback(DPOMargin(args.beta), batches, pairs(2), 1))
    trainer.train()
    run = load_recording(tmp_path)
    assert run.series["outputs"][0].abs().max() < 1e-4  # the model is its reference
    torch.testing.assert_close(run.series["losses"][0], torch.tensor(math.log(2)), rtol=1e-4, atol=1e-5)
    assert run.series["losses"][-1] < run.series["losses"][0] and run.preconditioner == "adam"


def test_margins_are_those_of_the_trainer_and_move_by_the_kernel(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "optim": "sgd"}
    args = DPOConfig(
        **arguments(tmp_path, **settings, beta=0.3, logging_steps=1, bf16=False),
        precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = DPOTrainer(str(model), args=args, train_dataset=preferences(4), eval_dataset=preferences(6))
    data = trainer.train_dataset, trainer.eval_dataset
    probe, test = ([trainer.data_collator([row]) for row in part] for part in data)
    trainer.add_callback(OutputSpaceCallback(DPOMargin(0.3), probe, test, 1))
    trainer.train()
    run = load_recording(tmp_path)
    assert run.rule == GRADIENT_DESCENT
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert margins[2] > 1e-4
    assert [float(u.mean()) for u in run.series["outputs"][:3]] == pytest.approx(margins, rel=1e-2, abs=1e-5)
    for i, rate in enumerate(run.learning_rates):
        g, u = run.series["gradients"][i].reshape(-1), run.series["test_outputs"]
        moved, predicted = (u[i + 1] - u[i]).reshape(-1), -rate * run.series["cross_kernel"][i] @ g
        assert float((moved - predicted).norm() / moved.norm()) < 0.05


def test_a_loss_of_dpo_that_is_not_the_tasks_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    for settings, message in (
        ({"beta": 0.5}, r"DPOMargin has beta 0.1, the trainer 0.5"),
        ({"loss_type": ["ipo"]}, r"does not know the loss_type \['ipo'\]"),
    ):
        args = DPOConfig(
            **arguments(tmp_path, max_steps=1, **settings), model_init_kwargs={"dtype": "float32"}
        )
        trainer = DPOTrainer(str(model), args=args, train_dataset=preferences(4))
        trainer.add_callback(OutputSpaceCallback(DPOMargin(), pairs(2), pairs(2)))
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_the_cut_of_a_spectrum() -> None:
    def cut(*values: float) -> int:
        basis = torch.linalg.qr(torch.randn(len(values), len(values)).double()).Q
        return split((basis * torch.tensor(values).double()) @ basis.T).channel

    assert cut(5, 4, 3, 1e-3, 1e-4) == 3
    assert cut(5, 1, 0.5, 0, 0, 0) == 3
    assert cut(5, 4, 3, 2.6) == 4  # of one piece
    assert cut(5, 4.9, 1.5, 1.4) == 2
    assert cut(0, 0, 0) == 0 and cut(1, 0) == 1
    w = torch.diag(torch.tensor([4.0, 0.0]).double())
    assert split(w).reservoir_share(torch.tensor([[3.0], [4.0]])) == pytest.approx(16 / 25)


class Stop(TrainerCallback):
    """After seven steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 7


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "poprisk_adamw"])
def test_a_run_that_stops_early_ends_with_its_last_kernel(tmp_path: Path, optim: str) -> None:
    train, test, ends = examples(N, 3), examples(M, 3), []
    for steps, callbacks in ((7, []), (100, [Stop()])):
        torch.manual_seed(0)
        recorder = OutputSpaceCallback(HalfSquared(), one_each(train), one_each(test), [0, 6])
        settings = {"optim": optim, "learning_rate": 0.05, "max_steps": steps}
        body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        args = PopRiskTrainingArguments(**arguments(tmp_path, **settings))
        model, every = Regression(body), [recorder, *callbacks]
        PopRiskTrainer(model, args=args, train_dataset=train, callbacks=every).train()
        run = load_recording(tmp_path)
        assert run.steps == [0, 6, 7]
        ends.append(run.series["kernel"][-1])
        grown = ends[-1].norm() / run.series["kernel"][1].norm()  # the weights moved, P is that of step 6
        assert 0.8 < float(grown) < 1.25
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_the_scales_of_a_step_are_the_same_before_and_after_it() -> None:
    model, optimizers = nn.Linear(3, 2), (torch.optim.AdamW, torch.optim.SGD)
    for make in optimizers:
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.05}]
        optimizer = make(groups, lr=0.1)
        for _ in range(3):
            model(torch.randn(4, 3)).square().sum().backward()
            before = scales(optimizer, model)
            optimizer.step()
            optimizer.zero_grad()
            after = scales(optimizer, model, taken=True)
            for name, value in before.items():
                torch.testing.assert_close(after[name], value)
        assert scales(make(model.parameters(), lr=0.1), model) is None or make is not torch.optim.SGD


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    train = examples(4, 3)
    rows = one_each(train)
    for wrong, message in (
        ({"steps": 0}, "steps must be"),
        ({"steps": [1.5]}, "steps must be"),
        ({"test": []}, "at least one batch"),
        ({"chunk": 0}, "chunk must be"),
    ):
        with pytest.raises(ValueError, match=message):
            OutputSpaceCallback(**{"task": HalfSquared(), "probe": rows, "test": rows, **wrong})
    for settings, more, message in (
        ({"optim": "adafactor"}, {}, "cannot read the preconditioner of this Adafactor"),
        ({"poprisk_estimator": "ema"}, {}, "cannot read a gate of poprisk_estimator='ema'"),
        ({"optim": "sgd"}, {"directions": {"noise": torch.ones(3)}}, r"shape \(3,\); the probe's outputs"),
    ):
        callback = OutputSpaceCallback(HalfSquared(), rows, rows, 1, **more)
        args = PopRiskTrainingArguments(**arguments(tmp_path, max_steps=1, **settings))
        model = Regression(nn.Linear(3, 1))
        with pytest.raises(ValueError, match=message):
            PopRiskTrainer(model, args=args, train_dataset=train, callbacks=[callback]).train()
    with pytest.raises(RecordingError, match="holds no output_space"):
        load_recording(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"nonsense")
    with pytest.raises(RecordingError, match="is damaged"):
        load_recording(tmp_path)


@pytest.mark.parametrize(
    "name, value", [("distributed_type", DistributedType.FSDP), ("_mixed_precision", "fp16")]
)
def test_what_accelerate_launch_sets_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    rows = one_each(examples(4, 3))
    trainer = Trainer(Regression(nn.Linear(3, 1)), TrainingArguments(**arguments(tmp_path)))
    trainer.create_optimizer()
    shared = PartialState if name == "distributed_type" else AcceleratorState
    monkeypatch.setitem(shared._shared_state, name, value)
    recorder, given = OutputSpaceCallback(HalfSquared(), rows, rows), (trainer.args, trainer.state, None)
    with pytest.raises(ValueError, match=f"does not support {value.lower()}: leave it off"):
        recorder.on_train_begin(*given, model=trainer.model, optimizer=trainer.optimizer)


def test_a_recording_too_large_is_refused_and_one_checkpoint_is_one_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test, writes = examples(N, 3), examples(M, 3), []
    save = Recording.save
    monkeypatch.setattr(Recording, "save", lambda run, to: writes.append(len(run.steps)) or save(run, to))
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1, "max_steps": 4}
    run = record(tmp_path, Regression(nn.Linear(3, 1)), train, test, 1, **settings)
    assert writes == [2, 4, 5]
    size = sum(x.nbytes for name in ("kernel", "cross_kernel") for x in run.series[name])
    monkeypatch.setattr("hf_poprisk.output_space.recorder._LIMIT", size - 1)
    with pytest.raises(ValueError, match=rf"5 records of {N} × {N + M} numbers .* set steps= to fewer"):
        record(tmp_path, Regression(nn.Linear(3, 1)), train, test, 1, **settings)
    record(tmp_path, Regression(nn.Linear(3, 1)), train, test, [1, 3, 99], **settings)
    monkeypatch.setattr("hf_poprisk.output_space.recorder._LIMIT", size)
    record(tmp_path, Regression(nn.Linear(3, 1)), train, test, 1, **settings)


def test_a_damaged_recording_is_refused(tmp_path: Path) -> None:
    train, test = examples(4, 3), examples(3, 3)
    run = record(tmp_path, Regression(nn.Linear(3, 1)), train, test, 1, max_steps=2)
    assert len(list(intervals(run))) == 2
    run.series["kernel"][1][0, 0] = float("nan")
    run.save(tmp_path)
    with pytest.raises(RecordingError, match="not finite"):
        load_recording(tmp_path)
    run.series["kernel"] = [k[:2] for k in run.series["kernel"]]
    run.save(tmp_path)
    with pytest.raises(RecordingError, match="kernel and outputs do not fit"):
        load_recording(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if FILE_NAME in path.name] == [FILE_NAME]
