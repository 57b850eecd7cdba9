"""Preference pairs are judged before the first step, in the DPO and Reward trainers."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import preferences
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.leave_one_out import INDEX
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import first_gradients, planted, prefer, same, weights

N = 61


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def judged(trainer: Any) -> Any:
    trainer._judge_labels()
    return trainer._label_noise


def pair_log_odds(kind: str, model: nn.Module, batch: dict[str, Tensor], i: int) -> Tensor:
    """Of the i-th pair, each of its rows alone and without padding."""
    size, values = len(batch["input_ids"]) // 2, []
    for row in (i, i + size):
        kept = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row, kept]
        logits = model(input_ids=ids[None]).logits[0]
        if kind == "Reward":
            values.append(logits[0])
            continue
        log_p = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        values.append(log_p[batch["completion_mask"][row, kept][1:].bool()].sum())
    return values[0] - values[1]


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
@pytest.mark.parametrize(("gate", "size"), [("none", 4), ("none", 1), ("hard", 4)])
def test_weights_act_from_the_first_step(
    kind: str, gate: str, size: int, llama_dir: Path, tmp_path: Path
) -> None:
    """Gradients and logs of the first step, against one backward per pair."""
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    options |= {"max_steps": 1, "max_grad_norm": 0.0, "poprisk_gate": gate, "optim": "poprisk_adamw"}
    trainer = prefer(kind, llama_dir, tmp_path, planted()[0], poprisk_label_noise="weight", **options)
    batches: list[Any] = []
    take = trainer._separate_index
    trainer._separate_index = lambda inputs: (batches.append(take(dict(inputs))), take(inputs))[1]
    got = first_gradients(trainer)
    judge = judged(trainer)
    batches.clear()  # of the judging
    start = weights(trainer)
    trainer.train()

    trainer.model.load_state_dict(start)
    trainer.model.zero_grad()
    w, z = [], []
    for batch, index in batches:
        judged_by = trainer.label_log_odds(trainer.model, batch)
        for i, row in enumerate(judge.table.rows(index)):
            z.append(pair_log_odds(kind, trainer.model, batch, i))
            assert judged_by[i].item() == pytest.approx(z[-1].item(), abs=1e-4)
            if kind == "DPO":  # the model is its own reference
                z[-1] = 0.1 * (z[-1] - z[-1].detach())
            w.append(judge.table.columns["weight"][row])
            (-w[-1] * F.logsigmoid(z[-1]) / 4).backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))
    weight, losses = torch.stack(w), -F.logsigmoid(torch.stack(z).detach())
    assert len(w) == 4 and weight.max() - weight.min() > 0.02
    log = trainer.state.log_history[0]
    assert log["poprisk/weight_mean"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert log["poprisk/loss_weighted"] == pytest.approx((weight * losses).mean().item(), rel=1e-5)
    assert log["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert log["poprisk/noise_rate"] == judge.fit.rate and judge.weighted
    columns, state = read_table(tmp_path)
    np.testing.assert_allclose(columns["p_correct"], columns["weight"], rtol=1e-5)
    assert columns["visits"].tolist() == [1] * N and state["doubt"] == judge.doubt
    assert {"prompt", "chosen", "rejected"} <= set(state["sample"]["0"])  # before they are tokens


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_swapped_pairs_are_found(
    kind: str, llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, flips = planted(120)
    trainer = prefer(kind, llama_dir, tmp_path, data, poprisk_label_noise="weight", max_steps=2)
    trainer.train()
    judge = trainer._label_noise
    weight = judge.table.columns["weight"].numpy()
    assert weight[flips].max() < 0.3 < 0.9 < weight[~flips].min()
    assert judge.fit.low < flips.mean() < judge.fit.high
    assert judge.doubt.endswith("judge the data without them")  # the prompts repeat
    assert f"; {flips.sum()} of 120 labels are below .5." in caplog.text
    assert f"weights since step 0; `hf-poprisk audit {tmp_path}`" in caplog.text


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DPO", {"poprisk_gate": "hard"}),
        ("DPO", {"loss_type": ["ipo"]}),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}),
        ("DPO", {"use_weighting": True}),
        ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
        ("DPO", {"f_divergence_type": "js_divergence"}),
        ("DPO", {"peft_config": lora(lora_dropout=0.3), "disable_dropout": False}),
        ("Reward", {"center_rewards_coefficient": 0.1}),
    ],
    ids=["gate", "ipo", "sft", "weighting", "sync", "js", "dropout", "centred"],
)
def test_an_audit_changes_nothing_in_training(
    kind: str, options: dict[str, Any], llama_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, in a random order, whatever the loss is."""
    seen = []
    for mode in ("off", "audit"):
        settings = {"poprisk_label_noise": mode, "max_steps": 4, "optim": "poprisk_adamw", **options}
        trainer = prefer(kind, llama_dir, tmp_path, preferences(N), **settings)
        trainer.train()
        seen.append((weights(trainer), trainer.state.log_history))
    assert same(seen[0][0], seen[1][0]) and trainer._label_noise.table.visits.tolist() == [1] * N
    plain, audit = ([e["loss"] for e in log if "loss" in e] for _, log in seen)
    assert plain == audit and "poprisk/noise_rate" in seen[1][1][0]
    assert "poprisk/loss_weighted" not in seen[1][1][0]


