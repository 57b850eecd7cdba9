"""What the callback records of runs of the stock trainers and of ours, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from models import preferences, save_tiny_model, tiny_model, token_examples
from runs import HalfSquared, M, N, Regression, displacement, examples, flat, network, recorder, train
from test_kernel import pairs
from torch import Tensor, nn
from transformers import PretrainedConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_poprisk.output_space import ClassLogits, DPOMargin, OutputSpaceCallback, SequenceLogProb
from hf_poprisk.output_space.recording import (
    FILE_NAME,
    FLOW,
    GRADIENT_DESCENT,
    RecordingError,
    load_recording,
)

KINDS = {"sgd": "none", "adamw_torch": "adam", "poprisk_adamw": "gated adam"}


class Classifier(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers, self.config = nn.Sequential(nn.Linear(4, 3), nn.Dropout(dropout)), PretrainedConfig()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def classified(count: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(count)]


class Changed(Regression):
    """A loss that is another from the ``calls``-th forward in training on."""

    def __init__(self, factor: float, calls: set[int]) -> None:
        super().__init__(nn.Linear(3, 1))
        self.factor, self.calls, self.count = factor, calls, -1

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = super().forward(x, labels)
        self.count += self.training
        if self.training and self.count in self.calls:
            found["loss"] = found["loss"] * self.factor
        return found


@pytest.mark.parametrize("optim", [*KINDS, "groups of sgd", "groups of adam"])
def test_the_recorded_kernel_is_that_of_the_step_taken(tmp_path: Path, optim: str) -> None:
    """Without momentum a linear model's outputs move by −η K g: with Adam, the gate, a rate per group too."""
    data, test, model = examples(N), examples(M), Regression(nn.Linear(3, 1))
    settings = {"learning_rate": 0.05, "max_steps": 6, "adam_beta1": 0.0, "lr_scheduler_type": "linear"}
    if optim in KINDS:
        settings |= {"optim": optim}
    else:
        groups = [{"params": [model.body[0].weight], "lr": 0.05}, {"params": [model.body[0].bias], "lr": 0.5}]
        adam = torch.optim.Adam(groups, betas=(0.0, 0.999))
        settings |= {"optimizers": (torch.optim.SGD(groups) if "sgd" in optim else adam, None)}
    run = train(tmp_path, model, data, recorder(data, test), **settings)
    assert run.preconditioner == KINDS.get(optim, "adam" if "adam" in optim else "none")
    assert run.steps == list(range(7)) and (run.rule == GRADIENT_DESCENT) == ("sgd" in optim)
    assert run.learning_rates == pytest.approx([0.05 * (1 - i / 6) for i in range(6)])
    for i, rate in enumerate(run.learning_rates):
        for kernel, outputs in (("kernel", "outputs"), ("cross_kernel", "test_outputs")):
            expected = -rate * run.series[kernel][i] @ flat(run, "gradients", i)
            torch.testing.assert_close(expected, displacement(run, i, i + 1, outputs), rtol=1e-6, atol=1e-9)
    ranks = [int(torch.linalg.matrix_rank(k)) for k in run.series["kernel"]]
    assert (min(ranks) < 4) == (optim == "poprisk_adamw")  # a closed gate takes directions away


def test_recording_changes_nothing_in_a_judged_and_gated_run(tmp_path: Path) -> None:
    data, weights = classified(56), []  # judged are 50 or more
    settings = {"optim": "poprisk_adamw", "per_device_train_batch_size": 8, "max_steps": 6}
    for callbacks in ([recorder(data, data[:4], 2, ClassLogits())], []):
        torch.manual_seed(0)
        model = Classifier(dropout=0.2)
        train(tmp_path, model, data, *callbacks, **settings, poprisk_label_noise="audit")
        weights.append(model.layers[0].weight.detach())
    assert torch.equal(*weights) and load_recording(tmp_path).steps == [0, 2, 4, 6]


def test_a_step_that_is_left_out_leaves_the_recording_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, model = examples(N), Changed(math.nan, {3, 4})  # the first forward is the self-check's
    settings = {"optim": "poprisk_adamw", "max_steps": 6}
    run = train(tmp_path, model, data, recorder(data, examples(M)), **settings)
    out = [step for step, rate in enumerate(run.learning_rates) if rate == 0]
    assert len(out) == 2 and run.steps == [step for step in range(7) if step not in out]
    assert caplog.text.count("is not recorded") == 2


