"""The rivals of judging by gradients, and real data out of packages."""

import sys
from pathlib import Path
from types import SimpleNamespace

import labels_judged
import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_model
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from hf_poprisk.leave_one_out.features import pair_log_odds

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import prepare_real


def two_pairs() -> tuple[list[torch.Tensor], tuple[int, ...], dict[str, torch.Tensor]]:
    """Texts, where their completions start, and the batch of them as TRL's DPO collates it."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 30, (length,), generator=generator) for length in (6, 9, 7, 5)]
    starts = (2, 4, 2, 4)  # two pairs: prompts of two tokens and of four
    batch = {name: torch.zeros(4, 9, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros(4, 9, dtype=torch.long)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        batch["input_ids"][row, : len(text)] = text
        batch["attention_mask"][row, : len(text)] = 1
        batch["completion_mask"][row, start : len(text)] = 1
    return texts, starts, batch


def test_embeddings_are_those_of_each_text_alone() -> None:
    model, (texts, starts, batch) = tiny_model(), two_pairs()
    for which, pooled in (("last", lambda h: h[-1]), ("mean", lambda h: h.mean(0))):
        with torch.no_grad():
            alone = [
                pooled(model(text[None], output_hidden_states=True).hidden_states[-1][0, start:])
                for text, start in zip(texts, starts, strict=True)
            ]
        expected = torch.stack([alone[0] - alone[2], alone[1] - alone[3]])
        np.testing.assert_allclose(labels_judged.embedded(model, batch, which), expected, atol=1e-5)


def test_self_influence_is_of_both_texts_of_a_pair() -> None:
    """With no metric that of a pair is the square of its gradient."""
    pytest.importorskip("kronfluence", reason="of the extra experiments, which the tests do without")
    import labels_influence

    batch, beta = two_pairs()[2], 0.7
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = torch.tensor([[-9.0, -8.0], [-7.0, -9.0]])
    parts = ({name: x[i::2] if len(x) == 4 else x[i : i + 1] for name, x in batch.items()} for i in (0, 1))
    trainer = SimpleNamespace(
        model=tiny_model(), beta=beta, train_dataset=list(parts), data_collator=lambda batch: batch[0]
    )
    model, expected = tiny_model(), []
    z = beta * (pair_log_odds(model, batch) - batch["ref_chosen_logps"] + batch["ref_rejected_logps"])
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for loss in -F.logsigmoid(z):
        gradients = torch.autograd.grad(loss, linear, retain_graph=True)
        expected.append(sum(float(g.square().sum()) for g in gradients))
    np.testing.assert_allclose(labels_influence.losses(trainer), -F.logsigmoid(z).detach(), rtol=1e-4)
    np.testing.assert_allclose(labels_influence.self_influence(trainer, "identity"), expected, rtol=1e-3)


def test_five_folds_find_swapped_pairs_where_features_tell() -> None:
    rng = np.random.default_rng(0)
    direction, x = rng.normal(size=20), rng.normal(size=(300, 20))
    mislabeled = rng.permutation(300) < 60
    x *= (np.sign(x @ direction) * np.where(mislabeled, -1, 1))[:, None]
    assert roc_auc_score(mislabeled, -labels_judged.cross_validated(x, 0)) > 0.9


def test_reviews_become_pairs(tmp_path: Path) -> None:
    reviews = pd.DataFrame({"category": ["fresh", "rotten", "fresh", "rotten"], "text": ["a", "b", "c", "d"]})
    words = prepare_real.sentiment(reviews)
    assert words.chosen.tolist() == [" positive", " negative"] * 2
    assert words.rejected.tolist() == [" negative", " positive"] * 2
    assert words.prompt[1] == "Review: b\nThe sentiment of this review is"
    texts = prepare_real.writing(reviews)
    said = {name: [messages[0]["content"] for messages in texts[name]] for name in texts}
    assert said["chosen"] == ["a", "d"] and said["rejected"] == ["b", "c"]
    assert ["positive" in prompt for prompt in said["prompt"]] == [True, False]
    prepare_real.write_splits(words, {"train": 2, "test": 1}, tmp_path / "out")
    sizes = {name: len(pd.read_parquet(tmp_path / "out" / f"{name}.parquet")) for name in ("train", "test")}
    assert sizes == {"train": 2, "test": 1}


def test_a_package_that_is_missing_or_another_is_refused() -> None:
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        prepare_real.packaged("no_such_package", "file", "")
    with pytest.raises(SystemExit, match="is not the file that this was written for"):
        prepare_real.packaged("torch", "__init__.py", "0")
