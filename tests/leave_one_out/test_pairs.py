"""Judging preference pairs in the DPO and Reward trainers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from models import preferences
from torch.nn import functional as F

from hf_poprisk.leave_one_out import ExampleTable, LabelNoise
from hf_poprisk.leave_one_out.judge import Visit
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import QUIET, first_gradients, judged_from, prefer, same, weights


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
@pytest.mark.parametrize("mode", ["weight", "swap"])
def test_pairs_are_weighted_by_their_posterior(kind: str, mode: str, llama_dir: Path, tmp_path: Path) -> None:
    trainer = prefer(kind, llama_dir, tmp_path, poprisk_label_noise=mode, num_train_epochs=2)
    judged_from(trainer, 4)
    taps: list[Any] = []
    book = trainer._label_noise.booked
    trainer._label_noise.booked = lambda visit, share: (taps.append(visit), book(visit, share))[1]
    trainer.train()
    judge = trainer._label_noise
    assert len(judge.fits) >= 2 and judge.judging_since == 4
    first, later = taps[0], taps[-1]
    assert torch.equal(first.weight, torch.ones(4))
    by = judge.fits[-2 if judge.fits[-1].step == 8 else -1]
    expected = replace(by, rate=0.4).p_correct(later.log_odds)  # that of the first visits
    torch.testing.assert_close(later.weight, expected)
    z = later.tap.log_odds
    factor = expected if mode == "weight" else 2 * expected - 1
    slope = torch.where(factor < 0, factor.abs() * torch.sigmoid(z), -factor * torch.sigmoid(-z))
    torch.testing.assert_close(later.tap.slopes, slope / 4, rtol=1e-4, atol=1e-6)
    sample = read_table(tmp_path)[1]["sample"]
    assert len(sample) == 16 and {"prompt", "chosen", "rejected"} <= set(
        sample["0"]
    )  # before they are tokens
    logs = [entry for entry in trainer.state.log_history if "poprisk/weight_mean" in entry]
    assert logs and ("poprisk/swapped" in logs[-1]) == (mode == "swap")
    assert logs[-1]["poprisk/noise_rate_low"] <= logs[-1]["poprisk/noise_rate"]


@pytest.mark.parametrize("mode", ["weight", "swap"])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_weighted_loss_is_logged_beside_the_plain_one(
    mode: str, logging_steps: int, llama_dir: Path, tmp_path: Path
) -> None:
    trainer = prefer(
        "DPO",
        llama_dir,
        tmp_path,
        poprisk_label_noise=mode,
        num_train_epochs=3,
        learning_rate=3e-2,
        logging_steps=logging_steps,
    )
    judged_from(trainer, 4)
    seen: list[Any] = []
    book = trainer._label_noise.booked
    trainer._label_noise.booked = lambda visit, share: (seen.append(visit), book(visit, share))[1]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 12 // logging_steps
    for k, entry in enumerate(logs):
        visits = seen[k * logging_steps : (k + 1) * logging_steps]
        z, weight = torch.cat([v.tap.log_odds for v in visits]), torch.cat([v.weight for v in visits])
        if mode == "weight":
            losses = -weight * F.logsigmoid(z)
        else:
            losses = -torch.where(
                weight < 0.5, (1 - 2 * weight) * F.logsigmoid(-z), (2 * weight - 1) * F.logsigmoid(z)
            )
        assert entry["poprisk/loss_weighted"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert entry["loss"] == pytest.approx(-F.logsigmoid(z).mean().item(), abs=2e-4)
    assert logs[0]["poprisk/loss_weighted"] == pytest.approx(logs[0]["loss"], abs=2e-4)
    assert abs(logs[-1]["poprisk/loss_weighted"] - logs[-1]["loss"]) > 0.05  # it is the weights' doing


def test_the_layout_does_not_matter(llama_dir: Path, tmp_path: Path) -> None:
    """One by one, four in a backward, or accumulated: the same scores, weights and parameters."""
    seen = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = prefer(
            "DPO",
            llama_dir,
            tmp_path,
            poprisk_label_noise="weight",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            disable_dropout=True,
        )
        judged_from(trainer, 2)
        trainer.train()
        seen.append((trainer._label_noise.table, weights(trainer), trainer._label_noise.fits))
    for table, params, fits in seen[1:]:
        for name, column in seen[0][0].columns.items():
            torch.testing.assert_close(table.columns[name], column, rtol=1e-2, atol=1e-3, msg=name)
        for name, value in seen[0][1].items():
            torch.testing.assert_close(params[name], value, rtol=0, atol=1e-4, msg=name)
        assert [f.step for f in fits] == [f.step for f in seen[0][2]]
    assert seen[0][0].columns["weight"].min() < 0.99


def test_only_first_visits_are_exact(llama_dir: Path, tmp_path: Path) -> None:
    """A second call of train() visits pairs that the model was trained on: no floor, no start at once."""
    trainer = prefer("DPO", llama_dir, tmp_path, poprisk_label_noise="swap", num_train_epochs=2)
    trainer.train()
    first = trainer._label_noise.fits
    trainer.train()
    second = trainer._label_noise.fits
    assert first[0].exact and not first[-1].exact and not any(fit.exact for fit in second)
    judge = LabelNoise("weight", True, ExampleTable(np.arange(400)))
    judge.untrained = False  # scoring began after training
    z = torch.linspace(0.5, 8.0, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    judge.table.visit(torch.arange(400), log_odds=torch.where(torch.arange(400) < 120, -z, z))
    judge.maybe_fit(1.0, 10)
    assert not judge.fits[0].exact and judge.judging_since is None


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DPO", {}),
        ("DPO", {"use_weighting": True}),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}),
        ("DPO", {"loss_type": ["hinge", "sigmoid"], "loss_weights": [0.3, 0.7]}),
        ("Reward", {"center_rewards_coefficient": 0.1}),
    ],
    ids=["plain", "weighting", "sft", "hinge", "centred"],
)
def test_an_audit_reads_the_margins_of_a_loss_with_more_in_it(
    kind: str, options: dict[str, Any], size: int, llama_dir: Path, tmp_path: Path
) -> None:
    """The log-odds are the margins that TRL logs, and weights and gradients are those of its own trainer."""
    options = {**options, "per_device_train_batch_size": size, "num_train_epochs": 2}
    audit = prefer(kind, llama_dir, tmp_path, poprisk_label_noise="audit", **options)
    seen: list[Visit] = []
    book = audit._label_noise.booked
    audit._label_noise.booked = lambda visit, share: (seen.append(visit), book(visit, share))[1]
    gradients = [first_gradients(audit)]
    audit.train()
    margin = "rewards/margins" if kind == "DPO" else "margin"
    logged = [entry[margin] for entry in audit.state.log_history if "loss" in entry]
    assert len(logged) == len(seen) == 32 // size and max(map(abs, logged)) > 0.01
    for value, visit in zip(logged, seen, strict=True):
        assert visit.tap.log_odds.mean().item() == pytest.approx(value, rel=1e-4, abs=1e-6)
    table = audit._label_noise.table
    assert table.visits.tolist() == [2] * 16
    for visit in seen[len(seen) // 2 :]:
        assert torch.equal(table.columns["log_odds"][visit.rows], visit.log_odds)

    settings = {k: v for k, v in (QUIET | options).items() if not k.startswith("poprisk")}
    settings |= {"learning_rate": 1e-3, "optim": "adamw_torch"}
    args = getattr(trl, f"{kind}Config")(str(tmp_path), bf16=False, gradient_checkpointing=False, **settings)
    stock = getattr(trl, f"{kind}Trainer")(str(llama_dir), args=args, train_dataset=preferences(16))
    gradients.append(first_gradients(stock))
    stock.train()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    if size == 1:
        assert same(gradients[0], gradients[1]) and same(weights(audit), weights(stock))
    for name, expected in gradients[1].items():  # summed in another order
        assert (gradients[0][name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_margins_that_shift_the_log_odds_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    data = preferences(16).add_column("margin", [1.0] * 16)
    for found in (data, data.to_iterable_dataset()):
        with pytest.raises(
            ValueError, match="from which the column margin would be taken: remove the column"
        ):
            prefer("Reward", llama_dir, tmp_path, found, poprisk_label_noise="audit", max_steps=3)
    prefer("Reward", llama_dir, tmp_path, data)  # without label noise it is the loss's own