def test_momentum_is_counted_and_mini_batches_flow(tmp_path: Path) -> None:
    data = examples(N, 2)
    settings = {"optim_args": "momentum=0.9", "learning_rate": 0.002, "max_steps": 600}
    settings |= {"per_device_train_batch_size": 4}
    callback = recorder(data, examples(M, 2), 100)
    run = train(tmp_path, Regression(nn.Linear(2, 1, bias=False)), data, callback, **settings)
    assert run.rule == FLOW and run.learning_rates[0] == pytest.approx(0.02)
    assert runs.relative(runs.predicted(run), displacement(run)) < 0.05


DESCENDS = {  # case → settings
    "full batch": {},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "to rounding": {"learning_rate": 1.0, "max_steps": 100},
    "logits": {},
}
FLOWS = {
    "mini-batches": {"per_device_train_batch_size": 4},
    "clipping": {"max_grad_norm": 1.0},
    "weight decay": {"weight_decay": 0.1},
    "uneven": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.3},
} | dict.fromkeys(("part of the data", "dropout", "other examples", "loss"), {})
SEEN_AT = {"loss": 2} | dict.fromkeys(("uneven", "label smoothing", "dropout", "other examples"), 0)


@pytest.mark.parametrize("case", [*DESCENDS, *FLOWS])
def test_only_full_batch_descent_on_the_probe_is_called_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """What the settings do not show is seen in the gradient of a step."""
    settings, off = (DESCENDS | FLOWS)[case], SEEN_AT.get(case)
    classes = case in ("label smoothing", "logits")
    data, task = (classified(N), ClassLogits()) if classes else (examples(N), HalfSquared())
    model = Classifier() if classes else Regression(nn.Linear(3, 1))
    if case == "dropout":
        model = Regression(nn.Dropout(0.3), nn.Linear(3, 1))
    elif case == "loss":
        model = Changed(1.001, {2})
    probe = {"other examples": examples(N), "part of the data": data[:5]}.get(case, data)
    run = train(tmp_path, model, data, recorder(probe, data[:2], 1, task), **settings)
    assert run.rule == (GRADIENT_DESCENT if case in DESCENDS else FLOW)
    assert (f"gradient of step {off} is not that of" in run.optimizer) == (off is not None)
    assert caplog.text.count("the loss on the probe") == (off is not None)
    if case in DESCENDS and not classes:  # then it is, for a linear model
        torch.testing.assert_close(runs.predicted(run), displacement(run))


@pytest.mark.parametrize("optim", KINDS)
def test_a_run_that_stops_early_ends_with_its_last_kernel(tmp_path: Path, optim: str) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 7

    data, test, ends = examples(N), examples(M), []
    for steps, when, callbacks in ((7, [0, 6], []), (100, [0], [Stop()])):
        torch.manual_seed(0)
        settings = {"optim": optim, "learning_rate": 0.05, "max_steps": steps}
        run = train(tmp_path, network(), data, recorder(data, test, when), *callbacks, **settings)
        assert run.steps == [*when, 7]
        ends.append(run.series["kernel"][-1])
        if 6 in when:  # the weights moved, P is that of step 6, recorded then or not
            assert 0.8 < float(ends[-1].norm() / run.series["kernel"][1].norm()) < 1.25
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def dpo_trainer(tmp_path: Path, **settings: Any) -> DPOTrainer:
    model = save_tiny_model(tmp_path / "model", "llama")
    args = DPOConfig(
        **runs.arguments(tmp_path, **{"per_device_train_batch_size": 4, "bf16": False, **settings}),
        precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": "float32"},
    )
    return DPOTrainer(str(model), args=args, train_dataset=preferences(4), eval_dataset=preferences(6))


def test_margins_are_those_of_the_trainer_and_move_by_the_kernel(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "learning_rate": 0.01, "optim": "sgd", "logging_steps": 1, "beta": 0.3}
    trainer = dpo_trainer(tmp_path, **settings)
    data = trainer.train_dataset, trainer.eval_dataset
    probe, test = ([trainer.data_collator([row]) for row in part] for part in data)
    trainer.add_callback(OutputSpaceCallback(DPOMargin(0.3), probe, test, 1))
    trainer.train()
    run = load_recording(tmp_path)
    assert run.rule == GRADIENT_DESCENT
    assert run.series["outputs"][0].abs().max() < 1e-4  # the model is its reference
    torch.testing.assert_close(run.series["losses"][0], torch.tensor(math.log(2)), rtol=1e-4, atol=1e-5)
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert margins[2] > 1e-4
    assert [float(u.mean()) for u in run.series["outputs"][:3]] == pytest.approx(margins, rel=1e-2, abs=1e-5)
    for i, rate in enumerate(run.learning_rates):
        expected = -rate * run.series["cross_kernel"][i].double() @ flat(run, "gradients", i)
        assert runs.relative(expected, displacement(run, i, i + 1)) < 0.05


