"""The rule for classes, without a trainer."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.adam_metric import AdamMetric
from hf_poprisk.leave_one_out import TABLE_NAME, ClassNoise, ExampleTable, PairNoise
from hf_poprisk.leave_one_out.judge import RULE, Visit
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.weights import competent
from hf_poprisk.per_example import SelfInfluence


def test_a_padding_copy_counts_once() -> None:
    """Ranks that run out of examples repeat some; the copies' rows come back from the gathering."""
    seen = []
    for copies in (1, 3):
        judge = ClassNoise("audit", ExampleTable(np.arange(8)))
        theta = nn.Parameter(torch.linspace(-1, 1, 8))
        optimizer = torch.optim.AdamW([theta], lr=0.1)
        for rows in ([1, 3, 5], [5, 0, 3]):
            influence = SelfInfluence(AdamMetric(optimizer), 3)
            with judge.visit(torch.tensor(rows), influence):
                logits = torch.stack([torch.zeros(3), theta[rows]], 1)
                loss = F.cross_entropy(logits, torch.ones(3, dtype=torch.int64))
            loss.backward()
            influence.add(theta, 0, torch.diag(theta.grad)[rows])
            judge.finish_step(lambda x, n=copies: x.repeat(n, 1).flip(0))
            optimizer.step()
            optimizer.zero_grad()
        seen.append(judge.table)
    assert seen[0].visits.tolist() == seen[1].visits.tolist() == [1, 1, 0, 2, 0, 2, 0, 0]
    for name, column in seen[0].columns.items():
        assert torch.equal(column, seen[1].columns[name]), name
    assert seen[0].columns["self_influence"][[0, 3, 5]].min() > 0.01


def test_half_of_the_self_influence_stays() -> None:
    judge = ClassNoise("audit", ExampleTable(np.arange(1)))
    for visits in (1, 2, 3):
        visit = Visit(
            torch.tensor([0]),
            SimpleNamespace(energy=torch.tensor([0.2])),
            SimpleNamespace(slopes=torch.tensor([-0.5]), log_odds=torch.tensor([1.0])),
            torch.tensor([1.0]),
            torch.tensor([1.0]),
        )
        judge._pending = [visit]
        judge.finish_step(lambda rows: rows)  # z rose by 0.2/0.5
        assert judge.table.columns["self_influence"].item() == pytest.approx(0.5 * 0.4 * visits, rel=1e-5)


def test_an_older_rule_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ClassNoise("audit", ExampleTable(np.arange(4)))
    one.save(tmp_path)
    one.load(tmp_path)
    with pytest.raises(ValueError, match="another rule"):
        PairNoise("audit", ExampleTable(np.arange(4))).load(tmp_path)
    monkeypatch.setattr("hf_poprisk.leave_one_out.judge.RULE", RULE + 1)
    with pytest.raises(ValueError, match="another rule, of an earlier version"):
        one.load(tmp_path)
    (tmp_path / TABLE_NAME).rename(tmp_path / "label_noise.json")  # as versions left that wrote two files
    with pytest.raises(ValueError, match="was judged by an earlier version, from which this one cannot go"):
        one.load(tmp_path)


def test_who_predicts_nothing_judges_nobody() -> None:
    """As long as labels are predicted by chance no class is weighted; whatever the rate is."""
    rng, rows = np.random.default_rng(1), torch.arange(400)
    judge = ClassNoise("weight", ExampleTable(np.arange(400)))
    for epoch in (1.0, 2.0, 3.0):
        judge.table.visit(rows, log_odds=torch.tensor(rng.choice([-1.0, 1.0], 400)))
        judge.maybe_fit(epoch, int(10 * epoch))
    assert not competent(judge.fits[-1]) and judge.judging_since is None
    z = torch.linspace(2.0, 8.0, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    z = torch.where(rows < 80, -z, z)
    for epoch in (4.0, 5.0):
        judge.table.visit(rows, log_odds=z)
        judge.maybe_fit(epoch, int(10 * epoch))
    assert judge.judging_since == 50  # it rose by more than a little from the third epoch to the fourth

    def weights() -> Tensor:
        visit = Visit(rows, None)
        judge.sample_weight(visit, z, 2)
        return visit.weight

    assert weights()[:80].max() < 0.3 < 0.9 < weights()[80:].min()
    judge.fits.append(replace(judge.fits[-1], rate=MAX_RATE, low=MAX_RATE))
    assert weights()[:80].max() < 0.3  # so much noise may be true
    judge.fits.append(replace(judge.fits[-1], log_likelihood=-math.log(2)))
    assert torch.equal(weights(), torch.ones(400))
