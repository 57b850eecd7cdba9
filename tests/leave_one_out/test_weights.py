"""When an estimate means little, and what is said of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from models import preferences

import hf_poprisk
from hf_poprisk.leave_one_out import ExampleTable, LabelNoise
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.weights import competent
from leave_one_out.helpers import QUIET, classify, examples, prefer


def test_warnings_say_what_the_numbers_are_not_worth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = classify(tmp_path, examples(), poprisk_label_noise="weight", max_steps=3)
    trainer.train()
    assert "training ended within its first epoch" in caplog.text
    judge = LabelNoise("audit", True, ExampleTable(np.arange(400)))
    judge.table.visit(
        torch.arange(400), log_odds=torch.tensor(np.random.default_rng(1).choice([-1.0, 1.0], 400))
    )
    judge.maybe_fit(1.0, 10)

    def warning() -> str:
        caplog.clear()
        judge.warn_at_end(20)
        return caplog.text

    assert judge.judging_since == 10  # pairs need no second epoch
    assert not competent(judge.fits[-1]) and "predicted hardly better than by chance" in warning()
    judge.mode = "weight"
    assert "predicted hardly better than by chance: raise learning_rate" in warning()
    first = judge.fits[0]
    judge.fits[0] = replace(first, rate=MAX_RATE, log_likelihood=-0.5)
    assert judge.fits[-1].capped and "the estimate is at its limit of 0.45" in warning()
    judge.fits[0], judge.judging_since = first, None
    assert "hardly better than by chance: raise num_train_epochs or learning_rate" in warning()
    judge.fits.append(replace(judge.fits[0], epoch=1.75, rate=0.2, log_likelihood=-0.5))
    assert "pairs that the model had been trained on before are judged from the end of the" in warning()
    judge.preferences = False
    assert "because classes are judged from the end of the second epoch on at the earliest" in warning()
    judge.fits[-1] = replace(judge.fits[-1], epoch=2.0)
    assert "predicted better and better until the end" in warning()
    judge.judging_since = 20
    assert "because training ended where weights would have begun" in warning()
    judge.judging_since = 5
    assert "is not settled, and too low if labels are learned by heart" in warning()
    judge.preferences = True
    assert judge.fit.rate == pytest.approx(0.282, abs=5e-4)  # of the first visits
    assert judge.fits[0].exact and "were predicted hardly better than by chance: more pairs" in warning()
    judge.fits[0] = replace(judge.fits[0], low=0.2, high=0.4, log_likelihood=-0.6)
    assert "is not settled, and too low" in warning()
    judge.fits[0] = replace(judge.fits[0], high=0.44)
    assert "leave the noise rate open (0.200 to 0.440): more pairs" in warning()
    judge.fits[0] = replace(judge.fits[0], low=0.05, high=0.4)
    assert "leave the noise rate open (0.050 to 0.400): more pairs" in warning()
    judge.preferences = False
    judge.fits = []
    assert "no example was weighted: set num_train_epochs to three or more" in warning()
    judge.preferences = True
    assert "no example was weighted: set num_train_epochs to two or more" in warning()


@pytest.mark.parametrize("mode", ["audit", "weight"])
def test_the_end_of_training_says_what_was_found(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = classify(
        tmp_path, examples(96), poprisk_label_noise=mode, num_train_epochs=8, learning_rate=3e-2
    )
    trainer.train()
    judge = trainer._label_noise
    fit, since = judge.fits[-1], judge.judging_since
    assert since is not None and "weights since" not in judge.found(since)
    weights = f", weights since step {since}" * (mode == "weight")
    assert (
        f"poprisk_label_noise={mode}: estimated noise rate {fit.rate:.3f} ({fit.low:.3f} to {fit.high:.3f})"
        f"{weights}; `hf-poprisk audit {tmp_path}` shows the examples." in caplog.text
    )
    assert any("poprisk/weight_mean" in e for e in trainer.state.log_history) == (mode == "weight")


def test_the_card_says_what_the_labels_were_found_to_be(llama_dir: Path, tmp_path: Path) -> None:
    args = hf_poprisk.PopRiskDPOConfig(str(tmp_path), bf16=False, poprisk_label_noise="audit", **QUIET)
    trainer = hf_poprisk.PopRiskDPOTrainer(str(llama_dir), args=args, train_dataset=preferences(16))
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert f"{trainer._label_noise.found(trainer.state.global_step)}.\n" in card.text


def test_a_run_that_will_not_swap_says_so(
    llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = prefer("DPO", llama_dir, tmp_path, poprisk_label_noise="swap", num_train_epochs=2)
    judge, fit = trainer._label_noise, trainer._label_noise.maybe_fit

    def maybe_fit(epoch: float, step: int) -> None:  # tiny models predict nothing
        fit(epoch, step)
        judge.judging_since = judge.judging_since or (step if judge.fits else None)

    judge.maybe_fit = maybe_fit
    trainer.train()
    assert judge.judging_since == 4 and caplog.text.count("pairs are weighted and none is swapped") == 1
