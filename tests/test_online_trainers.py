"""GRPO and RLOO: an example is a prompt with all of its completions, and these are the stock trainer's."""

import random
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from losses import FirstGradient, gap
from models import prompts, reward, text, tiny_model, tiny_tokenizer, trainer_of, trl_trainer_of
from peft import LoraConfig
from reference import assert_sums, parts_of_the_loss
from test_batched_trainers import windows
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import hf_poprisk.trl_online as online
from hf_poprisk import PopRiskGRPOTrainer, gate
from hf_poprisk.per_example import Rows

STOCK: dict[str, tuple[Any, Any]] = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
N = 4  # completions of a prompt
# two prompts in a micro-batch, four in a step; the weights stay where they are
RUN = {"num_generations": N, "per_device_train_batch_size": 2 * N, "gradient_accumulation_steps": 2}
RUN |= {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "max_completion_length": 6}


def by_prompt(batches: list[Any]) -> list[Tensor]:
    """The prompt of every row, numbered over the step."""
    numbers: dict[tuple[int, ...], int] = {}
    ids = [[tuple(row[row > 1].tolist()) for row in batch["prompt_ids"]] for batch in batches]  # no padding
    return [torch.tensor([numbers.setdefault(i, len(numbers)) for i in batch]) for batch in ids]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPO", {}),
    "grpo, a KL term": ("GRPO", {"beta": 0.5, "loss_type": "grpo"}),
    "grpo, a prompt per micro-batch": (
        "GRPO",
        {"per_device_train_batch_size": N, "gradient_accumulation_steps": 4},
    ),
    "grpo, sequence by sequence": ("GRPO", {"importance_sampling_level": "sequence", "loss_type": "dr_grpo"}),
    "rloo": ("RLOO", {}),
    "rloo, a KL term": ("RLOO", {"beta": 0.5, "normalize_advantages": True}),
}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_stock_one_and_its_parts_are_those_of_single_prompts(
    name: str, adapter: bool, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = CASES[name]
    options = {**RUN, **options, **({"peft_config": LORA} if adapter else {})}
    make = partial(trl_trainer_of, kind, str(llama_dir), tmp_path / "ours", **options)
    [(b, window)], ours = windows(make, monkeypatch)
    assert b == 4 and ours.args.units_per_step == 4  # prompts
    assert (ours._layers is None) == ("per micro-batch" in name)  # a backward of one example needs none
    assert ours.state.log_history[0]["poprisk/examples"] == 4
    grab = FirstGradient()
    stock = trainer_of(
        tmp_path / "stock", prompts(8), str(llama_dir), STOCK[kind], bf16=False, optim="adamw_torch",
        callbacks=[grab], reward_funcs=reward, **options,
    )  # fmt: skip
    stock.train()
    assert gap({n: g for n, (g, _) in window.items()}, grab.gradient) < 1e-5
    mine, theirs = (t.state.log_history[0] for t in (ours, stock))
    for metric in {"reward", "completions/mean_length", "kl"} & theirs.keys():
        assert mine[metric] == pytest.approx(theirs[metric], rel=1e-4), metric
    batches = stock._buffered_inputs
    scale = 1.0 if kind == "GRPO" else 1 / options["gradient_accumulation_steps"]
    parts = parts_of_the_loss(stock, batches, by_prompt(batches), scale)
    assert len(parts) == 4
    assert_sums(window, parts)


@pytest.mark.parametrize("kind", STOCK)
def test_completions_serve_several_steps(
    kind: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of a generation of four in each step, twice over; generating is no example."""
    options = {**RUN, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2}
    options |= {"max_steps": 6, "learning_rate": 1e-3}
    calls = []

    def counted(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return reward(completions)

    make = partial(trl_trainer_of, kind, str(llama_dir), tmp_path, **options, reward_funcs=counted)
    found, trainer = windows(make, monkeypatch)
    assert [b for b, _ in found] == [2] * 6 and calls == [4 * N] * 2
    assert all(float(g.abs().sum()) > 0 for g, _ in found[-1][1].values())
    before = trainer.state.global_step
    assert "eval_loss" in trainer.evaluate(prompts(2)) and trainer.state.global_step == before


def by_answer(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward drawn for every prompt and answer: what is right for one prompt tells nothing of another."""
    keys = (f"{prompt}|{completion}" for prompt, completion in zip(prompts, completions, strict=True))
    return [random.Random(zlib.crc32(key.encode())).gauss(0, 1) for key in keys]


def by_completion(completions: list[str], **_: Any) -> list[float]:
    """A reward drawn for every completion."""
    return [random.gauss(0, 1) for _ in completions]


def share_open(model: Path, folder: Path, reward: Any) -> float:
    """Over steps of sixteen prompts with eight completions each, of which there are few different ones."""
    options = {"num_generations": 8, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
    options |= {"max_completion_length": 1, "learning_rate": 0.0, "max_steps": 8}
    options |= {"poprisk_exclude": ["embed", "lm_head"]}  # whose rows few prompts reach
    data = Dataset.from_dict({"prompt": [f"{i} {text(i, 4)}" for i in range(128)]})  # all different
    trainer = trl_trainer_of("GRPO", str(model), folder, data, reward_funcs=reward, **options)
    trainer.train()
    shares = [entry["poprisk/fraction_open"] for entry in trainer.state.log_history[:-1]]
    return sum(shares) / len(shares)


def test_random_rewards_open_the_gate_by_chance_only_if_prompts_are_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # so that a prompt gets the same answer several times
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = {}
    for unit in ("prompt", "completion"):
        for drawn in (by_answer, by_completion):
            found[unit, drawn.__name__] = share_open(tmp_path, tmp_path / "out", drawn)

        def single(self: Any, optimizer: Any, inputs: Any) -> Rows:
            rows = len(inputs["completion_ids"])
            return Rows(rows, rows)

        monkeypatch.setattr(PopRiskGRPOTrainer, "_layout", single)
    print(found)
    by_chance = {"prompt": gate.null_openness(16, "hard"), "completion": gate.null_openness(128, "hard")}
    for drawn in ("by_answer", "by_completion"):
        assert found["prompt", drawn] == pytest.approx(by_chance["prompt"], abs=0.04)
    assert found["completion", "by_answer"] > by_chance["completion"] + 0.1
    # what is drawn for each completion is confirmed by none, of whichever prompt
    assert found["completion", "by_completion"] == pytest.approx(by_chance["completion"], abs=0.04)


def test_whole_prompts_are_shuffled() -> None:
    rows = torch.arange(24)
    batch = {"prompt_ids": rows[:, None] // 3, "texts": [str(i) for i in range(24)], "none": None}
    batch |= {"advantages": rows.float(), "num_items_in_batch": torch.tensor(7)}
    found = online.shuffle_prompts(batch, 3, 2)
    assert found["none"] is None and found["num_items_in_batch"] == 7
    assert sorted(found["advantages"].tolist()) == rows.tolist()
    assert found["texts"] == [str(int(i)) for i in found["advantages"]]
    for half in found["prompt_ids"].split(12):
        first = half[:4]
        assert len(first.unique()) == 4 and torch.equal(half, first.repeat(3, 1))
    assert not torch.equal(found["prompt_ids"], online.shuffle_prompts(batch, 3, 2)["prompt_ids"])


def test_a_trl_with_another_shuffle_is_named(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(trl_trainer_of, "GRPO", str(llama_dir), tmp_path, **RUN)
    with monkeypatch.context() as patch:
        patch.setattr(online, "_SHUFFLE", "shuffle_differently")
        with pytest.raises(RuntimeError, match="has no shuffle_differently: this TRL shuffles"):
            make().train()
    monkeypatch.setattr(online, "shuffle_prompts", lambda batch, **_: batch)  # one after the other
    with pytest.raises(RuntimeError, match="are not together in a micro-batch"):
        make().train()


def test_what_completions_cannot_serve_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    make = partial(trl_trainer_of, "GRPO", str(llama_dir), tmp_path, **RUN)
    with pytest.raises(
        ValueError, match="^poprisk_basis=eigen is measured on training examples, and .*: set"
    ):
        make(poprisk_basis="eigen", poprisk_gate="none")
    trainer = make(optim="adamw_torch", per_device_train_batch_size=6)  # the stock one takes what it takes
    trainer.train()
    assert "poprisk/examples" not in trainer.state.log_history[0]