def test_a_loss_of_dpo_that_is_not_the_tasks_is_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"beta": 0.5}, "DPOMargin has beta 0.1, the trainer 0.5"),
        ({"loss_type": ["ipo"]}, r"does not know the loss_type \['ipo'\]"),
    ):
        trainer = dpo_trainer(tmp_path, max_steps=1, **settings)
        trainer.add_callback(OutputSpaceCallback(DPOMargin(), pairs(2), pairs(2)))
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_an_example_whose_loss_is_not_finite_is_refused_before_training(tmp_path: Path) -> None:
    rows = list(token_examples(3))
    bad = [*rows[:2], {**rows[2], "labels": torch.full_like(rows[2]["labels"], -100)}]
    data = [{k: v[0] for k, v in row.items()} for row in rows]
    for probe, test, name in ((bad, rows, "probe"), (rows, bad, "test")):
        with pytest.raises(ValueError, match=f"example 2 of {name} has .* not finite"):
            train(tmp_path, tiny_model(), data, OutputSpaceCallback(SequenceLogProb(), probe, test))


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({}, {"steps": 0}, "steps must be"),
        ({}, {"steps": [1.5]}, "steps must be"),
        ({}, {"test": []}, "at least one batch"),
        ({}, {"chunk": 0}, "chunk must be"),
        ({}, {"directions": {"noise": torch.ones(3)}}, r"shape \(3,\); the probe's outputs \(12, 1\)"),
        ({"optim": "adafactor"}, {}, "cannot read the preconditioner of this Adafactor"),
        ({"optim": "poprisk_adamw", "poprisk_estimator": "ema"}, {}, "a gate of poprisk_estimator='ema'"),
        ({"resume": "checkpoint-2"}, {}, "does not go on with a resumed run"),
    ],
)
def test_a_run_that_cannot_be_recorded_is_refused(
    tmp_path: Path, settings: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    data = examples(N)
    if "resume" in settings:
        train(tmp_path, network(), data, max_steps=2, save_strategy="steps", save_steps=2)
        settings = {"resume": str(tmp_path / settings["resume"])}
    with pytest.raises(ValueError, match=message):
        train(tmp_path, network(), data, recorder(**{"probe": data, "test": data, **more}), **settings)
    with pytest.raises(RecordingError, match="holds no output_space"):
        load_recording(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("distributed_type", DistributedType.FSDP), ("_mixed_precision", "fp16")]
)
def test_what_accelerate_launch_sets_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    class Launched(TrainerCallback):  # before the recorder's turn
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            shared = PartialState if name == "distributed_type" else AcceleratorState
            monkeypatch.setitem(shared._shared_state, name, value)

    data = examples(4)
    with pytest.raises(ValueError, match=f"does not support {value.lower()}: leave it off"):
        train(tmp_path, network(), data, Launched(), recorder(data, data))


def test_a_recording_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, test, numbers = examples(N), examples(M), 5 * N * (N + M)
    monkeypatch.setattr("hf_poprisk.output_space.recorder._LIMIT", numbers)
    assert len(train(tmp_path, network(), data, recorder(data, test)).steps) == 5
    monkeypatch.setattr("hf_poprisk.output_space.recorder._LIMIT", numbers - 1)
    with pytest.raises(ValueError, match=rf"5 records of {N} × {N + M} numbers .* set steps= to fewer"):
        train(tmp_path, network(), data, recorder(data, test))
    assert train(tmp_path, network(), data, recorder(data, test, [1, 3, 99])).steps == [0, 1, 3, 4]


def test_a_damaged_recording_is_refused(tmp_path: Path) -> None:
    data = examples(N)
    run = train(tmp_path, network(), data, recorder(data, data))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    run.series["kernel"][1][0, 0] = float("nan")
    run.save(tmp_path)
    with pytest.raises(RecordingError, match="not finite"):
        load_recording(tmp_path)
    del run.series["kernel"]
    run.save(tmp_path)
    with pytest.raises(RecordingError, match="is not a recording that this version"):
        load_recording(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"nonsense")
    with pytest.raises(RecordingError, match="is damaged"):
        load_recording(tmp_path)
