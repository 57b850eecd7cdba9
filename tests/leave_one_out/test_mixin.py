"""Judging class labels in the trainer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Scaler
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_poprisk.leave_one_out.log_odds import class_log_odds
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import Classifier, classify, examples, judged_from, weights


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_audit_changes_nothing_in_training(gate: str, tmp_path: Path) -> None:
    seen = []
    for mode in ("off", "audit"):
        trainer = classify(tmp_path, examples(), poprisk_label_noise=mode, poprisk_gate=gate)
        if mode == "audit":
            judged_from(trainer, 6)
        trainer.train()
        seen.append(weights(trainer))
    assert trainer._label_noise.table.columns["weight"].min() < 0.9  # that it would have given
    # the weight gradient of one token is one product without the scores and a sum of products with them
    for name, value in seen[0].items():
        torch.testing.assert_close(value, seen[1][name], rtol=1e-4, atol=2e-5 if gate == "none" else 0.02)


def test_the_table_follows_the_textbook(tmp_path: Path) -> None:
    """Two epochs of a classifier in float64, against a loop that knows nothing of the package."""
    data = [{"x": e["x"].double(), "labels": e["labels"]} for e in examples(8)]
    options = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0.3}
    trainer = classify(
        tmp_path, data, Classifier(torch.float64), poprisk_label_noise="audit", weight_decay=0.0, **options
    )
    trainer.train()
    got = trainer._label_noise.table

    model = Classifier(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    own, log_odds, losses = (torch.zeros(8, dtype=torch.float64) for _ in range(3))
    coefficient = 1.0  # of the step before, as this one's is not known yet
    step = 0
    for _ in range(2):
        for first in (0, 4):
            norms = []
            for i in range(first, first + 4):
                z = class_log_odds(model(data[i]["x"][None])["logits"], data[i]["labels"][None])[0]
                slopes = torch.autograd.grad(z, list(model.parameters()))
                s = 0.0
                bound = ((1 - 0.999 ** (step + 1)) / 0.001) ** 0.5
                error = torch.sigmoid(-z).item()
                for p, slope in zip(model.parameters(), slopes, strict=True):
                    state = optimizer.state.get(p)
                    v = state["exp_avg_sq"] / (1 - 0.999**step) if state else torch.zeros_like(p)
                    h = -error / 4 * slope
                    s += (slope * (coefficient * h / (v.sqrt() + 1e-8)).clamp(-bound, bound)).sum().item()
                log_odds[i] = z.item() - own[i]
                own[i] -= 0.5 * 1e-2 * s
                losses[i] += F.softplus(-z).item() / 2
            optimizer.zero_grad()
            batch = {k: torch.stack([e[k] for e in data[first : first + 4]]) for k in data[0]}
            model(**batch)["loss"].backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
            coefficient = min(1.0, 0.3 / (norms[0].item() + 1e-6))
            optimizer.step()
            step += 1
    assert coefficient < 1 and got.visits.tolist() == [2] * 8
    for name, expected in (
        ("log_odds", log_odds),
        ("self_influence", own),
        ("loss_mean", losses),
    ):
        torch.testing.assert_close(got.columns[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert (own.abs() > 1e-3).all()


def test_wrong_labels_are_found(tmp_path: Path) -> None:
    data = examples(240, wrong=0.25, seed=3)
    trainer = classify(
        tmp_path,
        data,
        poprisk_label_noise="weight",
        per_device_train_batch_size=16,
        num_train_epochs=8,
        max_grad_norm=0.0,
    )
    trainer.train()
    judge = trainer._label_noise
    assert judge.judging_since is not None and judge.judging_since > 15
    assert 0.15 < judge.fits[-1].rate < 0.35
    suspicion = -judge.table.columns["log_odds"]
    ranks = suspicion.argsort().argsort().float()
    auroc = (ranks[:60].sum() - 60 * 59 / 2) / (60 * 180)
    assert auroc > 0.9
    weight = judge.table.columns["weight"]
    assert weight[:60].mean() < 0.3 < 0.8 < weight[60:].mean()
    saved = [entry for entry in trainer.state.log_history if "poprisk/noise_rate" in entry]
    assert saved[-1]["poprisk/noise_rate"] == judge.fits[-1].rate


@pytest.mark.parametrize(
    ("options", "ungated"),
    [
        ({"poprisk_gate": "none"}, "all"),
        ({"poprisk_gate": "hard"}, "none"),
        ({"poprisk_gate": "hard", "poprisk_warmup_steps": 2}, "two steps"),
        ({"poprisk_gate": "hard", "poprisk_exclude": ["net.0"]}, "some"),
    ],
)
def test_the_gate_holds_back_own_effects_too(options: Any, ungated: str, tmp_path: Path) -> None:
    """By the share of coordinates that the step itself writes."""
    trainer = classify(
        tmp_path, examples(), weight_decay=0.0, poprisk_label_noise="audit", num_train_epochs=1, **options
    )
    judge, used, moved = trainer._label_noise, [], []
    finish, before = judge.finish_step, weights(trainer)

    def finish_step(gather: Any, open_share: Any) -> None:
        own = judge.table.columns["self_influence"].clone()
        plain = [judge.booked(visit, 1.0)[:, [0, 4]] for visit in judge._pending]
        finish(gather, open_share)
        used.append(float(open_share))
        rows, effects = torch.cat(plain).unbind(1)
        got = (judge.table.columns["self_influence"] - own)[rows.long()]
        torch.testing.assert_close(got.double(), 0.5 * float(open_share) * effects, rtol=1e-4, atol=1e-7)

    class Moved(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = weights(trainer)
            changed = [(now[name] != before[name]).double().flatten() for name in now]
            moved.append(torch.cat(changed).mean().item())
            before.update(now)

    judge.finish_step = finish_step
    trainer.add_callback(Moved())
    trainer.train()
    assert len(used) == 6
    if ungated in ("all", "two steps"):
        assert used[:2] == [1.0, 1.0] and (ungated == "two steps" or used == [1.0] * 6)
    if ungated != "all":
        assert used[2:] == pytest.approx(moved[2:], abs=0.05) and max(used[2:]) < 0.95


def test_a_loss_scaler_changes_neither_own_effects_nor_gains(tmp_path: Path) -> None:
    plain, scaled = (
        classify(tmp_path, examples(), poprisk_label_noise="audit", poprisk_risk=True) for _ in range(2)
    )
    plain.train()
    Scaler(scaled)
    try:
        scaled.train()
    finally:
        scaled.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators
    one, other = (t._label_noise.table.columns["self_influence"] for t in (plain, scaled))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert one.abs().min() > 0.01
    for name in ("poprisk/gain_total", "poprisk/gain_empirical"):
        logs = [[e[name] for e in t.state.log_history if name in e] for t in (plain, scaled)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) > 10


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_an_ignored_label_leaves_the_others_alone(gate: str, tmp_path: Path) -> None:
    data = examples()
    data[5]["labels"] = torch.tensor(-100)
    trainer = classify(tmp_path, data, poprisk_label_noise="weight", poprisk_gate=gate)
    judged_from(trainer, 6)
    trainer.train()
    table = trainer._label_noise.table
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not any(e.get("poprisk/steps_skipped") for e in trainer.state.log_history)
    assert table.visits[5] == 0 and table.columns["weight"].min() < 0.9


class Spoiled(Classifier):
    """Gives one example of the sixth step a gradient that is not finite."""

    calls = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = super().forward(x, labels)
        self.calls += self.training
        return {**out, "loss": out["loss"] * math.nan} if self.calls == 6 else out


def test_a_step_that_is_left_out_is_no_visit(tmp_path: Path) -> None:
    options = {"poprisk_gate": "hard", "save_strategy": "steps", "save_steps": 6, "num_train_epochs": 2}
    trainer = classify(tmp_path, examples(), Spoiled(), poprisk_label_noise="audit", **options)
    trainer.train()
    table = trainer._label_noise.table
    assert table.visits.sum() == 48 - 4 and sorted(table.visits.tolist())[:4] == [1] * 4
    assert all(column.isfinite().all() for column in table.columns.values())
    assert 0 < float(trainer._label_noise.clip_coefficient) <= 1
    saved = read_table(tmp_path / "checkpoint-6")[1]
    assert 0 < saved["clip_coefficient"] <= 1
