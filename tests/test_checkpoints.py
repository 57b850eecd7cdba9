"""Checkpoints: a resumed run is the uninterrupted one, the record is in each, half of one is never used."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import preferences, save_tiny_model, tiny_model, tiny_tokenizer
from peft import LoraConfig
from test_trainer import QUIET, rows
from transformers import Trainer, TrainerState, TrainingArguments

import hf_poprisk
from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments, load_record
from hf_poprisk.checkpoints import CheckpointError, ResumeError, damage, newest_checkpoint

# Five steps over windows of 4, 4, 2: the middle of an epoch, and a short last window.
OPTIONS: dict[str, Any] = {
    **QUIET,
    "gradient_accumulation_steps": 4,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "random",
}
# measured by a clock, or (by transformers and TRL) over the part of a run that one process has seen
CLOCKED = (
    "num_tokens",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "total_flos",
)


def causal(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PopRiskTrainer:
    args = PopRiskTrainingArguments(str(folder), **{**OPTIONS, **options})
    return PopRiskTrainer(
        tiny_model("llama", dtype=dtype), args=args, train_dataset=rows(10), processing_class=tiny_tokenizer()
    )


def preference(folder: Path, model: Path, lora: bool, **options: Any) -> Any:
    args = hf_poprisk.PopRiskDPOConfig(str(folder), bf16=False, **{**OPTIONS, **options})
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    return hf_poprisk.PopRiskDPOTrainer(
        str(model), args=args, train_dataset=preferences(10), peft_config=peft_config
    )


def outcome(trainer: Any) -> tuple[dict[str, Any], Any, list[dict[str, float]]]:
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    history = [{k: v for k, v in e.items() if k not in CLOCKED} for e in trainer.state.log_history]
    return weights, trainer.optimizer.state_dict()["state"], history


def assert_same(one: Any, other: Any) -> None:
    (weights, state, history), (other_weights, other_state, other_history) = outcome(one), outcome(other)
    assert weights.keys() == other_weights.keys() and all(
        torch.equal(weights[n], other_weights[n]) for n in weights
    )
    assert state.keys() == other_state.keys() and len(state)
    for index, entries in state.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_state[index][name])), name
    assert history == other_history and len(history) >= one.args.max_steps // one.args.logging_steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"poprisk_gate": "soft", "logging_steps": 4},  # a log over steps before and after the checkpoint
        {"poprisk_estimator": "ema"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"poprisk_warmup_steps": 4},
    ],
    ids=["hard", "bfloat16", "soft", "ema", "batched", "warm-up"],
)
@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, options: dict[str, Any], tmp_path: Path) -> None:
    whole = causal(tmp_path / "run", **options)
    whole.train()
    resumed = causal(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{at}"))
    assert resumed.state.global_step == 5
    if options.get("logging_steps") == 4:  # transformers starts its own averages anew
        for trainer in (whole, resumed):
            for entry in trainer.state.log_history:
                entry.pop("loss", None)
                entry.pop("grad_norm", None)
    assert_same(whole, resumed)
    sums = [t.optimizer.optimizer.statistics.of_run(names(t))["parameters"] for t in (whole, resumed)]
    for name, entry in sums[0].items():
        assert entry == {
            key: pytest.approx(value, rel=1e-6) if value else value for key, value in sums[1][name].items()
        }


def names(trainer: Any) -> dict[torch.Tensor, str]:
    return {p: name for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_preference_run_is_the_uninterrupted_one(lora: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    whole = preference(tmp_path / "run", model, lora)
    whole.train()
    resumed = preference(tmp_path / "run", model, lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same(whole, resumed)
    record = load_record(tmp_path / "run/checkpoint-5")
    assert any("lora_A" in name for name in record.statistics["parameters"]) == lora


def test_the_comparison_would_see_a_lost_state(tmp_path: Path) -> None:
    whole, other = causal(tmp_path / "run"), causal(tmp_path / "run")
    whole.train()
    shutil.copy(tmp_path / "run/checkpoint-1/optimizer.pt", tmp_path / "run/checkpoint-2/optimizer.pt")
    other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    with pytest.raises(AssertionError):
        assert_same(whole, other)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_from_stock_adamw_to_the_gate_and_back(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments go both ways, whatever kernel of AdamW wrote them."""
    stock_args = TrainingArguments(str(tmp_path), **{**OPTIONS, "max_steps": 2}, optim=optim)
    stock = Trainer(tiny_model("llama"), args=stock_args, train_dataset=rows(10))
    stock.train()
    gated, seen = causal(tmp_path, max_steps=4), {}
    load = gated._load_optimizer_and_scheduler

    def look(path: str | None) -> None:
        load(path)
        seen.update({n: gated.optimizer.state[p]["exp_avg"].clone() for p, n in names(gated).items()})

    monkeypatch.setattr(gated, "_load_optimizer_and_scheduler", look)
    gated.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, name in names(stock).items():
        assert torch.equal(stock.optimizer.state[p]["exp_avg"], seen[name])
    assert steps_of(gated) == {4} and "poprisk/fraction_open" in gated.state.log_history[-2]
    back = causal(tmp_path, max_steps=6, optim=optim)
    back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert steps_of(back) == {6}


