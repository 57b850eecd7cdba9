"""Checkpoints: a resumed run is the uninterrupted one, the record is in each, half of one is never used."""

import json
import logging
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_worker import assert_complete, one_sentence
from models import QUIET, layout, preferences, rows, save_tiny_model, tiny_model, trainer_of, trl_trainer_of
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_poprisk import load_record
from hf_poprisk.checkpoints import CheckpointError, ResumeError, damage, newest_checkpoint

# Five steps over windows of 4, 4, 2: the middle of an epoch, and a short last window.
OPTIONS: dict[str, Any] = {
    **QUIET,
    **layout(1, 4),
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "random",
}
# measured by a clock, or (by transformers and TRL) over the part of a run that one process has seen
CLOCKED = {
    *("num_tokens", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"),
    "total_flos",
}


def causal(folder: Path, dtype: torch.dtype = torch.float32, count: int = 10, **options: Any) -> Any:
    options = {**OPTIONS, "eval_dataset": rows(4), **options}
    return trainer_of(folder, rows(count), tiny_model(dtype=dtype), **options)


def stock(folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(str(folder), **{**OPTIONS, "optim": "adamw_torch", **options})
    return Trainer(tiny_model(), args=args, train_dataset=rows(10))


def resume(trainer: Any, checkpoint: Any = True) -> Any:
    trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    assert trainer.state.global_step == trainer.args.max_steps
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    causal(folder, max_steps=3).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The folder of a run of three steps, with a checkpoint of each."""
    return shutil.copytree(trained, tmp_path / "run")


def assert_same(one: Any, other: Any, *apart: str) -> None:
    """Weights, state of the optimizer, and logs but for what is named."""
    for (name, p), (other_name, q) in zip(
        one.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert name == other_name and torch.equal(p, q), name
    state, other_state = (t.optimizer.state_dict()["state"] for t in (one, other))
    assert state.keys() == other_state.keys() and len(state)
    for index, entries in state.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_state[index][name])), name
    logs, other_logs = (
        [{k: v for k, v in e.items() if k not in CLOCKED | {*apart}} for e in t.state.log_history]
        for t in (one, other)
    )
    assert logs == other_logs and len(logs) >= one.args.max_steps // one.args.logging_steps


def steps_of(trainer: Any) -> set[int]:
    return {int(entry["step"]) for entry in trainer.optimizer.state_dict()["state"].values()}


# Resuming


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (2, {}),
        (3, {}),
        (3, {"dtype": torch.bfloat16}),
        (2, {"poprisk_gate": "soft", "logging_steps": 4}),  # a log over steps before and after it
        (3, {"poprisk_estimator": "ema"}),
        (2, layout(2, 4)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(at: int, options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = causal(tmp_path, **options), causal(tmp_path, **options)
    whole.train()
    resume(resumed, tmp_path / f"checkpoint-{at}")
    # transformers starts its own averages anew
    assert_same(whole, resumed, *(("loss", "grad_norm") if "logging_steps" in options else ()))
    optimizers = [t._poprisk_optimizer() for t in (whole, resumed)]
    one, other = (o.statistics.of_run(o.names)["parameters"] for o in optimizers)
    for name, entry in one.items():
        rounded = {k: pytest.approx(v, rel=1e-6) if v else v for k, v in other[name].items()}
        assert entry == rounded


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_preference_run_is_the_uninterrupted_one(lora: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    whole, resumed = (
        trl_trainer_of("DPO", str(model), tmp_path, preferences(10), peft_config=adapter, **OPTIONS)
        for _ in range(2)
    )
    whole.train()
    assert_same(whole, resume(resumed, tmp_path / "checkpoint-2"))
    statistics = load_record(tmp_path / "checkpoint-5").statistics
    assert any("lora_A" in name for name in statistics["parameters"]) == lora


def loaded(trainer: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Filled when it resumes: weights and first moments before its first step."""
    seen, load = {}, trainer._load_optimizer_and_scheduler

    def look(checkpoint: str | None) -> None:
        load(checkpoint)
        for name, p in trainer.model.named_parameters():
            moment = trainer.optimizer.state.get(p, {}).get("exp_avg")
            seen[name] = p.detach().clone(), None if moment is None else moment.clone()

    trainer._load_optimizer_and_scheduler = look
    return seen


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_from_stock_adamw_to_the_gate_and_back(optim: str, tmp_path: Path) -> None:
    """The moments go both ways, whatever kernel of AdamW wrote them."""
    before = stock(tmp_path, max_steps=2, optim=optim)
    before.train()
    gated = causal(tmp_path, max_steps=4)
    seen = loaded(gated)
    resume(gated, tmp_path / "checkpoint-2")
    for name, p in before.model.named_parameters():
        assert torch.equal(before.optimizer.state[p]["exp_avg"], seen[name][1])
    assert steps_of(gated) == {4} and "poprisk/fraction_open" in gated.state.log_history[-2]
    back = causal(tmp_path, max_steps=6, optim=optim)
    assert steps_of(resume(back, tmp_path / "checkpoint-4")) == {6}


def test_from_the_streaming_form_to_the_exact_one(tmp_path: Path) -> None:
    """As many gated examples as steps, some without any: no margin can be formed of that."""
    causal(tmp_path, max_steps=3, poprisk_estimator="ema").train()
    resume(causal(tmp_path, max_steps=4, poprisk_allow_change=True))
    parameters = load_record(tmp_path / "checkpoint-4").statistics["parameters"]
    assert all(e["examples"] == e["steps"] == 4 and e["margin"] == 0 for e in parameters.values())


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    whole, resumed = causal(tmp_path, max_steps=4), causal(tmp_path, max_steps=4)
    whole.train()
    assert_same(whole, resume(resumed))  # in the middle of an epoch
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


# Other settings, other data, other parameters


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"poprisk_gate": "soft"}, "poprisk_gate from 'hard' to 'soft'"),
        ({"poprisk_exclude": ["norm"]}, r"poprisk_exclude from \[\] to \['norm'\]"),
        ({"gradient_accumulation_steps": 5}, "examples per step from 4 to 5"),
        ({"poprisk_estimator": "ema"}, "poprisk_estimator from 'example' to 'ema'"),
        ({"count": 12}, "the number of training examples from 10 to 12"),
    ],
)
def test_another_run_is_refused_by_name(options: dict[str, Any], said: str, run: Path) -> None:
    refused = causal(run, **options)
    refused._load_from_checkpoint = None  # nothing is loaded before the check
    with pytest.raises(ResumeError, match=f"would change {said}: set it back, or set poprisk_allow_change"):
        resume(refused)
    resume(causal(run, max_steps=4, poprisk_allow_change=True, **options))


