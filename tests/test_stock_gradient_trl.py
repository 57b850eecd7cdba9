"""The same in TRL's trainers, and in trainers that are put behind the mixins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import KINDS as LOSSES
from losses import FirstGradient, gap
from models import layout, preferences, tiny_model, tiny_tokenizer, trainer_of, trl_trainer_of
from peft import LoraConfig
from test_trainer import Record
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from hf_poprisk import PopRiskArgumentsMixin, PopRiskMixin

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two mixtures of experts, whose layers go one by one."""
    torch.manual_seed(0)
    tokenizer, folders = tiny_tokenizer(), {}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    sizes |= {"eos_token_id": 1, "bos_token_id": None, "num_experts_per_tok": 2}
    for name, model in {
        "qwen3": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=4)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)),
    }.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def trained(make: Callable[..., Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    """The first gradient, and the trainer after its only step."""
    torch.manual_seed(0)
    grab = FirstGradient()
    trainer = make(callbacks=[grab], max_steps=1, max_grad_norm=0.0, **options)
    trainer.train()
    return grab.gradient, trainer


EXPERT_LORA = LoraConfig(
    task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("DPO", {"router_aux_loss_coef": 0.0}),
    "dpo and sft": ("DPO", {"loss_type": ["sigmoid", "sft"], "router_aux_loss_coef": 0.0}),
    "dpo, norms and sft": ("DPO", {"loss_type": ["ipo", "sft"], "router_aux_loss_coef": 0.0}),
    "dpo on adapted experts": ("DPO", {"peft_config": EXPERT_LORA, "router_aux_loss_coef": 0.0}),
    "sft": ("SFT", {"router_aux_loss_coef": 0.0}),
    "sft on adapted experts": ("SFT", {"peft_config": EXPERT_LORA, "router_aux_loss_coef": 0.0}),
    "sft, packed": ("SFT", {"packing": True, "max_length": 60, "router_aux_loss_coef": 0.0}),
    "sft, dynamic": ("SFT", {"loss_type": "dft", "router_aux_loss_coef": 0.0}),
    "reward": ("Reward", {"center_rewards_coefficient": 0.1}),
}


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_stock_one(
    name: str, family: str, size: int, experts: dict[str, Path], tmp_path: Path
) -> None:
    kind, options = CASES[name]
    make = partial(trl_trainer_of, kind, str(experts[family]), tmp_path, **layout(size, 4), **options)
    ours, trainer = trained(make)
    stock, plain = trained(make, optim="adamw_torch")
    assert (trainer._layers is None) == ("adapted" in name)  # these one by one
    assert gap(ours, stock) < TOLERANCE
    mine, theirs = (t.state.log_history[0] for t in (trainer, plain))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for metric in ("rewards/margins", "entropy", "mean_token_accuracy", "num_tokens", "margin"):
        if metric in theirs:  # counted once, by the loss on the whole micro-batch
            assert mine[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-7), metric


def test_a_router_loss_is_refused_whoever_asks_for_it(experts: dict[str, Path], tmp_path: Path) -> None:
    """TRL asks for it by an argument of the forward, the model by its config or that of its language part."""
    said = "router_aux_loss_coef balances the experts .*: set it to 0, or set per_device_train_batch_size=1"
    model = str(experts["qwen3"])
    for kind in ("DPO", "SFT"):
        for options in ({}, {"router_aux_loss_coef": 0.5}, {"peft_config": EXPERT_LORA}):
            with pytest.raises(ValueError, match=said):
                trl_trainer_of(kind, model, tmp_path, **layout(4), **options).train()
    trl_trainer_of("DPO", model, tmp_path, **layout(1), max_steps=1).train()
    kind = LOSSES["experts: mixtral"]
    for nested in (False, True):
        model = kind.model()
        model.config.output_router_logits = not nested
        if nested:
            config = type(model.config)(output_router_logits=True)
            model.config.get_text_config = lambda *_, config=config, **__: config
        with pytest.raises(ValueError, match=said):
            trainer_of(tmp_path, kind.data, model, **layout(4)).train()


def behind_the_mixins(trainer: type[Any], config: type[Any]) -> tuple[Any, Any]:
    """As a user writes them."""

    class Trainer(PopRiskMixin, trainer): ...

    @dataclass
    class Config(PopRiskArgumentsMixin, config): ...

    return Trainer, Config


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("theirs", [(ORPOTrainer, ORPOConfig), (CPOTrainer, CPOConfig)])
def test_preference_trainers_behind_the_mixin(theirs: tuple[Any, Any], size: int, tmp_path: Path) -> None:
    """The collator gives a row per pair, and the model sees two."""
    found, kinds = [], behind_the_mixins(*theirs)
    for optim in ("poprisk_adamw", "adamw_torch"):
        make = partial(trainer_of, tmp_path, preferences(8), tiny_model(), kinds, bf16=False, max_length=64)
        found.append(trained(make, **layout(size, 4), processing_class=tiny_tokenizer(), optim=optim))
    (ours, mine), (stock, plain) = ((grad, t.state.log_history[0]) for grad, t in found)
    assert gap(ours, stock) < TOLERANCE
    assert mine["loss"] == pytest.approx(plain["loss"], rel=1e-5) and mine["poprisk/examples"] == 4


class LastTokens(Seq2SeqTrainer):
    """A user's trainer with a loss of its own: the mean over the examples of their last token's loss."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, -1], inputs["labels"][:, -1])
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("trainer", [Seq2SeqTrainer, LastTokens])
@pytest.mark.parametrize("name", ["mt5", "bart"])
def test_sequence_to_sequence_behind_both_mixins(
    name: str, trainer: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G is the stock one; Q is that of single examples, up to the scale that T5's loss has by the layout."""
    kinds, found, squares = behind_the_mixins(trainer, Seq2SeqTrainingArguments), [], []
    data = [{**row, "labels": torch.roll(row["input_ids"], 1)} for row in LOSSES["token mean: bart"].data]
    for size, optim in ((4, "poprisk_adamw"), (1, "poprisk_adamw"), (4, "adamw_torch")):
        torch.manual_seed(0)
        make = partial(
            trainer_of,
            tmp_path,
            data,
            LOSSES[f"token mean: {name}"].model(),
            kinds,
            predict_with_generate=True,
        )
        with monkeypatch.context() as patch:
            record = Record(patch)
            gradient, trained_one = trained(make, **layout(size), optim=optim)
        found.append(gradient)
        squares += [q for _, q in record.windows]
        assert "eval_loss" in trained_one.evaluate(data[:2])  # with generation, by the stock trainer
    assert gap(found[0], found[2]) < TOLERANCE and len(squares) == 2
    for n, (g, q) in squares[0].items():
        other_g, other_q = squares[1][n]
        other_q = other_q * (g.norm() / other_g.norm()) ** 2
        assert (q - other_q).abs().max() <= 1e-4 * q.abs().max(), n


def test_packed_rows_need_not_be_two(llama_dir: Path, tmp_path: Path) -> None:
    """A step of one packed row holds several examples; unpacked it would be refused."""
    make = partial(trl_trainer_of, "SFT", str(llama_dir), tmp_path, **layout(1, 1), max_steps=1)
    trainer = make(packing=True, max_length=512)
    trainer.train()
    assert trainer.state.log_history[0]["poprisk/examples"] == 8
    with pytest.raises(ValueError, match="a step of one example leaves nothing to hold out"):
        make()