def steps_of(trainer: Any) -> set[int]:
    return {int(entry["step"]) for entry in trainer.optimizer.state_dict()["state"].values()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"poprisk_gate": "soft"}, "poprisk_gate from 'hard' to 'soft'"),
        ({"poprisk_exclude": ["norm"]}, r"poprisk_exclude from \[\] to \['norm'\]"),
        ({"gradient_accumulation_steps": 5}, "examples per step from 4 to 5"),
        ({"poprisk_estimator": "ema"}, "poprisk_estimator from 'example' to 'ema'"),
    ],
)
def test_other_settings_are_refused_by_name(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    causal(tmp_path, max_steps=1).train()
    with pytest.raises(ResumeError, match=f"would change {said}: set it back, or set poprisk_allow_change"):
        causal(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=True)
    allowed = causal(tmp_path, max_steps=2, poprisk_allow_change=True, **options)
    allowed.train(resume_from_checkpoint=True)
    assert allowed.state.global_step == 2


def test_another_layout_of_the_same_examples_is_no_change(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=1).train()
    other = causal(tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "poprisk_config.json"],
)
def test_half_a_checkpoint_is_skipped(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = causal(tmp_path, max_steps=3)
    trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert "is skipped" not in caplog.text
    cut(tmp_path / "checkpoint-3" / name)
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()  # as if killed before the end of the save
    assert damage(tmp_path / "checkpoint-3") == f"{name} is cut off"
    with pytest.raises(ResumeError, match=f"cannot be resumed from: {name} is cut off; take an older"):
        causal(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = causal(tmp_path, max_steps=3)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    skipped = [r.message for r in caplog.records if "is skipped" in r.message]
    assert skipped == [
        f"{tmp_path}/checkpoint-3 is skipped: {name} is cut off.",
        f"{tmp_path}/checkpoint-2 is skipped: it has no trainer_state.json, which is written last.",
    ]
    assert_same(trainer, resumed)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    whole, resumed = causal(tmp_path, max_steps=4), causal(tmp_path, max_steps=4)
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_nothing_to_resume_from_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no complete checkpoint"):
        causal(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match="is not a folder"):
        causal(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_the_seal_is_broken_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that comes back to a step that is on disk already, and dies while it writes it again."""
    causal(tmp_path, max_steps=2).train()
    resumed = causal(tmp_path, max_steps=2)

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resumed, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert damage(tmp_path / "checkpoint-2") and newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_what_else_can_lie_in_a_folder_is_skipped_as_well(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-4/poprisk_config.json").write_bytes(b"[" * 100_000)  # deeper than Python reads
    shutil.rmtree(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-2/optimizer.pt").unlink()  # as if killed while it was deleted
    assert damage(tmp_path / "checkpoint-2") == "optimizer.pt is gone"
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError()], ids=["full", "mute"]
)
def test_a_seal_that_could_not_be_written_is_none(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = causal(tmp_path, max_steps=2)
    save = TrainerState.save_to_json

    def fail(state: TrainerState, path: str) -> None:
        if state.global_step == 2:
            Path(path).write_text('{"best')
            raise error
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", fail)
    reason = "No space left" if error.args else "RuntimeError"
    with pytest.raises(
        CheckpointError, match=f"checkpoint-2 could not be .*{reason}.*checkpoint-1 is complete"
    ):
        trainer.train()


def test_from_the_streaming_form_to_the_exact_one(tmp_path: Path) -> None:
    """As many gated examples as steps, some without any: no margin can be formed of that."""
    causal(tmp_path, max_steps=3, poprisk_estimator="ema").train()
    causal(tmp_path, max_steps=4, poprisk_allow_change=True).train(resume_from_checkpoint=True)
    parameters = load_record(tmp_path / "checkpoint-4").statistics["parameters"]
    assert all(e["examples"] == e["steps"] == 4 and e["margin"] == 0 for e in parameters.values())


def test_a_hostile_record_makes_a_short_sentence(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=1).train()
    path = tmp_path / "checkpoint-1/poprisk_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exclude": ["x" * 1000] * 1000}))
    with pytest.raises(ResumeError) as caught:
        causal(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert len(str(caught.value)) < 1000


def test_the_record_is_in_every_save(tmp_path: Path) -> None:
    data = preferences(10).add_column("is_flipped", [i < 3 for i in range(10)])
    model = save_tiny_model(tmp_path / "model", "llama")
    args = hf_poprisk.PopRiskDPOConfig(str(tmp_path / "run"), bf16=False, **OPTIONS, poprisk_exclude=["norm"])
    trainer = hf_poprisk.PopRiskDPOTrainer(str(model), args=args, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder, steps in ((tmp_path / "run/checkpoint-3", 3), (tmp_path / "final", 5)):
        record = load_record(folder)
        assert record.config["steps"] == steps and record.config["exclude"] == ["norm"]
        assert record.config["units_per_step"] == 4 and record.config["unit"] == "example"
        assert record.config["data"] == {"examples": 10, "altered_labels": 3}
        assert record.config["versions"]["torch"] == torch.__version__
        parameters = record.statistics["parameters"]
        assert not [name for name in parameters if "norm" in name] and len(parameters) == 16
        assert all(entry["steps"] == steps for entry in parameters.values())
        # both kinds of step: two of four examples, one of two
        assert 0.39 < parameters["lm_head.weight"]["fraction_open_null"] < 0.5
    logged = [e["poprisk/fraction_open"] for e in trainer.state.log_history if "poprisk/fraction_open" in e]
    opened, live = (sum(e["sums"][k] for e in parameters.values()) for k in (0, 1))
    assert min(logged) < opened / live < max(logged)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lacks_a_part_is_not_whole(name: str, tmp_path: Path) -> None:
    causal(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / name).unlink()
    assert damage(tmp_path / "checkpoint-2") == f"{name} is gone"
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_nothing_of_an_earlier_run_is_sealed_into_a_new_one(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2/left.txt").touch()
    stock = causal(tmp_path, max_steps=2, optim="adamw_torch")
    stock.train()
    stock.save_model()
    assert not (tmp_path / "checkpoint-2/left.txt").exists()
    assert load_record(tmp_path / "checkpoint-2").statistics is None
    causal(tmp_path).save_model()  # has not trained: the record stays that of the run that has
    assert load_record(tmp_path).config["steps"] == 2


def test_a_model_that_was_changed_after_training_is_saved(tmp_path: Path) -> None:
    trainer = causal(tmp_path, max_steps=2)
    trainer.train()
    trainer.model = tiny_model("llama")
    trainer.save_model(str(tmp_path / "other"))
    assert len(load_record(tmp_path / "other").statistics["parameters"]) == 21


def test_the_record_names_the_step_that_the_weights_are_of(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options = {**OPTIONS, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, **best}
    args = PopRiskTrainingArguments(str(tmp_path), **options)
    trainer = PopRiskTrainer(tiny_model("llama"), args=args, train_dataset=rows(10), eval_dataset=rows(4))
    trainer.train()
    trainer.save_model()
    config = load_record(tmp_path).config
    assert config["steps"] == 3 and config["weights_step"] == trainer.state.best_global_step < 3


def test_a_run_without_the_gate_says_so(tmp_path: Path) -> None:
    trainer = causal(tmp_path, max_steps=1, optim="adamw_torch")
    trainer.train()
    record = load_record(tmp_path / "checkpoint-1")
    assert record.config["optim"] == "adamw_torch" and record.statistics is None


def test_reading_what_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no poprisk_config.json: it was not saved by"):
        load_record(tmp_path)
    causal(tmp_path, max_steps=1).train()
    path = tmp_path / "checkpoint-1/poprisk_config.json"
    config = json.loads(path.read_text())
    for change, said in (
        ({"schema_version": 2}, "has schema version 2, and this version of hf_poprisk reads 1: update"),
        ({"schema_version": "1"}, "is damaged: it holds no schema_version"),
        ({"gate": "open"}, 'is damaged: gate is "open"'),
        ({"units_per_step": 1e300}, "is damaged: units_per_step is 1e\\+300"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=f"poprisk_config.json of .*{said}"):
            load_record(tmp_path / "checkpoint-1")
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged: Expecting"):
        load_record(tmp_path / "checkpoint-1")


# Checkpoints of weights alone


def stock(folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(str(folder), **{**OPTIONS, **options})
    return Trainer(tiny_model("llama"), args=args, train_dataset=rows(10))


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
@pytest.mark.parametrize("newest", [False, True])
def test_weights_alone_are_gone_on_from_with_a_fresh_optimizer(
    newest: bool, optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"optim": optim, "save_only_model": True}
    wanted = True if newest else str(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        causal(tmp_path, max_steps=2, **options).train()
    said = [r.message for r in caplog.records if "fresh" in r.message]
    assert said == ["save_only_model=True: a resumed run starts with a fresh optimizer."]
    caplog.clear()
    resumed, seen = causal(tmp_path, max_steps=4, **options), {}
    load = resumed._load_optimizer_and_scheduler

    def look(path: str | None) -> None:
        load(path)
        seen.update({n: p.detach().clone() for n, p in resumed.model.named_parameters()})

    resumed._load_optimizer_and_scheduler = look
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=wanted)
    said = [r.message for r in caplog.records if "afresh" in r.message]
    assert said == [
        f"{tmp_path}/checkpoint-2 holds weights only: the optimizer and the learning-rate schedule start "
        "afresh."
    ]
    assert resumed.state.global_step == 4 and steps_of(resumed) == {2}
    before = tiny_model("llama")
    assert all(not torch.equal(seen[n], p) for n, p in before.named_parameters() if "proj" in n)
    if optim == "poprisk_adamw":  # what the gate did is of the whole run
        parameters = load_record(tmp_path / "checkpoint-4").statistics["parameters"]
        assert {entry["steps"] for entry in parameters.values()} == {4}
    else:
        other = stock(tmp_path, max_steps=4, **options)
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for p, q in zip(resumed.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
@pytest.mark.parametrize("by", [causal, stock])
def test_a_run_that_did_not_ask_for_weights_alone_does_not_take_them(
    by: Any, optim: str, tmp_path: Path
) -> None:
    optim_of_saver = "adamw_torch" if by is stock else optim
    by(tmp_path, max_steps=2, save_steps=2, save_only_model=True, optim=optim_of_saver).train()
    for wanted in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(
            ResumeError, match="holds weights only: set save_only_model=True to go on"
        ) as caught:
            causal(tmp_path, max_steps=4, optim=optim).train(resume_from_checkpoint=wanted)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    resumed = causal(tmp_path, max_steps=4, optim=optim, save_only_model=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_with_weights_alone_damage_is_still_damage(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "save_only_model": True}
    causal(tmp_path, **options).train()
    assert damage(tmp_path / "checkpoint-3") is None
    cut(tmp_path / "checkpoint-3/model.safetensors")
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()
    (tmp_path / "checkpoint-1/model.safetensors").unlink()
    for step, said in ((3, "cut off"), (2, "which is written last"), (1, "model.safetensors is gone")):
        with pytest.raises(ResumeError, match=f"checkpoint-{step} cannot be resumed from: .*{said}; take"):
            causal(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    with pytest.raises(ResumeError, match="holds no complete checkpoint"):
        causal(tmp_path, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_being_deleted_is_none_of_weights_alone(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=2).train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "checkpoint-2" / name).unlink()
    assert damage(tmp_path / "checkpoint-2") == "optimizer.pt is gone"
    resumed = causal(tmp_path, max_steps=2, save_only_model=True)  # takes whole ones as they are
    resumed.train(resume_from_checkpoint=True)
    assert steps_of(resumed) == {2}


def test_without_saves_nothing_is_said_about_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        causal(tmp_path, max_steps=1, save_only_model=True, save_strategy="no").train()
        causal(tmp_path, max_steps=1).train()
    assert "save_only_model" not in caplog.text


# Other parameters, other data


def freeze(trainer: Any, pattern: str) -> None:
    for name, p in trainer.model.named_parameters():
        p.requires_grad_(re.search(pattern, name) is None)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something was loaded before the check")


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("^$", "embed|norm", "of 21 trainable tensors, and this model has 15"),
        ("embed", "^$", "of 20 trainable tensors, and this model has 21"),
        ("embed", "lm_head", "of 20 trainable tensors, and this model has 20 others"),
        ("embed", "", "of 20 trainable tensors, and this model has none"),
    ],
    ids=["fewer", "more", "others", "none"],
)
def test_other_trainable_parameters_are_refused(
    before: str, after: str, said: str, optim: str, tmp_path: Path
) -> None:
    first = causal(tmp_path, max_steps=2, optim=optim)
    freeze(first, before)
    first.train()
    other = causal(tmp_path, max_steps=4, optim=optim)
    freeze(other, after)
    other._load_from_checkpoint = never
    with pytest.raises(ResumeError, match=f"holds the optimizer's state {said}.*, or start over") as caught:
        other.train(resume_from_checkpoint=True)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    if optim == "poprisk_adamw" and after != "^$":
        assert "(no longer trainable: " in str(caught.value)
    same = causal(tmp_path, max_steps=4, optim=optim)
    freeze(same, before)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 4 and steps_of(same) == {4}


def test_parameters_that_the_optimizer_holds_may_be_frozen_on_the_way(tmp_path: Path) -> None:
    """What counts is what the optimizer was made of; a callback, say, may freeze and unfreeze."""
    first = causal(tmp_path, max_steps=2)
    save = first._save_checkpoint

    def freeze_and_save(*args: Any) -> None:
        freeze(first, "embed")
        save(*args)

    first._save_checkpoint = freeze_and_save
    first.train()
    resumed = causal(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def longer(folder: Path, count: int, **options: Any) -> PopRiskTrainer:
    args = PopRiskTrainingArguments(str(folder), **{**OPTIONS, **options})
    return PopRiskTrainer(tiny_model("llama"), args=args, train_dataset=rows(count))


def test_data_of_another_length_are_refused(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=2).train()
    other = longer(tmp_path, 12, max_steps=4)
    other._load_from_checkpoint = never
    with pytest.raises(
        ResumeError,
        match="would change the number of training examples from 10 to 12: set it back, or set "
        "poprisk_allow_change=true",
    ):
        other.train(resume_from_checkpoint=True)
    for options in ({"poprisk_allow_change": True}, {"ignore_data_skip": True}, {"optim": "adamw_torch"}):
        allowed = longer(tmp_path, 12, max_steps=4, **options)
        allowed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert allowed.state.global_step == 4


@pytest.mark.parametrize("gone", [{"reduction": "tensor"}, {"gate_weight_decay": True}])
def test_a_record_of_a_setting_that_is_gone(gone: dict[str, Any], tmp_path: Path) -> None:
    """Version 0.1 wrote both names; their defaults are what every run does now."""
    causal(tmp_path, max_steps=1).train()
    path = tmp_path / "checkpoint-1/poprisk_config.json"
    config = {**json.loads(path.read_text()), "reduction": "element", "gate_weight_decay": False}
    path.write_text(json.dumps({**config, **gone}))
    with pytest.raises(ResumeError, match=f"would change {next(iter(gone))} .of version 0.1. from") as said:
        causal(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert str(said.value).endswith(".") and "\n" not in str(said.value)
    path.write_text(json.dumps(config))
    resumed = causal(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
def test_a_record_of_before_says_nothing_about_parameters(optim: str, tmp_path: Path) -> None:
    causal(tmp_path, max_steps=1, optim=optim).train()
    path = tmp_path / "checkpoint-1/poprisk_config.json"
    config = json.loads(path.read_text())
    del config["trainable"], config["save_only_model"]
    path.write_text(json.dumps(config))
    resumed = causal(tmp_path, max_steps=2, optim=optim)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_weights_alone_fit_whatever_is_trained(tmp_path: Path) -> None:
    causal(tmp_path, max_steps=1, save_only_model=True).train()
    fewer = causal(tmp_path, max_steps=2, save_only_model=True)
    freeze(fewer, "embed")
    fewer.train(resume_from_checkpoint=True)
    assert fewer.state.global_step == 2


def test_an_optimizer_of_some_parameters_is_resumed_as_it_was(tmp_path: Path) -> None:
    """Made by the trainer itself, in a way of its own, or handed to it."""

    class Partly(PopRiskTrainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.AdamW(self.model.lm_head.parameters())
            return self.optimizer

    def build(steps: int, handed: bool) -> PopRiskTrainer:
        options = {**OPTIONS, "max_steps": steps, "optim": "adamw_torch"}
        args, model = PopRiskTrainingArguments(str(tmp_path), **options), tiny_model("llama")
        if not handed:
            return Partly(model, args=args, train_dataset=rows(10))
        of_the_body = torch.optim.AdamW(model.model.parameters())
        return PopRiskTrainer(model, args=args, train_dataset=rows(10), optimizers=(of_the_body, None))

    for handed in (False, True):
        build(2, handed).train()
        resumed = build(4, handed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.global_step == 4
        other = build(4, not handed)
        with pytest.raises(ResumeError, match="trainable tensors, and this model has"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