@pytest.mark.parametrize(
    "options", [layout(4, 4), {"count": 12, "ignore_data_skip": True}, {"count": 12, "optim": "adamw_torch"}]
)
def test_what_is_no_other_run(options: dict[str, Any], run: Path) -> None:
    resume(causal(run, max_steps=4, **options))


def edit_record(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "poprisk_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("gone", "value"), [("reduction", "tensor"), ("gate_weight_decay", True), ("warmup_steps", 3)]
)
def test_a_record_of_version_0_1(gone: str, value: Any, run: Path) -> None:
    """It had settings that are gone, whose defaults are what every run does now, and lacked some entries."""
    old = {"reduction": "element", "gate_weight_decay": False, "trainable": ..., "label_noise": ...}
    edit_record(run / "checkpoint-3", **{**old, gone: value})
    with pytest.raises(ResumeError, match=f"would change {gone} .which is gone. from") as caught:
        resume(causal(run))
    one_sentence(caught.value)
    edit_record(run / "checkpoint-3", **old, warmup_steps=0)
    resume(causal(run))


def freeze(trainer: Any, pattern: str) -> Any:
    for name, p in trainer.model.named_parameters():
        p.requires_grad_(re.search(pattern, name) is None)
    return trainer


@pytest.mark.parametrize(
    ("optim", "before", "after", "said"),
    [
        ("poprisk_adamw", "^$", "embed|norm", "of 21 trainable tensors, and this model has 15"),
        ("adamw_torch", "embed", "^$", "of 20 trainable tensors, and this model has 21"),
        ("poprisk_adamw", "embed", "lm_head", "of 20 trainable tensors, and this model has 20 others"),
        ("adamw_torch", "embed", "", "of 20 trainable tensors, and this model has none"),
    ],
)
def test_other_trainable_parameters_are_refused(
    optim: str, before: str, after: str, said: str, tmp_path: Path
) -> None:
    freeze(causal(tmp_path, max_steps=2, optim=optim), before).train()
    other = freeze(causal(tmp_path, max_steps=4, optim=optim), after)
    other._load_from_checkpoint = None  # nothing is loaded before the check
    with pytest.raises(ResumeError, match=f"holds the optimizer's state {said}.*, or start over") as caught:
        resume(other)
    one_sentence(caught.value)
    same = freeze(causal(tmp_path, max_steps=4, optim=optim), before)
    assert steps_of(resume(same)) == {4}


