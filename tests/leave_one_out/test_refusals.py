"""What cannot be judged is refused in one sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

import hf_poprisk
from hf_poprisk import PopRiskTrainingArguments
from leave_one_out.helpers import QUIET, Classifier, classify, examples, same, weights

WEIGHT = {"poprisk_label_noise": "weight"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("", {"poprisk_label_noise": "swap"}, "poprisk_label_noise must be one of off, audit, weight"),
        ("", {"label_smoothing_factor": 0.1}, "set label_smoothing_factor=0"),
        ("", {"torch_compile": True}, "set torch_compile=False"),
        ("", {"optim": "adamw_torch"}, "has no effect with optim=adamw_torch"),
        ("", {"poprisk_estimator": "group", "poprisk_gate": "hard"}, "set poprisk_estimator=example"),
        *(
            (
                "DPO",
                {"loss_type": loss, **WEIGHT},
                f"loss_type={','.join(loss)} is not a function of it alone",
            )
            for loss in (["ipo"], ["sigmoid", "sft"], ["sft", "sigmoid"], ["sigmoid", "sigmoid_norm"])
        ),
        ("DPO", {"loss_type": ["robust"], **WEIGHT}, "use .*_norm, or set poprisk_label_noise=audit"),
        ("DPO", {"use_weighting": True, **WEIGHT}, "=False, or set poprisk_label_noise=audit"),
        ("DPO", {"use_liger_kernel": True}, "set use_liger_kernel=False"),
        (
            "Reward",
            {"center_rewards_coefficient": 0.1, **WEIGHT},
            "remove center_rewards_coefficient, or set",
        ),
        ("SFT", {}, "judges labels, and a sequence has none"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = getattr(hf_poprisk, f"PopRisk{kind}Config") if kind else PopRiskTrainingArguments
    quiet = {k: v for k, v in QUIET.items() if k != "poprisk_gate"}
    bf16 = {"bf16": False} if kind else {}
    settings = {
        "poprisk_label_noise": "audit",
        "gradient_accumulation_steps": 4,
        **quiet,
        **bf16,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **settings).check_training()


def test_a_loss_without_log_odds_is_refused_before_a_step(tmp_path: Path) -> None:
    class Regression(Classifier):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": (logits[:, 0] - labels).square().mean(), "logits": logits}

    trainer = classify(tmp_path, examples(), Regression(), poprisk_label_noise="audit")
    before = weights(trainer)
    with pytest.raises(ValueError, match="needs a loss that is the mean cross-entropy of class labels"):
        trainer.train()
    assert same(before, weights(trainer))
    assert not hasattr(Trainer, "_label_noise")


def test_a_loss_over_tokens_is_refused(tmp_path: Path) -> None:
    class Tokens(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x).repeat(3, 1)
            return {"loss": F.cross_entropy(logits, labels.repeat(3)), "logits": logits}

    trainer = classify(tmp_path, examples(), Tokens(), poprisk_label_noise="audit")
    with pytest.raises(ValueError, match=r"it has 12 terms for 4 examples\): set poprisk_label_noise=off"):
        trainer.train()


def test_a_training_set_that_comes_later_is_refused(tmp_path: Path) -> None:
    trainer = classify(tmp_path, None, poprisk_label_noise="weight")
    trainer.train_dataset = examples()
    with pytest.raises(ValueError, match="was set without a training set"):
        trainer.train()


def test_a_refusal_names_a_way_out_that_is_one(tmp_path: Path) -> None:
    quiet = {**QUIET, "poprisk_label_noise": "weight", "auto_find_batch_size": True}
    with pytest.raises(ValueError, match="or set poprisk_gate=none, poprisk_label_noise=off"):
        PopRiskTrainingArguments(str(tmp_path), **quiet).check_training()

    trainer = classify(tmp_path, examples(), poprisk_label_noise="weight")
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP is not supported .* poprisk_label_noise=off"):
        trainer.train()


def test_experts_that_are_balanced_are_refused(tmp_path: Path) -> None:
    model = Classifier()
    model.config = SimpleNamespace(output_router_logits=True, router_aux_loss_coef=0.01)
    trainer = classify(
        tmp_path, examples(), model, poprisk_label_noise="audit", per_device_train_batch_size=1
    )
    with pytest.raises(ValueError, match="a term to the loss that is not about labels"):
        trainer.create_optimizer()
