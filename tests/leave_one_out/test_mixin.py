"""Labels that may be wrong: the log-odds in a loss, the noise fit, the table, the rule, the trainers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from models import preferences
from test_trainer import Scaler
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

import hf_poprisk
from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.checkpoints import damage
from hf_poprisk.influence import Influence
from hf_poprisk.leave_one_out import INDEX, TABLE_NAME, ExampleTable, LabelNoise, NoiseFit, fit_noise
from hf_poprisk.leave_one_out.index import other_row, take_sample
from hf_poprisk.leave_one_out.judge import _Visit
from hf_poprisk.leave_one_out.log_odds import LogOddsError, LogOddsTap, class_log_odds
from hf_poprisk.leave_one_out.mixin import IndexCollator, with_index
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.weights import FITS_NAME, competent, load_fits

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "poprisk_gate": "none",
}
LABELS = 3


class Classifier(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, LABELS)).to(dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def examples(count: int = 24, wrong: float = 0.0, seed: int = 0) -> list[dict[str, Tensor]]:
    """Three well separated clouds; the first ``wrong · count`` labels are of another one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % LABELS
    x = torch.randn(count, 6, generator=generator) + 2.0 * F.one_hot(labels, 6)
    labels[: round(wrong * count)] = (labels[: round(wrong * count)] + 1) % LABELS
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def classify(tmp_path: Path, data: Any, model: nn.Module | None = None, **options: Any) -> PopRiskTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        **QUIET,
        **options,
    }
    args = PopRiskTrainingArguments(str(tmp_path), **settings)
    return PopRiskTrainer(Classifier() if model is None else model, args=args, train_dataset=data)


def prefer(kind: str, folder: str | Path, tmp_path: Path, data: Any = None, **options: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-3}
    args = getattr(hf_poprisk, f"PopRisk{kind}Config")(
        str(tmp_path), bf16=False, gradient_checkpointing=False, **{**settings, **QUIET, **options}
    )
    trainer = getattr(hf_poprisk, f"PopRisk{kind}Trainer")
    return trainer(str(folder), args=args, train_dataset=preferences(16) if data is None else data)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# -- the log-odds in a loss -----------------------------------------------------------------------------


def test_class_log_odds_are_those_of_the_softmax() -> None:
    logits, labels = torch.randn(50, 7, dtype=torch.float64) * 3, torch.arange(50) % 7
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(class_log_odds(logits, labels), (p / (1 - p)).log())
    labels[3] = -100
    assert class_log_odds(logits, labels).isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("preferences_", [True, False])