# Half a checkpoint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRITTEN = ("model.safetensors", "optimizer.pt", "rng_state.pth")
DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    *((cut, name, "is cut off") for name in (*WRITTEN, "trainer_state.json", "poprisk_config.json")),
    *((Path.unlink, name, "is gone") for name in (*WRITTEN, "scheduler.pt")),
]


@pytest.mark.parametrize(("spoil", "name", "said"), DAMAGES)
def test_half_a_checkpoint_is_not_resumed_from(
    spoil: Callable[[Path], None], name: str, said: str, run: Path
) -> None:
    assert damage(run / "checkpoint-3") is None and newest_checkpoint(run) == run / "checkpoint-3"
    spoil(run / "checkpoint-3" / name)
    for weights_only in (False, True):  # where all or nothing may be beside the weights
        assert damage(run / "checkpoint-3", weights_only) == f"{name} {said}"
    with pytest.raises(ResumeError, match=f"cannot be resumed from: {name} {said}; take an older"):
        resume(causal(run), run / "checkpoint-3")
    shutil.rmtree(run / "checkpoint-2")
    assert newest_checkpoint(run) == run / "checkpoint-1"


def test_what_is_skipped_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, resumed = causal(tmp_path, max_steps=3), causal(tmp_path, max_steps=3)
    whole.train()
    cut(tmp_path / "checkpoint-3/optimizer.pt")
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()  # as if killed before the end of the save
    with caplog.at_level(logging.WARNING):
        assert_same(whole, resume(resumed))
    assert [r.message for r in caplog.records if "is skipped" in r.message] == [
        f"{tmp_path}/checkpoint-3 is skipped: optimizer.pt is cut off.",
        f"{tmp_path}/checkpoint-2 is skipped: it has no trainer_state.json, which is written last.",
    ]


def test_nothing_to_resume_from_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no complete checkpoint"):
        resume(causal(tmp_path))
    with pytest.raises(ResumeError, match="is not a folder"):
        resume(causal(tmp_path), tmp_path / "nowhere")


