"""KTO, ORPO, CPO, SimPO and TPO: the gradient is TRL's own, and Q that of a loop over single examples."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from leave_one_out.helpers import planted
from losses import FirstGradient, gap
from models import DATA, layout, preferences, tiny_model, trainer_of, trl_trainer_of
from peft import LoraConfig
from reference import assert_sums, parts_of_the_loss
from test_batched_trainers import windows
from torch import Tensor
from trl import KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from hf_poprisk import load_record

STOCK: dict[str, tuple[Any, Any]] = {
    "KTO": (KTOTrainer, KTOConfig),
    "ORPO": (ORPOTrainer, ORPOConfig),
    "CPO": (CPOTrainer, CPOConfig),
    "TPO": (TPOTrainer, TPOConfig),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kto": ("KTO", {}),
    "kto without its KL term": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "orpo": ("ORPO", {}),
    "cpo": ("CPO", {}),
    "simpo": ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "tpo": ("TPO", {}),
    "tpo of pairs": ("TPO", {"tpo_alpha": 0.0}),
}
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
SIZE, EXAMPLES = 4, 8


def options_of(kind: str, options: dict[str, Any], adapter: bool) -> dict[str, Any]:
    """Of a run of one step; KTO's reference fits worse than the model, so that its KL term is not zero."""
    options = {**options, **layout(SIZE, EXAMPLES), "max_steps": 1, "max_grad_norm": 0.0, "max_length": 64}
    if adapter:
        return {**options, "peft_config": LORA}
    if kind == "KTO":
        options["ref_model"] = tiny_model()
        with torch.no_grad():
            options["ref_model"].lm_head.weight.mul_(-4)
    return options


def stock_trainer(kind: str, model: Path, folder: Path, **options: Any) -> Any:
    data = DATA.get(kind, preferences)(EXAMPLES)
    return trainer_of(folder, data, str(model), STOCK[kind], optim="adamw_torch", bf16=False, **options)


def alone(kind: str, model: Path, folder: Path, **options: Any) -> list[dict[str, Tensor]]:
    """What each example adds to the first step of the stock trainer."""
    trainer = stock_trainer(kind, model, folder, **options)
    steps = EXAMPLES // SIZE
    batches = [trainer._prepare_inputs(b) for b in islice(trainer.get_train_dataloader(), steps)]
    rows = {"KTO": 1, "TPO": 3 if getattr(trainer.args, "tpo_alpha", 0.0) else 2}.get(kind, 2)
    owners = [(torch.arange(SIZE) + SIZE * k).repeat(rows) for k in range(steps)]
    return parts_of_the_loss(trainer, batches, owners, 1 / steps)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_stock_one_and_its_parts_are_those_of_single_examples(
    name: str, adapter: bool, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = CASES[name]
    options = options_of(kind, options, adapter)
    [(b, window)], ours = windows(
        partial(trl_trainer_of, kind, str(llama_dir), tmp_path / "ours", **options), monkeypatch
    )
    assert b == EXAMPLES and ours._paths_checked and ours._layers is not None  # in one backward
    grab = FirstGradient()
    stock = stock_trainer(kind, llama_dir, tmp_path / "stock", **options, callbacks=[grab])
    stock.train()
    assert gap({n: g for n, (g, _) in window.items()}, grab.gradient) < 1e-5
    mine, theirs = (t.state.log_history[0] for t in (ours, stock))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    if name == "kto" and not adapter:
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-5) and theirs["kl"] > 0.1
    parts = alone(kind, llama_dir, tmp_path / "alone", **options)
    assert_sums(window, parts)


@pytest.mark.parametrize("kind", STOCK)
def test_weights_are_put_on_single_examples(
    kind: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, weights = options_of(kind, {}, False), [0.0, 1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 0.25]
    data = DATA.get(kind, preferences)(EXAMPLES).add_column("w", weights)
    make = partial(trl_trainer_of, kind, str(llama_dir), tmp_path / "ours", data, **options)
    [(_, window)], _ = windows(partial(make, poprisk_weight_column="w"), monkeypatch)
    parts = alone(kind, llama_dir, tmp_path / "alone", **options)
    weighted = [{n: w * h for n, h in part.items()} for w, part in zip(weights, parts, strict=True)]
    assert_sums(window, weighted, gates=False)


@pytest.mark.parametrize("kind", ["ORPO", "CPO"])
def test_the_labels_of_pairs_are_judged(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    """By log p(chosen) − log p(rejected), here one text at a time."""
    options = {**layout(4), "max_steps": 1, "poprisk_label_noise": "weight"}
    trainer = trl_trainer_of(kind, str(llama_dir), tmp_path, preferences(60), **options)
    trainer.train()
    trainer.save_model()
    assert load_record(tmp_path).config["label_noise"] == "weight" and (tmp_path / "judged.parquet").is_file()
    assert 0 <= trainer.state.log_history[0]["poprisk/noise_rate"] <= 0.5
    rows = [trainer.train_dataset[i] for i in range(3)]
    batch = trainer.data_collator([{k: v for k, v in row.items() if k != "example_index"} for row in rows])
    found, model = trainer.label_log_odds(trainer.model, batch), trainer.model
    for z, row in zip(found, rows, strict=True):
        log_p = []
        for side in ("chosen", "rejected"):
            ids, labels = (torch.tensor([row[f"{side}_{name}"]]) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            labels, kept = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
            log_p.append(float((logits.gather(-1, labels[..., None])[..., 0] * kept).sum().detach()))
        assert float(z.detach()) == pytest.approx(log_p[0] - log_p[1], abs=1e-4)


@pytest.mark.parametrize("kind", ["ORPO", "CPO"])
def test_the_judge_and_the_leap_are_those_of_dpo(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    """They see the same texts and the same model, whatever the loss."""
    options = {"poprisk_label_noise": "weight", "poprisk_leap": 0.5, "num_train_epochs": 0, **layout(4)}
    trainers = [trl_trainer_of(k, str(llama_dir), tmp_path, planted()[0], **options) for k in ("DPO", kind)]
    for trainer in trainers:
        trainer.train()
    theirs, ours = (trainer._label_noise for trainer in trainers)
    torch.testing.assert_close(ours.table.log_odds, theirs.table.log_odds, rtol=1e-3, atol=1e-3)
    assert ours.leap.reached == pytest.approx(theirs.leap.reached, rel=1e-2) and ours.leap.reached > 0.4
    moved = [dict(trainer.model.named_parameters()) for trainer in trainers]
    for name, p in moved[1].items():
        torch.testing.assert_close(p, moved[0][name], rtol=1e-3, atol=1e-4, msg=name)