def test_a_weight_multiplies_the_examples_gradient(preferences_: bool) -> None:
    x = torch.randn(5, requires_grad=True) if preferences_ else torch.randn(5, 4, requires_grad=True)
    labels, weight = torch.arange(5) % 4, torch.linspace(0, 1, 5)

    def loss(x: Tensor) -> Tensor:
        return -3 * F.logsigmoid(x).mean() if preferences_ else 3 * F.cross_entropy(x, labels)

    rows = -F.logsigmoid(x) if preferences_ else F.cross_entropy(x, labels, reduction="none")
    (expected,) = torch.autograd.grad(3 * (weight * rows).mean(), x)
    with (tap := LogOddsTap(preferences_, lambda z, k: weight)):
        value = loss(x)
    (got,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(value, loss(x))  # the loss is reported as it is
    z = x.detach() if preferences_ else class_log_odds(x.detach(), labels)
    torch.testing.assert_close(tap.log_odds, z)
    torch.testing.assert_close(tap.slopes, -3 * weight * torch.sigmoid(-z) / 5)
    assert tap.num_labels == (2 if preferences_ else 4)


def test_a_negative_strength_trains_the_swapped_pair() -> None:
    z = torch.tensor([-3.0, 0.0, 2.0, 30.0, 70.0], dtype=torch.float64, requires_grad=True)
    strength = torch.tensor([-1.0, -0.5, 0.25, -0.3, -0.2], dtype=torch.float64)
    swapped = torch.where(strength < 0, -F.logsigmoid(-z), -F.logsigmoid(z))
    (expected,) = torch.autograd.grad((strength.abs() * swapped).sum(), z)
    with LogOddsTap(True, lambda z, k: strength):
        (got,) = torch.autograd.grad(-F.logsigmoid(z).sum(), z)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "preferences_", "message"),
    [
        (lambda x: F.logsigmoid(x[:, 0]) + F.logsigmoid(-x[:, 0]), True, "more than one log-probability"),
        (lambda x: F.logsigmoid(x), True, "not one per pair"),
        (lambda x: F.cross_entropy(x, torch.zeros(3).long(), weight=torch.ones(4)), False, "class weights"),
        (lambda x: F.cross_entropy(x, torch.zeros(3).long(), torch.ones(4)), False, "class weights"),
        (
            lambda x: F.cross_entropy(x, torch.zeros(3).long(), label_smoothing=0.1),
            False,
            "label smoothing",
        ),
        (lambda x: F.cross_entropy(x[None], torch.zeros(1, 4).long()), False, "not \\[examples, labels\\]"),
    ],
)
def test_a_loss_of_more_than_its_log_odds_is_refused(loss: Any, preferences_: bool, message: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    tap = LogOddsTap(preferences_, lambda z, k: torch.ones_like(z))
    with pytest.raises(LogOddsError, match=message), tap:
        loss(x)


# -- the noise fit --------------------------------------------------------------------------------------


def drawn(count: int, rate: float, labels: int, tau: float = 1.0, seed: int = 0) -> tuple[Any, Any]:
    """ζ of calibrated predictions (after ``tau``), and which label was replaced."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, labels)) * 4
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    true = (p.cumsum(1) > rng.random((count, 1))).argmax(1)
    wrong = rng.random(count) < rate
    observed = np.where(wrong, (true + rng.integers(1, labels, count)) % labels, true)
    q = p[np.arange(count), observed]
    c = math.log(labels - 1)
    return (np.log(q / (1 - q)) + c) / tau - c, wrong


@pytest.mark.parametrize("labels", [2, 10])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.4])
def test_the_fit_finds_the_rate_and_the_scale(rate: float, labels: int) -> None:
    zeta, wrong = drawn(8000, rate, labels, tau=0.5)
    fit = fit_noise(zeta, labels)
    # with more than two labels the scale is bounded, not estimated, and what is ambiguous counts as wrong
    assert -0.02 < fit.rate - wrong.mean() < (0.02 if labels == 2 else 0.06)
    assert fit.tau == pytest.approx(0.5, rel=0.15) if labels == 2 else fit.tau <= 3.001
    assert fit.high - fit.low < 0.08 or rate == 0.4
    assert not fit.capped
    weight = fit.probability_right(torch.tensor(zeta)).numpy()
    assert weight.mean() == pytest.approx(1 - wrong.mean(), abs=0.03 if labels == 2 else 0.08)
    for low, high in ((0, 0.2), (0.4, 0.6), (0.8, 1.01)):  # calibrated
        inside = (weight >= low) & (weight < high)
        if inside.sum() > 300 and labels == 2:
            assert 1 - wrong[inside].mean() == pytest.approx(weight[inside].mean(), abs=0.06)


def test_the_interval_covers_the_rate() -> None:
    inside = [
        fit.low <= 0.25 <= fit.high
        for fit in (fit_noise(drawn(600, 0.25, 2, seed=seed)[0]) for seed in range(40))
    ]
    assert 33 <= sum(inside) <= 40


@pytest.mark.parametrize("labels", [2, 5])
def test_the_rate_is_the_posterior_median(labels: int) -> None:
    """Against plain sums over a fine grid that takes every example as it is."""
    zeta, _ = drawn(60, 0.3, labels)
    c, scale = math.log(labels - 1), 1 / np.median(np.abs(zeta)) if labels == 2 else 1.0
    taus = np.geomspace(0.05 * scale, 50 * scale if labels == 2 else 3.0, 200)
    rates = np.linspace(0, MAX_RATE, 200)
    q = 1 / (1 + np.exp(-(taus[:, None] * (zeta + c) - c)))
    total = np.array([np.log((1 - e) * q + e * (1 - q) / (labels - 1)).sum(1) for e in rates])
    posterior = np.exp(total - total.max()).sum(1)
    posterior /= posterior.sum()
    fit = fit_noise(zeta, labels)
    below = [posterior[rates <= end].sum() for end in (fit.low, fit.rate, fit.high)]
    assert below == pytest.approx([0.025, 0.5, 0.975], abs=0.015)
    here = total[np.abs(rates - fit.rate).argmin()]
    assert fit.log_likelihood == pytest.approx(here.max() / 60, abs=1e-3)
    assert fit.tau == pytest.approx(taus[here.argmax()], rel=0.2)


@pytest.mark.parametrize("rate", [0.002, 0.3])
def test_many_examples_are_fitted_as_few_are(rate: float) -> None:
    """In one go, although their ζ are binned; few wrong labels among many are found as well."""
    zeta, wrong = drawn(100_000, rate, 2)
    few, many = fit_noise(zeta[:2000]), fit_noise(zeta)
    assert many.low <= wrong.mean() <= many.high and many.rate == pytest.approx(wrong.mean(), rel=0.2)
    assert many.tau == pytest.approx(1.0, rel=0.05)
    if rate > 0.1:
        assert (few.high - few.low) / (many.high - many.low) == pytest.approx(50**0.5, rel=0.2)


@pytest.mark.parametrize(("rate", "off"), [(0.2, 0.02), (0.3, 0.03), (0.4, 0.07)])
def test_a_flat_likelihood_is_not_read_off_at_its_top(rate: float, off: float) -> None:
    """Of 512 pairs: over many draws the estimates lie around the rate, and none at zero."""
    fits = [fit_noise(drawn(512, rate, 2, seed=seed)[0]) for seed in range(40)]
    rates = np.array([fit.rate for fit in fits])
    assert rates.mean() == pytest.approx(rate, abs=off) and rates.min() > 0.1
    assert sum(fit.low <= rate <= fit.high for fit in fits) >= 36


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_no_scale_of_the_log_odds_is_too_small_or_too_large(size: float) -> None:
    zeta = (size * drawn(512, 0.3, 2)[0]).astype(np.float32)
    fit = fit_noise(zeta)
    assert fit.rate == pytest.approx(0.3, abs=0.06)
    weight = fit.probability_right(torch.from_numpy(zeta))
    assert weight.isfinite().all() and weight.min() < 0.1 < 0.9 < weight.max()
    assert fit_noise(np.full(3, 1e-38, np.float32)).open_ended


def test_without_a_sign_every_rate_is_as_likely() -> None:
    fit = fit_noise(np.zeros(100))
    assert [fit.low, fit.rate, fit.high] == pytest.approx([0.025 * MAX_RATE, MAX_RATE / 2, 0.975 * MAX_RATE])
    assert fit.open_ended and not fit.capped


def test_at_a_rate_of_zero_every_label_is_right() -> None:
    fit = NoiseFit(0.0, 0.0, 0.1, 1000.0, 2, -0.1, 100)
    assert fit.probability_right(torch.tensor([-300.0, 0.0, 5.0])).tolist() == [1.0] * 3


def test_the_posterior_is_bayes_rule() -> None:
    fit = fit_noise(drawn(2000, 0.3, 4)[0], 4)
    zeta = torch.tensor([-30.0, -2.0, 0.0, 3.0, 500.0], dtype=torch.float64)
    q = torch.sigmoid(fit.tau * (zeta + math.log(3)) - math.log(3))
    right, wrong = (1 - fit.rate) * q, fit.rate * (1 - q) / 3
    torch.testing.assert_close(fit.probability_right(zeta), right / (right + wrong))


def test_where_no_label_is_contradicted_the_rate_is_next_to_nothing() -> None:
    fit = fit_noise(np.linspace(0.5, 4.0, 1000))
    assert fit.low < 1e-3 and fit.rate < 2e-3 and fit.high < 5e-3 and fit.tau > 5
    assert fit.probability_right(torch.tensor([0.5, 1.0, 4.0])).min() > 0.999


def test_nothing_to_learn_from_leaves_the_rate_open() -> None:
    fit = fit_noise(np.random.default_rng(0).choice([-1.0, 1.0], 4000))
    assert fit.low < 0.05 and fit.open_ended and fit.high <= MAX_RATE and not competent(fit)
    with pytest.raises(ValueError, match="at least one example"):
        fit_noise(np.array([]))
    with pytest.raises(ValueError, match="finite"):
        fit_noise(np.array([1.0, math.nan]))


# -- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["range", "shuffled", "stream"])
def test_rows_are_found_by_the_index(ids: str, tmp_path: Path) -> None:
    known = np.arange(50) if ids == "range" else np.random.default_rng(0).permutation(10_000)[:50] - 7
    table = ExampleTable(None if ids == "stream" else known)
    for start in range(0, 50, 10):
        index = torch.tensor(known[start : start + 10]).flip(0)
        rows = table.rows(index)
        assert len(rows.unique()) == 10 and torch.equal(table.ids[rows], index)
        table.visit(rows, logodds=index.float(), loss_mean=torch.ones(10))
    table.visit(table.rows(torch.tensor(known[:1])), loss_mean=torch.tensor([4.0]), logodds=torch.zeros(1))
    table.save(tmp_path / TABLE_NAME)
    saved = Dataset.from_parquet(str(tmp_path / TABLE_NAME), keep_in_memory=True)
    by_id = {row[INDEX]: row for row in saved}
    assert set(by_id) == set(known.tolist()) and by_id[known[7]]["logodds"] == known[7]
    assert by_id[known[0]]["visits"] == 2 and by_id[known[0]]["loss_mean"] == 2.5
    assert by_id[known[0]]["weight"] == 1.0

    other = ExampleTable(None if ids == "stream" else known)
    other.load(tmp_path / TABLE_NAME)
    assert torch.equal(other.ids, table.ids) and np.array_equal(other.heldout(), table.heldout())
    assert torch.equal(other.rows(table.ids), torch.arange(50))
    for name, column in table.columns.items():
        assert torch.equal(column[:50], other.columns[name][:50])


def test_a_wrong_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be unique, and 5 is there more than once"):
        ExampleTable(np.array([3, 5, 5]))
    table = ExampleTable(np.array([3, 9, 5]))
    with pytest.raises(KeyError, match="4 is not in the training set"):
        table.rows(torch.tensor([3, 4]))
    table.save(tmp_path / TABLE_NAME)
    with pytest.raises(ValueError, match="resume with the same data"):
        ExampleTable(np.array([3, 9, 6])).load(tmp_path / TABLE_NAME)


def test_a_million_examples(tmp_path: Path) -> None:
    n = 1_000_000
    table = ExampleTable(np.random.default_rng(0).permutation(n) + 10**12)
    index = table.ids[torch.randint(n, (64,))].unique()
    table.visit(table.rows(index), heldout_logodds=torch.arange(len(index)).float())
    assert sorted(table.heldout().tolist()) == list(range(len(index)))
    assert sum(x.numel() * x.element_size() for x in (table.visits, *table.columns.values())) <= 28 * n
    table.save(tmp_path / TABLE_NAME)
    other = ExampleTable(table.ids.numpy())
    other.load(tmp_path / TABLE_NAME)
    assert torch.equal(other.visits, table.visits)
    zeta, wrong = drawn(n, 0.2, 2)
    assert fit_noise(zeta).rate == pytest.approx(wrong.mean(), abs=0.005)


# -- the index in the data ------------------------------------------------------------------------------


def test_an_index_of_the_users_is_kept() -> None:
    data = Dataset.from_dict({"a": list(range(8)), INDEX: list(range(100, 108))}).shuffle(0).select(range(5))
    same_data, ids = with_index(data)
    assert same_data is data and ids.tolist() == data[INDEX]
    added, ids = with_index(Dataset.from_dict({"a": [1, 2, 3]}))
    assert added[INDEX] == ids.tolist() == [0, 1, 2]
    listed, ids = with_index([{"a": 1}, {"a": 2}])
    assert listed[1] == {"a": 2, INDEX: 1} and len(listed) == 2
    with pytest.raises(ValueError, match="must hold integers"):
        with_index(Dataset.from_dict({INDEX: ["a", "b"]}))


def test_a_stream_needs_an_index() -> None:
    stream = Dataset.from_dict({"a": [1]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="needs a column example_index in a streamed"):
        with_index(stream)
    with pytest.raises(ValueError, match="finds no example_index in the training examples"):
        IndexCollator(list)([{"a": 1}])
    assert with_index(Dataset.from_dict({INDEX: [1]}).to_iterable_dataset())[1] is None


# -- the trainers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_audit_changes_nothing_in_training(gate: str, tmp_path: Path) -> None:
    seen = []
    for mode in ("off", "audit"):
        trainer = classify(tmp_path, examples(), poprisk_label_noise=mode, poprisk_gate=gate)
        if mode == "audit":
            judged_from(trainer, 6)
        trainer.train()
        seen.append(weights(trainer))
    assert trainer._label_noise.table.columns["weight"].min() < 0.9  # that it would have given
    # the weight gradient of one token is one product without the scores and a sum of products with them
    for name, value in seen[0].items():
        torch.testing.assert_close(value, seen[1][name], rtol=1e-4, atol=2e-5 if gate == "none" else 0.02)


def test_the_table_follows_the_textbook(tmp_path: Path) -> None:
    """Two epochs of a classifier in float64, against a loop that knows nothing of the package."""
    data = [{"x": e["x"].double(), "labels": e["labels"]} for e in examples(8)]
    options = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0.3}
    trainer = classify(
        tmp_path, data, Classifier(torch.float64), poprisk_label_noise="audit", weight_decay=0.0, **options
    )
    trainer.train()
    got = trainer._label_noise.table

    model = Classifier(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    own, heldout, z_last, losses, agreements = (torch.zeros(8, dtype=torch.float64) for _ in range(5))
    coefficient = 1.0  # of the step before, as this one's is not known yet
    step = 0
    for _ in range(2):
        for first in (0, 4):
            norms = []
            for i in range(first, first + 4):
                z = class_log_odds(model(data[i]["x"][None])["logits"], data[i]["labels"][None])[0]
                slopes = torch.autograd.grad(z, list(model.parameters()))
                s = agreement = 0.0
                bound = ((1 - 0.999 ** (step + 1)) / 0.001) ** 0.5
                error = torch.sigmoid(-z).item()
                for p, slope in zip(model.parameters(), slopes, strict=True):
                    state = optimizer.state.get(p)
                    v = state["exp_avg_sq"] / (1 - 0.999**step) if state else torch.zeros_like(p)
                    m = state["exp_avg"] / (1 - 0.9**step) if state else torch.zeros_like(p)
                    h = -error / 4 * slope
                    s += (slope * (coefficient * h / (v.sqrt() + 1e-8)).clamp(-bound, bound)).sum().item()
                    agreement += coefficient * (h * m / (v.sqrt() + 1e-8)).sum().item()
                heldout[i], z_last[i] = z.item() - own[i], z.item()
                own[i] -= 0.5 * 1e-2 * s
                losses[i] += F.softplus(-z).item() / 2
                agreements[i] += agreement / 2
            optimizer.zero_grad()
            batch = {k: torch.stack([e[k] for e in data[first : first + 4]]) for k in data[0]}
            model(**batch)["loss"].backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))
            coefficient = min(1.0, 0.3 / (norms[0].item() + 1e-6))
            optimizer.step()
            step += 1
    assert coefficient < 1 and got.visits.tolist() == [2] * 8
    for name, expected in (
        ("logodds", z_last),
        ("heldout_logodds", heldout),
        ("own_effect", own),
        ("loss_mean", losses),
        ("agreement_mean", agreements),
    ):
        torch.testing.assert_close(got.columns[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert (own.abs() > 1e-3).all()


def test_a_padding_copy_counts_once() -> None:
    """Ranks that run out of examples repeat some; the copies' rows come back from the gathering."""
    seen = []
    for copies in (1, 3):
        judge = LabelNoise("audit", True, ExampleTable(np.arange(8)))
        theta = nn.Parameter(torch.linspace(-1, 1, 8))
        optimizer = torch.optim.AdamW([theta], lr=0.1)
        for rows in ([1, 3, 5], [5, 0, 3]):
            influence = Influence(optimizer, 3)
            with judge.visit(torch.tensor(rows), influence):
                loss = -F.logsigmoid(theta[rows]).mean()
            loss.backward()
            influence.add_some(theta, 0, torch.diag(theta.grad)[rows])
            judge.finish_step(lambda x, n=copies: x.repeat(n, 1).flip(0))
            optimizer.step()
            optimizer.zero_grad()
        seen.append(judge.table)
    assert seen[0].visits.tolist() == seen[1].visits.tolist() == [1, 1, 0, 2, 0, 2, 0, 0]
    for name, column in seen[0].columns.items():
        assert torch.equal(column, seen[1].columns[name]), name
    assert seen[0].columns["own_effect"][[0, 3, 5]].min() > 0.01


def judged_from(trainer: Any, fits_at: int) -> None:
    """Let weights be given from a step on, whatever the likelihood does."""
    judge, fit = trainer._label_noise, trainer._label_noise.maybe_fit

    def maybe_fit(epoch: float, step: int) -> None:
        fit(epoch, step)
        if step >= fits_at and judge.fits:
            judge.judging_since = judge.judging_since or step
            # tiny models predict nothing
            sure = replace(judge.fits[-1], rate=0.4, low=0.4, high=0.42, log_likelihood=-0.5, exact=True)
            judge.fits[0], judge.fits[-1] = sure, replace(sure, rate=0.1)

    judge.maybe_fit = maybe_fit


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
@pytest.mark.parametrize("mode", ["weight", "swap"])
def test_pairs_are_weighted_by_their_posterior(kind: str, mode: str, llama_dir: Path, tmp_path: Path) -> None:
    trainer = prefer(kind, llama_dir, tmp_path, poprisk_label_noise=mode, num_train_epochs=2)
    judged_from(trainer, 4)
    taps: list[Any] = []
    book = trainer._label_noise._booked
    trainer._label_noise._booked = lambda visit, share: (taps.append(visit), book(visit, share))[1]
    trainer.train()
    judge = trainer._label_noise
    assert len(judge.fits) >= 2 and judge.judging_since == 4
    first, later = taps[0], taps[-1]
    assert torch.equal(first.weight, torch.ones(4))
    by = judge.fits[-2 if judge.fits[-1].step == 8 else -1]
    expected = replace(by, rate=0.4).probability_right(later.heldout)  # that of the first visits
    torch.testing.assert_close(later.weight, expected)
    z = later.tap.log_odds
    strength = expected if mode == "weight" else 2 * expected - 1
    slope = torch.where(strength < 0, strength.abs() * torch.sigmoid(z), -strength * torch.sigmoid(-z))
    torch.testing.assert_close(later.tap.slopes, slope / 4, rtol=1e-4, atol=1e-6)
    sample = json.loads((tmp_path / FITS_NAME).read_text())["sample"]
    assert len(sample) == 16 and {"prompt", "chosen", "rejected"} <= set(
        sample["0"]
    )  # before they are tokens
    logs = [entry for entry in trainer.state.log_history if "poprisk/weight_mean" in entry]
    assert logs and ("poprisk/swapped" in logs[-1]) == (mode == "swap")
    assert logs[-1]["poprisk/noise_rate_low"] <= logs[-1]["poprisk/noise_rate"]


@pytest.mark.parametrize("mode", ["weight", "swap"])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_weighted_loss_is_logged_beside_the_plain_one(
    mode: str, logging_steps: int, llama_dir: Path, tmp_path: Path
) -> None:
    trainer = prefer(
        "DPO",
        llama_dir,
        tmp_path,
        poprisk_label_noise=mode,
        num_train_epochs=3,
        learning_rate=3e-2,
        logging_steps=logging_steps,
    )
    judged_from(trainer, 4)
    seen: list[Any] = []
    book = trainer._label_noise._booked
    trainer._label_noise._booked = lambda visit, share: (seen.append(visit), book(visit, share))[1]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 12 // logging_steps
    for k, entry in enumerate(logs):
        visits = seen[k * logging_steps : (k + 1) * logging_steps]
        z, weight = torch.cat([v.tap.log_odds for v in visits]), torch.cat([v.weight for v in visits])
        if mode == "weight":
            losses = -weight * F.logsigmoid(z)
        else:
            losses = -torch.where(
                weight < 0.5, (1 - 2 * weight) * F.logsigmoid(-z), (2 * weight - 1) * F.logsigmoid(z)
            )
        assert entry["poprisk/loss_weighted"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert entry["loss"] == pytest.approx(-F.logsigmoid(z).mean().item(), abs=2e-4)
    assert logs[0]["poprisk/loss_weighted"] == pytest.approx(logs[0]["loss"], abs=2e-4)
    assert abs(logs[-1]["poprisk/loss_weighted"] - logs[-1]["loss"]) > 0.05  # it is the weights' doing


def test_an_audit_weighs_no_loss_and_an_older_interval_is_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "max_steps": 4}
    classify(tmp_path / "audit", examples(), poprisk_label_noise="audit", **options).train()
    assert "loss_weighted" not in (tmp_path / "audit/checkpoint-4/trainer_state.json").read_text()
    options |= {"poprisk_label_noise": "weight"}
    whole = classify(tmp_path / "run", examples(), **options)
    whole.train()
    resumed = classify(tmp_path / "run", examples(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    logged = [t.state.log_history[-2]["poprisk/loss_weighted"] for t in (whole, resumed)]
    assert logged[0] == logged[1]  # over a step before the checkpoint and one after it
    path = tmp_path / "run/checkpoint-3" / FITS_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"interval": [4.0, 4.0, 0.0]}))
    resumed = classify(tmp_path / "run", examples(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert resumed.state.log_history[-2]["poprisk/loss_weighted"] != logged[0]


def test_the_layout_does_not_matter(llama_dir: Path, tmp_path: Path) -> None:
    """One by one, four in a backward, or accumulated: the same scores, weights and parameters."""
    seen = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = prefer(
            "DPO",
            llama_dir,
            tmp_path,
            poprisk_label_noise="weight",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            disable_dropout=True,
        )
        judged_from(trainer, 2)
        trainer.train()
        seen.append((trainer._label_noise.table, weights(trainer), trainer._label_noise.fits))
    for table, params, fits in seen[1:]:
        for name, column in seen[0][0].columns.items():
            torch.testing.assert_close(table.columns[name], column, rtol=1e-2, atol=1e-3, msg=name)
        for name, value in seen[0][1].items():
            torch.testing.assert_close(params[name], value, rtol=0, atol=1e-4, msg=name)
        assert [f.step for f in fits] == [f.step for f in seen[0][2]]
    assert seen[0][0].columns["weight"].min() < 0.99


def test_one_by_one_where_a_layer_cannot_be_told_apart(tmp_path: Path) -> None:
    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(LABELS))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(x) * self.scale
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    seen = []
    for model in (Odd(), Classifier()):
        trainer = classify(
            tmp_path,
            examples(),
            model,
            poprisk_label_noise="audit",
            train_sampling_strategy="sequential",
            num_train_epochs=1,
        )
        trainer.train()
        assert (trainer._layers is None) == isinstance(model, Odd)
        seen.append(trainer._label_noise.table)
    torch.testing.assert_close(seen[0].columns["logodds"][:4], seen[1].columns["logodds"][:4])
    assert seen[0].visits.tolist() == [1] * 24 and (seen[0].columns["own_effect"] > 0).all()


def test_wrong_labels_are_found(tmp_path: Path) -> None:
    data = examples(240, wrong=0.25, seed=3)
    trainer = classify(
        tmp_path,
        data,
        poprisk_label_noise="weight",
        per_device_train_batch_size=16,
        num_train_epochs=8,
        max_grad_norm=0.0,
    )
    trainer.train()
    judge = trainer._label_noise
    assert judge.judging_since is not None and judge.judging_since > 15
    assert 0.15 < judge.fits[-1].rate < 0.35
    suspicion = -judge.table.columns["heldout_logodds"]
    ranks = suspicion.argsort().argsort().float()
    auroc = (ranks[:60].sum() - 60 * 59 / 2) / (60 * 180)
    assert auroc > 0.9
    weight = judge.table.columns["weight"]
    assert weight[:60].mean() < 0.3 < 0.8 < weight[60:].mean()
    saved = [entry for entry in trainer.state.log_history if "poprisk/noise_rate" in entry]
    assert saved[-1]["poprisk/noise_rate"] == judge.fits[-1].rate


@pytest.mark.parametrize(
    ("options", "ungated"),
    [
        ({"poprisk_gate": "none"}, "all"),
        ({"poprisk_gate": "hard"}, "none"),
        ({"poprisk_gate": "hard", "poprisk_warmup_steps": 2}, "two steps"),
        ({"poprisk_gate": "hard", "poprisk_exclude": ["net.0"]}, "some"),
    ],
)
def test_the_gate_holds_back_own_effects_too(options: Any, ungated: str, tmp_path: Path) -> None:
    """By the share of coordinates that the step itself writes."""
    trainer = classify(
        tmp_path, examples(), weight_decay=0.0, poprisk_label_noise="audit", num_train_epochs=1, **options
    )
    judge, used, moved = trainer._label_noise, [], []
    finish, before = judge.finish_step, weights(trainer)

    def finish_step(gather: Any, open_share: Any) -> None:
        own = judge.table.columns["own_effect"].clone()
        plain = [judge._booked(visit, 1.0)[:, [0, 4]] for visit in judge._pending]
        finish(gather, open_share)
        used.append(float(open_share))
        rows, effects = torch.cat(plain).unbind(1)
        got = (judge.table.columns["own_effect"] - own)[rows.long()]
        torch.testing.assert_close(got.double(), 0.5 * float(open_share) * effects, rtol=1e-4, atol=1e-7)

    class Moved(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = weights(trainer)
            changed = [(now[name] != before[name]).double().flatten() for name in now]
            moved.append(torch.cat(changed).mean().item())
            before.update(now)

    judge.finish_step = finish_step
    trainer.add_callback(Moved())
    trainer.train()
    assert len(used) == 6
    if ungated in ("all", "two steps"):
        assert used[:2] == [1.0, 1.0] and (ungated == "two steps" or used == [1.0] * 6)
    if ungated != "all":
        assert used[2:] == pytest.approx(moved[2:], abs=0.05) and max(used[2:]) < 0.95


@pytest.mark.parametrize("kind", ["classifier", "gated", "DPO"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    def build() -> Any:
        options = {
            "poprisk_label_noise": "weight",
            "save_strategy": "steps",
            "save_steps": 9,
            "logging_steps": 2,  # a log goes on over the checkpoint
            "num_train_epochs": 4 if kind == "DPO" else 7,
        }
        if kind == "DPO":
            return prefer("DPO", llama_dir, tmp_path, **options)
        return classify(
            tmp_path, examples(wrong=0.2), **options, poprisk_gate="soft" if kind == "gated" else "none"
        )

    whole, resumed = build(), build()
    whole.train()
    before = 9 if kind == "DPO" else 27
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{before}"))
    assert same(weights(whole), weights(resumed))
    one, other = whole._label_noise, resumed._label_noise
    if kind != "DPO":  # whose few pairs are all taken for right
        assert one.judging_since < before and one.table.columns["weight"].min() < 1
    assert one.fits == other.fits and len(one.fits) > 4 and one.judging_since == other.judging_since
    assert torch.equal(one.table.visits, other.table.visits)
    for name, column in one.table.columns.items():
        assert torch.equal(column, other.table.columns[name]), name
    logs = [[e for e in t.state.log_history if e["step"] > before and "loss" in e] for t in (whole, resumed)]
    assert [e.get("poprisk/weight_mean") for e in logs[0]] == [e.get("poprisk/weight_mean") for e in logs[1]]


def test_a_second_training_keeps_the_scores_and_goes_on(tmp_path: Path) -> None:
    trainer = classify(tmp_path, examples(), poprisk_label_noise="audit", num_train_epochs=2)
    trainer.train()
    first = trainer._label_noise.fits
    trainer.train()
    second = trainer._label_noise.fits
    assert trainer._label_noise.table.visits.tolist() == [4] * 24
    assert len(first) == 5 and [f.epoch for f in second] == [f.epoch for f in first] and second != first


def test_a_loss_scaler_changes_neither_own_effects_nor_gains(tmp_path: Path) -> None:
    plain, scaled = (
        classify(tmp_path, examples(), poprisk_label_noise="audit", poprisk_risk=True) for _ in range(2)
    )
    plain.train()
    Scaler(scaled)
    try:
        scaled.train()
    finally:
        scaled.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators
    one, other = (t._label_noise.table.columns["own_effect"] for t in (plain, scaled))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert one.abs().min() > 0.01
    for name in ("poprisk/gain_total", "poprisk/gain_empirical"):
        logs = [[e[name] for e in t.state.log_history if name in e] for t in (plain, scaled)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) > 10


def test_a_model_of_a_new_start_has_seen_nothing(tmp_path: Path) -> None:
    options = {**QUIET, "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}
    args = PopRiskTrainingArguments(str(tmp_path), poprisk_label_noise="audit", **options)
    trainer = PopRiskTrainer(args=args, train_dataset=examples(), model_init=Classifier)
    found = []
    for _ in range(2):
        trainer.train()
        found.append(trainer._label_noise)
    assert found[0].fits == found[1].fits and found[0] is not found[1]
    for name, column in found[0].table.columns.items():
        assert torch.equal(column, found[1].table.columns[name]), name


def test_the_scores_of_another_model_do_not_stay(tmp_path: Path) -> None:
    classify(tmp_path, examples(), poprisk_label_noise="audit").train()
    assert (tmp_path / FITS_NAME).exists() and (tmp_path / TABLE_NAME).exists()
    trainer = classify(tmp_path, examples(), max_steps=1)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / FITS_NAME).exists() and not (tmp_path / TABLE_NAME).exists()


def test_what_is_saved(tmp_path: Path) -> None:
    trainer = classify(
        tmp_path, examples(), poprisk_label_noise="audit", save_strategy="epoch", num_train_epochs=2
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-6", tmp_path / "checkpoint-12"):
        table = Dataset.from_parquet(str(folder / TABLE_NAME), keep_in_memory=True)
        assert table.column_names == [
            *(INDEX, "visits", "logodds", "heldout_logodds", "own_effect", "weight", "agreement_mean"),
            *("loss_mean", "suspicion"),
        ]
        assert table[INDEX] == list(range(24))
    assert [f.step for f in load_fits(tmp_path)] == [f.step for f in trainer._label_noise.fits]
    assert json.loads((tmp_path / "label_noise.json").read_text())["mode"] == "audit"
    assert json.loads((tmp_path / "poprisk_config.json").read_text())["label_noise"] == "audit"


def test_resuming_under_another_mode_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    classify(tmp_path, examples(), poprisk_label_noise="audit", **options).train()
    changed = classify(tmp_path, examples(), poprisk_label_noise="weight", **options)
    with pytest.raises(ValueError, match="would change poprisk_label_noise from 'audit' to 'weight'"):
        changed.train(resume_from_checkpoint=True)
    torn = tmp_path / "checkpoint-12" / TABLE_NAME
    torn.write_bytes(torn.read_bytes()[:-10])
    assert damage(torn.parent) == f"{TABLE_NAME} is cut off"
    for allow, said in ((False, "training examples from 24 to 32"), (True, "resume with the same data")):
        options["poprisk_allow_change"] = allow
        other = classify(tmp_path, examples(32), poprisk_label_noise="audit", **options)
        with pytest.raises(ValueError, match=said):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_resuming_with_other_rows_is_refused(tmp_path: Path) -> None:
    plain = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    numbered = plain.add_column(INDEX, list(range(100, 124)))
    for name, data in (("plain", plain), ("numbered", numbered)):
        options = {"save_strategy": "epoch", "num_train_epochs": 2, "poprisk_label_noise": "audit"}
        classify(tmp_path / name, data, **options | {"num_train_epochs": 1}).train()
        classify(tmp_path / name, data, **options).train(resume_from_checkpoint=True)
        shuffled = classify(tmp_path / name, data.shuffle(seed=0), **options)
        checkpoint = str(tmp_path / name / "checkpoint-6")
        if name == "numbered":
            shuffled._label_noise.load(checkpoint)
            table = shuffled._label_noise.table
            saved = Dataset.from_parquet(f"{checkpoint}/{TABLE_NAME}", keep_in_memory=True)
            known = dict(zip(saved[INDEX], saved["logodds"], strict=True))
            assert table.columns["logodds"].tolist() == [known[i] for i in table.ids.tolist()]
            shuffled.train(resume_from_checkpoint=checkpoint)
            assert shuffled._label_noise.table.visits.tolist() == [2] * 24
        else:
            with pytest.raises(ValueError, match="the training data are not those of .* has another x"):
                shuffled.train(resume_from_checkpoint=checkpoint)
            assert not shuffled._label_noise.table.visits.any()  # nothing of the others stays


def test_a_sample_knows_rows_in_another_order() -> None:
    data = Dataset.from_dict({INDEX: list(range(5, 5005)), "labels": [i % 2 for i in range(5000)]})
    shuffled = data.shuffle(seed=0)
    one, other = (take_sample(d, np.array(d[INDEX])) for d in (data, shuffled))
    assert one.keys() == other.keys() and len(one) == 64 and other_row(one, other) is None
    spoiled = shuffled.map(lambda row: {"labels": 1 - row["labels"]})
    assert other_row(one, take_sample(spoiled, np.array(spoiled[INDEX])))[1] == "labels"


def test_a_checkpoint_without_scores_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    classify(tmp_path, examples(), optim="adamw_torch", poprisk_gate="hard", **options).train()
    judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
    with pytest.raises(ValueError, match="holds no label_noise.json: its examples were trained on without"):
        judged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    options |= {"poprisk_allow_change": True, "num_train_epochs": 4}
    for checkpoint in (6, 12):  # and once more, from a checkpoint of its own
        judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
        judged.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert judged._label_noise.table.visits.tolist() == [3] * 24
        assert judged._label_noise.fits and not any(fit.exact for fit in judged._label_noise.fits)


def test_evaluation_sees_no_index(tmp_path: Path) -> None:
    data = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    data = data.add_column(INDEX, list(range(24)))
    args = PopRiskTrainingArguments(
        str(tmp_path),
        poprisk_label_noise="audit",
        eval_strategy="epoch",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        **QUIET,
    )
    trainer = PopRiskTrainer(Classifier(), args=args, train_dataset=data.shuffle(1), eval_dataset=data)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer._label_noise.table.visits.sum() == 24


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_an_ignored_label_leaves_the_others_alone(gate: str, tmp_path: Path) -> None:
    data = examples()
    data[5]["labels"] = torch.tensor(-100)
    trainer = classify(tmp_path, data, poprisk_label_noise="weight", poprisk_gate=gate)
    judged_from(trainer, 6)
    trainer.train()
    table = trainer._label_noise.table
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not any(e.get("poprisk/steps_skipped") for e in trainer.state.log_history)
    assert table.visits[5] == 0 and table.columns["weight"].min() < 0.9


def streamed(tmp_path: Path, **options: Any) -> PopRiskTrainer:
    """Six steps a pass."""
    rows = [
        {"x": e["x"].tolist(), "labels": int(e["labels"]), INDEX: 7 * i} for i, e in enumerate(examples())
    ]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    return classify(tmp_path, stream, poprisk_label_noise="audit", num_train_epochs=1, **options)


def test_a_stream_with_ids(tmp_path: Path) -> None:
    trainer = streamed(tmp_path, max_steps=18)
    trainer.train()
    table = trainer._label_noise.table
    assert table.ids.tolist() == [7 * i for i in range(24)] and table.visits[:24].tolist() == [3] * 24
    # once per pass, when its end is there
    assert [(f.epoch, f.step, f.exact) for f in trainer._label_noise.fits] == [
        (1, 6, True),
        (2, 12, False),
        (3, 18, False),
    ]


@pytest.mark.parametrize(
    ("accumulation", "max_steps", "steps"), [(1, 8, [6]), (3, 4, [2, 4]), (3, 5, [2, 4])]
)
def test_a_part_of_a_stream_is_no_pass(
    accumulation: int, max_steps: int, steps: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = streamed(tmp_path, gradient_accumulation_steps=accumulation, max_steps=max_steps)
    trainer.train()
    fits = trainer._label_noise.fits
    assert [(fit.epoch, fit.step) for fit in fits] == [(i, step) for i, step in enumerate(steps, 1)]
    cut = streamed(tmp_path, gradient_accumulation_steps=accumulation, max_steps=1)
    cut.train()
    assert not cut._label_noise.fits and "training ended within its first epoch" in caplog.text


def test_a_stream_is_resumed_within_its_first_pass_only(tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4}
    whole, resumed = streamed(tmp_path, **options), streamed(tmp_path, **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = whole._label_noise, resumed._label_noise
    assert (
        [(f.epoch, f.step) for f in one.fits] == [(f.epoch, f.step) for f in other.fits] == [(1, 6), (2, 12)]
    )
    assert torch.equal(one.table.visits, other.table.visits) and one.fits[0] == other.fits[0]
    with pytest.raises(ValueError, match="a stream that has been passed once is not resumed where it was"):
        streamed(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_warnings_say_what_the_numbers_are_not_worth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = classify(tmp_path, examples(), poprisk_label_noise="weight", max_steps=3)
    trainer.train()
    assert "training ended within its first epoch" in caplog.text
    judge = LabelNoise("audit", True, ExampleTable(np.arange(400)))
    judge.table.visit(
        torch.arange(400), heldout_logodds=torch.tensor(np.random.default_rng(1).choice([-1.0, 1.0], 400))
    )
    judge.maybe_fit(1.0, 10)

    def warning() -> str:
        caplog.clear()
        judge.warn_at_end(20)
        return caplog.text

    assert judge.judging_since == 10  # pairs need no second epoch
    assert not competent(judge.fits[-1]) and "predicted hardly better than by chance" in warning()
    judge.mode = "weight"
    assert "predicted hardly better than by chance, for want of training" in warning()
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
    assert (
        judge.fits[0].exact
        and "were predicted hardly better than by chance: the estimate, 0.282, may be far off" in warning()
    )
    judge.fits[0] = replace(judge.fits[0], low=0.2, high=0.4, log_likelihood=-0.6)
    assert "is not settled, and too low" in warning()
    judge.fits[0] = replace(judge.fits[0], high=0.44)
    assert "leave the noise rate open (0.200 to 0.440): the estimate, 0.282" in warning()
    judge.fits[0] = replace(judge.fits[0], low=0.05, high=0.4)
    assert "leave the noise rate open (0.050 to 0.400): the estimate, 0.282" in warning()
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
        f"{weights}; `python -m hf_poprisk.audit {tmp_path}` shows the examples." in caplog.text
    )
    assert any("poprisk/weight_mean" in e for e in trainer.state.log_history) == (mode == "weight")


def test_the_card_tells_evaluation_sets_apart_and_says_what_the_labels_were_found_to_be(
    llama_dir: Path, tmp_path: Path
) -> None:
    """TRL's metrics do not bear the name of their set, and the last set would stand for all of them."""
    args = hf_poprisk.PopRiskDPOConfig(
        str(tmp_path), bf16=False, poprisk_label_noise="audit", eval_strategy="epoch", **QUIET
    )
    data, flipped = preferences(16), preferences(8, 7)
    sets = {"test": data, "flipped": flipped.rename_columns({"chosen": "rejected", "rejected": "chosen"})}
    trainer = hf_poprisk.PopRiskDPOTrainer(str(llama_dir), args=args, train_dataset=data, eval_dataset=sets)
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    logged = {name: e for e in trainer.state.log_history for name in sets if f"eval_{name}_loss" in e}
    for name, entry in logged.items():
        assert found[name, "loss"] == entry[f"eval_{name}_loss"]
        assert found[name, "rewards/margins"] == entry["eval_rewards/margins"]
    assert logged["test"]["eval_rewards/margins"] != logged["flipped"]["eval_rewards/margins"]
    assert not any(metric.endswith(("runtime", "per_second")) for _, metric in found)
    assert f"{trainer._label_noise.found(trainer.state.global_step)}.\n" in card.text


def test_what_is_explained_is_none_at_chance_and_all_where_every_label_is_sure() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 10):
        wrong = rng.random(4000) < 0.3
        sure = fit_noise(np.where(wrong, -1.0, 1.0) * rng.uniform(3, 60, 4000), classes)
        assert sure.explained == pytest.approx(1.0, abs=0.02)
        logits = rng.normal(size=(4000, classes))  # whatever the label is, which is the first
        guessed = fit_noise(logits[:, 0] - np.log(np.exp(logits[:, 1:]).sum(1)), classes)
        assert guessed.explained < 0.1 and competent(sure) and not competent(guessed)
        by_luck = replace(sure, num_examples=2 if classes == 2 else 1)
        assert not competent(replace(by_luck, log_likelihood=-math.log(classes) + 0.5))
    nobody = NoiseFit(0.0, 0.0, 0.1, 1.0, 2, 0.0, 100)
    assert nobody.explained == 1.0


def test_pairs_are_judged_by_their_first_visits_at_least() -> None:
    """From the end of the first epoch; later estimates, of what was learned by heart, fall to zero."""
    rows, wrong, sure = torch.arange(400), torch.arange(400) < 120, torch.linspace(0.5, 8.0, 400)
    sure = sure[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    judges = [LabelNoise("weight", pairs, ExampleTable(np.arange(400))) for pairs in (True, False)]
    for epoch, sign in ((1.0, -1), (2.0, 1)):
        for judge in judges:
            judge.table.visit(rows, heldout_logodds=torch.where(wrong, sign * sure, sure))
            judge.maybe_fit(epoch, int(10 * epoch))
    pairs, classes = judges
    assert pairs.judging_since == 10 and classes.judging_since is None
    first, last = pairs.fits
    assert 0.25 < first.rate < 0.35 and last.rate < 0.01
    z = torch.tensor([-3.0, 0.0, 3.0])

    def weights() -> Tensor:
        visit = _Visit(torch.arange(3), None, None, None, None)
        pairs._strength(visit, z, 2)
        return visit.weight

    torch.testing.assert_close(weights(), replace(last, rate=first.rate).probability_right(z))
    assert pairs.pop_logs()["poprisk/noise_rate"] == first.rate
    assert pairs.pop_logs()["poprisk/noise_rate_low"] == first.low
    pairs.fits[0] = replace(first, exact=False)
    torch.testing.assert_close(weights(), last.probability_right(z))
    pairs.fits[:] = [first, replace(last, rate=0.4)]
    torch.testing.assert_close(weights(), replace(last, rate=0.4).probability_right(z))


def test_pairs_that_nothing_is_known_of_weigh_about_the_same() -> None:
    """They are judged all the same, and none is swapped: the posterior says by itself how little it knows."""
    judge = LabelNoise("swap", True, ExampleTable(np.arange(400)))
    z = torch.tensor(np.random.default_rng(1).choice([-1.0, 1.0], 400))
    judge.table.visit(torch.arange(400), heldout_logodds=z)
    judge.maybe_fit(1.0, 10)
    assert judge.judging_since == 10 and not competent(judge.fits[0]) and not judge.swaps
    visit = _Visit(torch.arange(3), None, None, None, None)
    strength = judge._strength(visit, torch.tensor([-1.0, 0.0, 1.0]), 2)
    assert torch.equal(strength, visit.weight) and 0.5 < strength.min() < strength.max() < 0.9
    assert strength.max() - strength.min() < 0.1


def test_only_what_is_predicted_well_is_swapped(caplog: pytest.LogCaptureFixture) -> None:
    """Else a pair weighs as much as it is likely to be right, and a warning says so."""
    judge = LabelNoise("swap", True, ExampleTable(np.arange(400)))
    z = torch.linspace(0.5, 8.0, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    judge.table.visit(torch.arange(400), heldout_logodds=torch.where(torch.arange(400) < 120, -z, z))
    judge.maybe_fit(1.0, 10)
    assert judge.fits[0].explained > 0.8 and judge.judging_since == 10

    def strengths() -> tuple[Tensor, Tensor]:
        visit = _Visit(torch.arange(3), None, None, None, None)
        return judge._strength(visit, torch.tensor([-3.0, 0.0, 3.0]), 2), visit.weight

    strength, weight = strengths()
    torch.testing.assert_close(strength, 2 * weight - 1)
    judge.warn_at_start()
    assert strength.min() < 0 and not caplog.text
    judge.fits[0] = replace(judge.fits[0], log_likelihood=-0.66)
    strength, weight = strengths()
    torch.testing.assert_close(strength, weight)
    judge.warn_at_start()
    assert f"not predicted well: {judge.fits[0].explained:.0%} of what can be known" in caplog.text
    sure = replace(judge.fits[0], log_likelihood=-0.61)
    for unsure in (replace(sure, exact=False), replace(sure, high=MAX_RATE)):
        judge.fits[0] = sure
        assert judge.swaps
        judge.fits[0] = unsure
        assert not judge.swaps


def test_only_first_visits_are_exact(llama_dir: Path, tmp_path: Path) -> None:
    """A second call of train() visits pairs that the model was trained on: no floor, no start at once."""
    trainer = prefer("DPO", llama_dir, tmp_path, poprisk_label_noise="swap", num_train_epochs=2)
    trainer.train()
    first = trainer._label_noise.fits
    trainer.train()
    second = trainer._label_noise.fits
    assert first[0].exact and not first[-1].exact and not any(fit.exact for fit in second)
    judge = LabelNoise("weight", True, ExampleTable(np.arange(400)))
    judge.untrained = False  # scoring began after training
    z = torch.linspace(0.5, 8.0, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    judge.table.visit(torch.arange(400), heldout_logodds=torch.where(torch.arange(400) < 120, -z, z))
    judge.maybe_fit(1.0, 10)
    assert not judge.fits[0].exact and judge.judging_since is None


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


@pytest.mark.parametrize(("preferences", "share"), [(True, 0.7), (False, 0.5)])
def test_a_share_of_the_own_effect_stays(preferences: bool, share: float) -> None:
    judge = LabelNoise("audit", preferences, ExampleTable(np.arange(1)))
    for visits in (1, 2, 3):
        visit = _Visit(
            torch.tensor([0]),
            SimpleNamespace(slopes=torch.tensor([-0.5]), log_odds=torch.tensor([1.0])),
            SimpleNamespace(energy=torch.tensor([0.2]), agreement=torch.tensor([0.0])),
            torch.tensor([1.0]),
            torch.tensor([1.0]),
        )
        judge._pending = [visit]
        judge.finish_step(lambda rows: rows)  # z rose by 0.2/0.5
        assert judge.table.columns["own_effect"].item() == pytest.approx(share * 0.4 * visits, rel=1e-5)


def test_an_older_rule_is_not_gone_on_with(tmp_path: Path) -> None:
    judge = LabelNoise("audit", True, ExampleTable(np.arange(4)))
    judge.save(tmp_path)
    content = json.loads((tmp_path / FITS_NAME).read_text())
    judge.load(tmp_path)
    content["rule"] -= 1
    (tmp_path / FITS_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another rule, of an earlier version"):
        judge.load(tmp_path)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_small_log_odds_are_fitted_as_large_ones_are(scale: float) -> None:
    """Early in training all are small; an interval stands where τ ends at its limit too."""
    rng = np.random.default_rng(3)
    z = np.where(rng.random(512) < 0.33, -1, 1) * (np.abs(rng.normal(size=512)) + 0.2)
    fit, same = fit_noise(scale * z), fit_noise(z)
    assert fit.rate == pytest.approx(same.rate, abs=0.01) and fit.low == pytest.approx(same.low, abs=0.01)
    sure = fit_noise(3e-3 * np.where(rng.permutation(512) < 160, -1.0, 1.0) * np.geomspace(1e-3, 1, 512))
    assert sure.tau > 1e4 and sure.rate == pytest.approx(160 / 512, abs=0.05)
    assert 0.02 < sure.rate - sure.low < 0.1


def test_who_predicts_nothing_judges_nobody() -> None:
    """As long as held-out labels are predicted by chance no class is weighted; whatever the rate is."""
    rng, rows = np.random.default_rng(1), torch.arange(400)
    judge = LabelNoise("weight", False, ExampleTable(np.arange(400)))
    for epoch in (1.0, 2.0, 3.0):
        judge.table.visit(rows, heldout_logodds=torch.tensor(rng.choice([-1.0, 1.0], 400)))
        judge.maybe_fit(epoch, int(10 * epoch))
    assert not competent(judge.fits[-1]) and judge.judging_since is None
    z = torch.linspace(2.0, 8.0, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    z = torch.where(rows < 80, -z, z)
    for epoch in (4.0, 5.0):
        judge.table.visit(rows, heldout_logodds=z)
        judge.maybe_fit(epoch, int(10 * epoch))
    assert judge.judging_since == 50  # it rose by more than a little from the third epoch to the fourth

    def weights() -> Tensor:
        visit = _Visit(rows, None, None, None, None)
        judge._strength(visit, z, 2)
        return visit.weight

    assert weights()[:80].max() < 0.3 < 0.9 < weights()[80:].min()
    judge.fits.append(replace(judge.fits[-1], rate=MAX_RATE, low=MAX_RATE))
    assert weights()[:80].max() < 0.3  # so much noise may be true
    judge.fits.append(replace(judge.fits[-1], log_likelihood=-math.log(2)))
    assert torch.equal(weights(), torch.ones(400))


# -- refusals -------------------------------------------------------------------------------------------

WEIGHING = [{"poprisk_label_noise": "weight"}, {"poprisk_label_noise": "swap"}]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("", {"poprisk_label_noise": "maybe"}, "poprisk_label_noise must be one of off, audit, weight, swap"),
        ("", {"poprisk_label_noise": "swap"}, "is for preference pairs: set poprisk_label_noise=weight"),
        ("", {"label_smoothing_factor": 0.1}, "set label_smoothing_factor=0"),
        ("", {"torch_compile": True}, "set torch_compile=False"),
        ("", {"optim": "adamw_torch"}, "has no effect with optim=adamw_torch"),
        ("", {"poprisk_estimator": "group", "poprisk_gate": "hard"}, "set poprisk_estimator=example"),
        ("DPO", {"loss_type": ["ipo"]}, "loss_type=ipo is not one: use sigmoid or sigmoid_norm"),
        ("DPO", {"loss_type": ["sft"]}, "loss_type=sft is not one: use sigmoid or sigmoid_norm\\.$"),
        ("DPO", {"loss_type": ["sigmoid", "robust"]}, "loss_type=sigmoid,robust is not one: .*_norm\\.$"),
        ("DPO", {"loss_type": ["sigmoid", "aot"]}, "loss_type=sigmoid,aot is not one: .*_norm\\.$"),
        ("DPO", {"loss_type": ["sigmoid", "sigmoid_norm"]}, "loss_type=sigmoid,sigmoid_norm is not one"),
        *(
            (
                "DPO",
                {"loss_type": ["sigmoid", "sft"], **mode},
                "is not one: .*, or set poprisk_label_noise=audit",
            )
            for mode in WEIGHING
        ),
        *(
            ("DPO", {"use_weighting": True, **mode}, "=False, or set poprisk_label_noise=audit")
            for mode in WEIGHING
        ),
        ("DPO", {"sync_ref_model": True}, "set sync_ref_model=False"),
        ("DPO", {"f_divergence_type": "js_divergence"}, "use reverse_kl"),
        ("DPO", {"use_liger_kernel": True}, "set use_liger_kernel=False"),
        *(
            (
                "Reward",
                {"center_rewards_coefficient": 0.1, **mode},
                "remove center_rewards_coefficient, or set",
            )
            for mode in WEIGHING
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


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DPO", {}),
        ("DPO", {"use_weighting": True}),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}),
        ("DPO", {"loss_type": ["hinge", "sigmoid"], "loss_weights": [0.3, 0.7]}),
        ("Reward", {"center_rewards_coefficient": 0.1}),
    ],
    ids=["plain", "weighting", "sft", "hinge", "centred"],
)
def test_an_audit_reads_the_margins_of_a_loss_with_more_in_it(
    kind: str, options: dict[str, Any], size: int, llama_dir: Path, tmp_path: Path
) -> None:
    """The log-odds are the margins that TRL logs, and weights and gradients are those of its own trainer."""
    options = {**options, "per_device_train_batch_size": size, "num_train_epochs": 2}
    audit = prefer(kind, llama_dir, tmp_path, poprisk_label_noise="audit", **options)
    seen: list[_Visit] = []
    book = audit._label_noise._booked
    audit._label_noise._booked = lambda visit, share: (seen.append(visit), book(visit, share))[1]
    gradients = [first_gradients(audit)]
    audit.train()
    margin = "rewards/margins" if kind == "DPO" else "margin"
    logged = [entry[margin] for entry in audit.state.log_history if "loss" in entry]
    assert len(logged) == len(seen) == 32 // size and max(map(abs, logged)) > 0.01
    for value, visit in zip(logged, seen, strict=True):
        assert visit.tap.log_odds.mean().item() == pytest.approx(value, rel=1e-4, abs=1e-6)
    table = audit._label_noise.table
    assert table.visits.tolist() == [2] * 16
    for visit in seen[len(seen) // 2 :]:
        assert torch.equal(table.columns["logodds"][visit.rows], visit.tap.log_odds)

    settings = {k: v for k, v in (QUIET | options).items() if not k.startswith("poprisk")}
    settings |= {"learning_rate": 1e-3, "optim": "adamw_torch"}
    args = getattr(trl, f"{kind}Config")(str(tmp_path), bf16=False, gradient_checkpointing=False, **settings)
    stock = getattr(trl, f"{kind}Trainer")(str(llama_dir), args=args, train_dataset=preferences(16))
    gradients.append(first_gradients(stock))
    stock.train()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    if size == 1:
        assert same(gradients[0], gradients[1]) and same(weights(audit), weights(stock))
    for name, expected in gradients[1].items():  # summed in another order
        assert (gradients[0][name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def first_gradients(trainer: Any) -> dict[str, Tensor]:
    """Filled when it trains: the gradients before its first step."""
    found: dict[str, Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                named = trainer.model.named_parameters()
                found.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.add_callback(Look())
    return found


def test_margins_that_shift_the_log_odds_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    data = preferences(16).add_column("margin", [1.0] * 16)
    for found in (data, data.to_iterable_dataset()):
        with pytest.raises(
            ValueError, match="from which the column margin would be taken: remove the column"
        ):
            prefer("Reward", llama_dir, tmp_path, found, poprisk_label_noise="audit", max_steps=3)
    prefer("Reward", llama_dir, tmp_path, data)  # without label noise it is the loss's own


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


# -- what a review found --------------------------------------------------------------------------------


class Spoiled(Classifier):
    """Gives one example of the sixth step a gradient that is not finite."""

    calls = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = super().forward(x, labels)
        self.calls += self.training
        return {**out, "loss": out["loss"] * math.nan} if self.calls == 6 else out


def test_a_step_that_is_left_out_is_no_visit(tmp_path: Path) -> None:
    options = {"poprisk_gate": "hard", "save_strategy": "steps", "save_steps": 6, "num_train_epochs": 2}
    trainer = classify(tmp_path, examples(), Spoiled(), poprisk_label_noise="audit", **options)
    trainer.train()
    table = trainer._label_noise.table
    assert table.visits.sum() == 48 - 4 and sorted(table.visits.tolist())[:4] == [1] * 4
    assert all(column.isfinite().all() for column in table.columns.values())
    assert 0 < float(trainer._label_noise.clip_coefficient) <= 1
    saved = json.loads((tmp_path / "checkpoint-6" / "label_noise.json").read_text())
    assert 0 < saved["clip_coefficient"] <= 1


def test_an_index_of_the_models_own_is_left_to_it_without_label_noise(tmp_path: Path) -> None:
    class Indexed(Classifier):
        def forward(self, x: Tensor, labels: Tensor, example_index: Tensor) -> dict[str, Tensor]:
            assert example_index.shape == labels.shape
            return super().forward(x, labels)

    data = [{**e, INDEX: torch.tensor(i)} for i, e in enumerate(examples())]
    trainer = classify(tmp_path, data, Indexed(), max_steps=2, optim="poprisk_adamw", poprisk_gate="hard")
    trainer.train()
    assert trainer.state.global_step == 2


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


def test_an_interrupted_step_leaves_no_visit(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    stop = Stop()
    trainer = classify(tmp_path, examples(), poprisk_label_noise="audit", gradient_accumulation_steps=3)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.model.zero_grad()
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert trainer._label_noise.table.visits.tolist() == [1] * 24


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


def test_an_index_hidden_by_a_format_is_read() -> None:
    data = Dataset.from_dict({"a": [1, 2], INDEX: [4, 9]}).with_format("torch", columns=["a"])
    assert with_index(data)[1].tolist() == [4, 9]


def test_the_scores_are_left_without_save_model(tmp_path: Path) -> None:
    classify(tmp_path, examples(), poprisk_label_noise="audit", num_train_epochs=2).train()
    assert len(load_fits(tmp_path)) == 5 and (tmp_path / TABLE_NAME).is_file()


def test_an_evaluation_on_the_training_set(tmp_path: Path) -> None:
    data = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    trainer = classify(
        tmp_path, data, poprisk_label_noise="audit", remove_unused_columns=False, num_train_epochs=1
    )
    trainer.train()
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])


def test_a_stream_on_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"x": e["x"].tolist(), "labels": int(e["labels"]), INDEX: i} for i, e in enumerate(examples())]
    monkeypatch.setattr(PopRiskTrainingArguments, "world_size", 2)
    monkeypatch.setattr(PopRiskTrainingArguments, "check_training", lambda self: None)
    with pytest.raises(ValueError, match="cannot tell the examples of a stream on several processes"):
        classify(
            tmp_path, Dataset.from_list(rows).to_iterable_dataset(), poprisk_label_noise="audit", max_steps=2
        )