def test_a_resumed_run_is_the_uninterrupted_one(llama_dir: Path, tmp_path: Path) -> None:
    """And judges nothing again; nor does a second training of the same model."""
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "max_steps": 6}
    whole, resumed = (
        prefer("DPO", llama_dir, tmp_path, preferences(N), poprisk_label_noise="weight", **options)
        for _ in range(2)
    )
    whole.train()
    resumed._judge_labels = None
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed))
    one, other = whole._label_noise, resumed._label_noise
    assert one.fit == other.fit and one.weighted and other.weighted
    for name, column in one.table.columns.items():
        assert torch.equal(column, other.table.columns[name]), name
    logs = [[e for e in t.state.log_history if e["step"] > 3 and "loss" in e] for t in (whole, resumed)]
    for name in ("poprisk/weight_mean", "poprisk/loss_weighted"):  # an interval goes on over the checkpoint
        assert [e[name] for e in logs[0]] == [e[name] for e in logs[1]] and len(logs[0]) == 2
    resumed.train()
    assert resumed._label_noise.fit == one.fit


@pytest.fixture(scope="module")
def plainly_judged(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Log-odds of the pairs, judged four at a time."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = prefer("DPO", llama_dir, folder, planted()[0], poprisk_label_noise="audit")
    return judged(trainer).table.columns["log_odds"]


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"poprisk_gate": "hard", "per_device_train_batch_size": 16},
        {"gradient_checkpointing": True, "poprisk_label_noise": "weight"},
        {"peft_config": lora()},
        {"precompute_ref_log_probs": True},
    ],
    ids=["one by one", "gate", "checkpointing", "lora", "precomputed"],
)
def test_pairs_are_judged_alike(
    options: dict[str, Any], plainly_judged: Tensor, llama_dir: Path, tmp_path: Path
) -> None:
    """However they are trained: adapters at their start leave the base layers' gradients as they are."""
    options = {"poprisk_label_noise": "audit", "max_steps": 1, **options}
    trainer = prefer("DPO", llama_dir, tmp_path, planted()[0], **options)
    trainer.train()
    got = trainer._label_noise.table.columns["log_odds"]
    scale = plainly_judged.std()
    assert scale > 0.01
    torch.testing.assert_close(got, plainly_judged, rtol=1e-3, atol=1e-3 * float(scale))


def test_weights_in_bf16(llama_dir: Path, tmp_path: Path) -> None:
    data, flips = planted(120)
    options = {"poprisk_label_noise": "weight", "max_steps": 1, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = prefer("DPO", llama_dir, tmp_path, data, **options)
    assert trainer.model.dtype == torch.bfloat16
    trainer.train()
    weight = trainer._label_noise.table.columns["weight"].numpy()
    assert weight[flips].max() < 0.3 < 0.9 < weight[~flips].min()


@pytest.mark.parametrize("training", [True, False])
def test_judging_leaves_the_model_and_chance_as_they_were(
    training: bool, llama_dir: Path, tmp_path: Path
) -> None:
    options = {"poprisk_label_noise": "audit", "disable_dropout": False}
    options["peft_config"] = lora(lora_dropout=0.5)
    trainer = prefer("DPO", llama_dir, tmp_path, preferences(N), **options)
    model = trainer.model.train(training)

    def state() -> list[Any]:
        modules = [module.training for module in model.modules()]
        params = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return [modules, params, random.getstate(), np.random.get_state()[1].tolist()]

    before, tensors, chance = state(), weights(trainer), torch.get_rng_state()
    judge = judged(trainer)
    assert judge.fit is not None and state() == before and same(tensors, weights(trainer))
    assert torch.equal(torch.get_rng_state(), chance)
    assert not any(module._forward_hooks for module in model.modules())


def identical() -> Dataset:
    return Dataset.from_dict({name: [preferences(1)[name][0]] * N for name in preferences(1).column_names})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (preferences(49), "^49 examples are too few to judge labels by: it takes 50 or more\\.$"),
        (identical(), "^all examples have the same gradients, so none says anything about another's"),
    ],
    ids=["few", "identical"],
)
def test_pairs_that_say_nothing_are_refused(
    data: Dataset, message: str, llama_dir: Path, tmp_path: Path
) -> None:
    trainer = prefer("DPO", llama_dir, tmp_path, data, poprisk_label_noise="audit")
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_of_nan_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    trainer = prefer("DPO", llama_dir, tmp_path, preferences(N), poprisk_label_noise="audit")
    with torch.no_grad():
        next(trainer.model.parameters())[0] = torch.nan
        trainer.model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite: the model gives NaN or inf\\.$"):
        trainer.train()


def test_a_stream_of_pairs_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    stream = preferences(N).add_column(INDEX, list(range(N))).to_iterable_dataset()
    with pytest.raises(ValueError, match="and a stream has none: train on a data set that is no stream"):
        prefer("DPO", llama_dir, tmp_path, stream, poprisk_label_noise="audit", max_steps=3)
    assert prefer("DPO", llama_dir, tmp_path, stream, max_steps=3)._label_noise is None