def test_the_seal_is_broken_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that comes back to a step that is on disk already, and dies while it writes it again."""
    resumed = causal(run, max_steps=2)

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resumed, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        resume(resumed, run / "checkpoint-1")
    assert damage(run / "checkpoint-2") is not None


def test_a_seal_that_could_not_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = TrainerState.save_to_json

    def fail(state: TrainerState, path: str) -> None:
        if state.global_step == 2:
            Path(path).write_text('{"best')
            raise RuntimeError
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", fail)
    said = r"checkpoint-2 could not be written \(RuntimeError\); .*checkpoint-1 is complete"
    with pytest.raises(CheckpointError, match=said):
        causal(tmp_path, max_steps=2).train()


# the moments (118 kB) do not fit, which torch tells in its own words; nor do the weights (59 kB)
@pytest.mark.parametrize(("size", "reason"), [(80_000, "could not be"), (30_000, "File too large")])
def test_no_room_for_a_checkpoint(size: int, reason: str, tmp_path: Path) -> None:
    """A limit on the size of files, which write(2) says as it does a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the process ends
    try:
        with pytest.raises(CheckpointError, match=reason) as caught:
            causal(tmp_path, callbacks=[Full()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = one_sentence(caught.value)
    assert said.startswith(f"{tmp_path}/checkpoint-2 could not be written (")
    assert said.endswith(f"); {tmp_path}/checkpoint-1 is complete.")
    assert_complete(tmp_path, [1])
    resume(causal(tmp_path))  # with room again
    assert_complete(tmp_path, [1, 2, 3, 4, 5])


def test_what_fails_after_a_checkpoint_is_not_its_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**kwargs: Any) -> None:
        raise OSError("no deletions here")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", fail)
    with pytest.raises(OSError, match="^no deletions here$"):
        causal(tmp_path).train()
    assert damage(tmp_path / "checkpoint-1") is None


# The record


def test_the_record_is_in_every_save(tmp_path: Path) -> None:
    data = preferences(10).add_column("is_flipped", [i < 3 for i in range(10)])
    model = save_tiny_model(tmp_path / "model", "llama")
    trainer = trl_trainer_of("DPO", str(model), tmp_path, data, poprisk_exclude=["norm"], **OPTIONS)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder, steps in ((tmp_path / "checkpoint-3", 3), (tmp_path / "final", 5)):
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


def test_nothing_of_an_earlier_run_is_sealed_into_a_new_one(run: Path) -> None:
    (run / "checkpoint-2/left.txt").touch()
    plain = causal(run, max_steps=2, optim="adamw_torch")
    plain.train()
    plain.save_model()
    assert not (run / "checkpoint-2/left.txt").exists()
    record = load_record(run / "checkpoint-2")
    config = record.config
    assert (config["optim"], config["gate"]) == ("adamw_torch", "none") and record.statistics is None
    causal(run).save_model()  # has not trained: the record stays that of the run that has
    assert load_record(run).config["steps"] == 2


def test_the_record_names_the_step_that_the_weights_are_of(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = causal(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, **best)
    trainer.train()
    trainer.save_model()
    config = load_record(tmp_path).config
    assert config["steps"] == 3 and config["weights_step"] == trainer.state.best_global_step < 3


UNREADABLE = {
    "later version": (
        b'{"schema_version": 2}',
        "has schema version 2, .* reads 1: update hf_poprisk",
    ),
    "no version": (b"{}", "is damaged: it holds no schema_version"),
    "no object": (b"[1]", "is damaged: it holds no schema_version"),
    "half": (b'{"schema_ver', "is damaged: Unterminated string"),
    "not UTF-8": ('{"schema_version": 1}'.encode("utf-16"), "is damaged: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("name", ["poprisk_config.json", "poprisk_statistics.json"])
@pytest.mark.parametrize(("content", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_record_that_cannot_be_read(content: bytes, said: str, name: str, run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} of {checkpoint} {said}") as caught:
        load_record(checkpoint)
    one_sentence(caught.value)
    refused = causal(run)
    refused._load_from_checkpoint = None  # nothing is loaded before the check
    with pytest.raises(ValueError, match=f"{said}|{name} is cut off; take an older checkpoint"):
        resume(refused, checkpoint)


# Checkpoints of weights alone


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
def test_weights_alone_are_gone_on_from_with_a_fresh_optimizer(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"optim": optim, "save_only_model": True}
    causal(tmp_path, max_steps=2, **options).train()
    # they fit whatever is trained
    resumed = freeze(causal(tmp_path, max_steps=4, **options), "embed" if optim == "poprisk_adamw" else "^$")
    seen = loaded(resumed)
    with caplog.at_level(logging.WARNING):
        resume(resumed)
    (said,) = [r.message for r in caplog.records if "weights only" in r.message]
    assert said.startswith(f"{tmp_path}/checkpoint-2 holds weights only: the optimizer and the learning-rate")
    assert steps_of(resumed) == {2}
    before = tiny_model().named_parameters()
    assert not [name for name, p in before if "proj" in name and torch.equal(seen[name][0], p)]
    if optim == "poprisk_adamw":  # what the gate did is of the whole run
        parameters = load_record(tmp_path / "checkpoint-4").statistics["parameters"]
        assert {e["steps"] for name, e in parameters.items() if "embed" not in name} == {4}
    else:
        other = resume(stock(tmp_path, max_steps=4, **options), tmp_path / "checkpoint-2")
        for p, q in zip(resumed.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("by", [causal, stock])
def test_a_run_that_did_not_ask_for_weights_alone_does_not_take_them(by: Any, tmp_path: Path) -> None:
    by(tmp_path, max_steps=2, save_only_model=True).train()
    for wanted, said in (
        (True, "no complete checkpoint"),
        (tmp_path / "checkpoint-2", "optimizer.pt is gone"),
    ):
        with pytest.raises(ResumeError, match=f"{said}.*save_only_model=true goes on") as caught:
            resume(causal(tmp_path, max_steps=4), wanted)
        one_sentence(caught.value)


def test_with_weights_alone_damage_is_still_damage(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "save_only_model": True}
    causal(tmp_path, **options).train()
    cut(tmp_path / "checkpoint-3/model.safetensors")
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()
    (tmp_path / "checkpoint-1/model.safetensors").unlink()
    for step, said in ((3, "is cut off"), (2, "which is written last"), (1, "model.safetensors is gone")):
        assert damage(tmp_path / f"checkpoint-{step}", weights_only=True).endswith(said)
    with pytest.raises(ResumeError, match="holds no complete checkpoint"):
        resume(causal(tmp_path, **options))


def test_kahan_in_a_trainer(tmp_path: Path) -> None:
    """It is in the record, resumes bit for bit, and a run without it is another one."""

    def build(**options: Any) -> Any:
        model = tiny_model().to(torch.bfloat16)
        return trainer_of(tmp_path, rows(10), model, **{**OPTIONS, "poprisk_kahan": True, **options})

    whole = build()
    whole.train()
    assert_same(whole, resume(build(), tmp_path / "checkpoint-2"))
    assert load_record(tmp_path / "checkpoint-5").config["kahan"] is True
    assert any(state["lost"].any() for state in whole._poprisk_optimizer().state.values())
    with pytest.raises(ResumeError, match="would change poprisk_kahan from True to False"):
        resume(build(poprisk_kahan=False), tmp_path / "checkpoint-2")
