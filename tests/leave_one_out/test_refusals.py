"""What cannot be judged is refused in one sentence."""

from pathlib import Path

import pytest
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from hf_poprisk import PopRiskTrainingArguments
from leave_one_out.helpers import QUIET, Classifier, classify, examples, same, weights


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
