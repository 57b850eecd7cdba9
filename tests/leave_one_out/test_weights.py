"""When an estimate means little, and what is said of it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_poprisk.leave_one_out import ClassNoise, ExampleTable, NoiseFit, PairNoise
from hf_poprisk.leave_one_out.noise import MAX_RATE
from leave_one_out.helpers import classify, examples, prefer


def test_a_training_that_is_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classify(tmp_path, examples(), poprisk_label_noise="weight", max_steps=3).train()
    assert "training ended within its first epoch" in caplog.text
    assert "no example was weighted: set num_train_epochs to three or more" in caplog.text


FIT = NoiseFit(0.2, 0.1, 0.3, 1.5, 2, -0.5, 400, 10, 1.0)
GUESS = replace(FIT, log_likelihood=-math.log(2))
LATER = replace(FIT, epoch=2.0, log_likelihood=-0.4)


@pytest.mark.parametrize(
    ("fits", "since", "says"),
    [
        ([GUESS], None, "predicted hardly better than by chance: raise num_train_epochs or learning_rate"),
        ([GUESS], 5, "hardly better than by chance: raise learning_rate or num_train_epochs"),
        (
            [FIT],
            None,
            "classes are judged from the end of the second epoch on at the earliest: raise num_train",
        ),
        ([replace(FIT, rate=MAX_RATE)], 5, "the estimate is at its limit of 0.45"),
        ([FIT, LATER], None, "predicted better and better until the end"),
        ([FIT, LATER], 20, "because training ended where weights would have begun"),
        ([FIT, LATER], 5, "is not settled, and too low if labels are learned by heart"),
        ([FIT, replace(FIT, epoch=2.0)], 5, ""),
    ],
)
def test_warnings_say_what_the_numbers_are_not_worth(
    fits: list[NoiseFit], since: int | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    judge = ClassNoise("weight", ExampleTable(np.arange(4)))
    judge.fits, judge.judging_since = fits, since
    judge.warn_at_end(20)
    assert says in caplog.text if says else not caplog.text


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (FIT, None),
        (GUESS, "predict labels hardly better than by chance: more pairs, or a model that knows the task"),
        (replace(FIT, low=0.2, high=0.435), "leave the noise rate open (0.200 to 0.435): more pairs may"),
        (replace(FIT, low=0.05, high=0.4), "leave the noise rate open (0.050 to 0.400): more pairs may tell"),
    ],
)
def test_pairs_are_doubted_before_the_first_step(fit: NoiseFit, says: str | None) -> None:
    judge = PairNoise("weight", ExampleTable(np.arange(4)))
    judge.fits = [fit]
    assert says in judge.doubt if says else judge.doubt is None


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
    trainer = prefer("DPO", llama_dir, tmp_path, poprisk_label_noise="audit", max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert f"{trainer._label_noise.found(trainer.state.global_step)}.\n" in card.text
