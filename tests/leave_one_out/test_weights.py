"""When an estimate means little, and what is said of it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_poprisk.leave_one_out import ClassNoise, ExampleTable, NoiseFit, PairNoise
from leave_one_out.helpers import classify, examples, prefer

FIT = NoiseFit(0.2, 0.1, 0.3, 1.5, 2, -0.5, 400)
GUESS = replace(FIT, log_likelihood=-math.log(2))


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
    judge.fit = fit
    assert says in judge.doubt if says else judge.doubt is None


def test_classes_must_be_explained_better_than_pairs() -> None:
    judge = ClassNoise("weight", ExampleTable(np.arange(4)))
    judge.fit = replace(FIT, log_likelihood=-0.6)
    assert (
        0.1 < judge.fit.explained < 0.75
        and "the ambiguous look wrong: more examples, or a model" in judge.doubt
    )
    judge.fit = NoiseFit(0.2, 0.15, 0.25, 1.0, 10, -1.1, 400)
    assert judge.fit.explained > 0.75 and judge.doubt is None
    judge._num_copies = 5
    assert judge.doubt.startswith("5 examples are copies of others")


@pytest.mark.parametrize("mode", ["audit", "weight"])
def test_the_end_of_training_says_what_was_found(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = classify(tmp_path, examples(240, wrong=0.2), poprisk_label_noise=mode, num_train_epochs=1)
    trainer.train()
    fit, weights = trainer._label_noise.fit, ", weights since step 0" * (mode == "weight")
    assert trainer._label_noise.weighted
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
    assert f"{trainer._label_noise.found()}.\n" in card.text
