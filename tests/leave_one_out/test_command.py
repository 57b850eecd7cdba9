"""The audit of a run: its report, its figure, the data sets it writes, and what it refuses."""

import json
import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_from_disk
from torch.nn import functional as F

from hf_poprisk.leave_one_out import INDEX, TABLE_NAME, ExampleTable, LabelNoise, NoiseFit, audit
from hf_poprisk.leave_one_out.audit import AuditError, Bin, auroc
from hf_poprisk.leave_one_out.data import check_labels
from hf_poprisk.leave_one_out.index import take_sample
from hf_poprisk.leave_one_out.judge import _Visit
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.weights import FITS_NAME

N = 60
WRONG = np.arange(N) % 4 == 1  # a quarter of the labels
FIT = NoiseFit(0.25, 0.15, 0.33, 1.5, 2, -0.55, N, step=48, epoch=3.0)
# the likelihood has all but stopped rising
FITS = [
    NoiseFit(0.35, 0.2, 0.42, 1.0, 2, -0.65, N, 16, 1.0, exact=True),
    NoiseFit(0.3, 0.2, 0.4, 1.2, 2, -0.555, N, 32, 2.0),
    FIT,
]
JUDGED_BY = replace(FIT, rate=0.35, low=0.2, high=0.42)  # as the first estimate, which is above the last
CHANCE = replace(FITS[0], log_likelihood=-math.log(2))  # predicts nothing


def log_odds() -> np.ndarray:
    """ζ, mostly negative where the label is wrong; a few are on the other side."""
    generator = np.random.default_rng(1)
    return (generator.normal(1.8, 1.0, N) * np.where(WRONG, -1, 1)).astype(np.float32)


def save_run(
    folder: Path,
    heldout: np.ndarray | None = None,
    ids: np.ndarray | None = None,
    fits: list[NoiseFit] = FITS,
    mode: str = "weight",
    preferences: bool = True,
    since: int | None = 32,
    never: tuple[int, ...] = (),
    sample: Any = None,
) -> Path:
    """What training leaves; the rows ``never`` were not visited."""
    heldout = log_odds() if heldout is None else heldout.astype(np.float32)
    table = ExampleTable(np.arange(len(heldout)) if ids is None else ids)
    judge = LabelNoise(mode, preferences, table, sample)
    rows = torch.tensor([i for i in range(len(heldout)) if i not in never])
    z = torch.from_numpy(heldout)[rows]
    # the training loss is blurred, so that its AUROC is another
    blurred = z + 2 * torch.sin(7.0 * rows)
    table.visit(rows, logodds=blurred, heldout_logodds=z, loss_mean=F.softplus(-blurred))
    judge.fits, judge.judging_since = list(fits), since
    folder.mkdir(exist_ok=True)
    judge.save(folder)
    return folder


def pairs(flips: bool = True, scores: bool = True) -> Dataset:
    columns: dict[str, Any] = {
        "prompt": [f"prompt {i}" for i in range(N)],
        "chosen": [f"good {i}" for i in range(N)],
        "rejected": [f"bad {i}" for i in range(N)],
    }
    if scores:
        columns |= {
            "score_chosen": [float(i) for i in range(N)],
            "score_rejected": [-float(i) for i in range(N)],
        }
    if flips:
        columns["is_flipped"] = WRONG.tolist()
    return Dataset.from_dict(columns)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pairs().save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def command(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """What a command line prints."""
    audit.main([str(arg) for arg in argv])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one sentence of a command line that ends with exit code 2 before anything is printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        audit.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("python -m hf_poprisk.audit: error: ") and err.count("\n") == 1
    assert err.endswith((".\n", "'hf_poprisk[recipes]'.\n"))
    return err.removeprefix("python -m hf_poprisk.audit: error: ").strip()


def posterior(zeta: float, fit: NoiseFit = JUDGED_BY) -> float:
    """By the formula, one label at a time."""
    c = math.log(fit.num_labels - 1)
    q = 1 / (1 + math.exp(-(fit.tau * (zeta + c) - c)))
    right = (1 - fit.rate) * q
    return right / (right + fit.rate * (1 - q) / (fit.num_labels - 1))


# -- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_counts_pairs(levels: int) -> None:
    generator = np.random.default_rng(levels)
    scores, positive = generator.integers(levels, size=70) / 7, generator.random(70) < 0.3
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - auroc(scores, positive))


def test_auroc_of_one_class_is_not_a_number() -> None:
    assert math.isnan(auroc(np.arange(3.0), np.ones(3, bool))) and math.isnan(
        auroc(np.arange(3.0), np.zeros(3))
    )


def test_bins_are_of_equal_size_and_ascending() -> None:
    by = np.random.default_rng(0).random(53)
    bins = audit.reliability(by, by**2, by > 0.5)
    assert [b.count for b in bins] == [6, 6, 6, 5, 5, 5, 5, 5, 5, 5]
    assert all(a.high <= b.low for a, b in zip(bins, bins[1:], strict=False))
    third = np.sort(by)[12:18]
    assert bins[2].predicted == pytest.approx((third**2).mean())
    assert bins[2].observed == pytest.approx((third > 0.5).mean())
    assert len(audit.reliability(by[:4], by[:4], None)) == 4 and audit.reliability(by[:0], by[:0], None) == []


def test_distance_of_bins_and_what_chance_makes_of_it() -> None:
    bins = [Bin(30, 0, 0.5, 0.4, 0.5), Bin(10, 0.5, 1, 0.8, 0.5)]
    assert audit.expected_error(bins) == pytest.approx((30 * 0.1 + 10 * 0.3) / 40)
    assert math.isnan(audit.expected_error([Bin(3, 0, 1, 0.5, None)]))
    draws = np.random.default_rng(0).binomial(30, 0.4, 20000) / 30
    assert audit.chance_error(bins[:1]) == pytest.approx(np.abs(draws - 0.4).mean(), rel=0.03)


def two_part(n: int, tau: float, rate: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ζ of pairs whose labels follow the model of the fit exactly, and which labels are wrong."""
    generator = np.random.default_rng(seed)
    margin = generator.normal(0, 2.5, n)
    clean = generator.random(n) < 1 / (1 + np.exp(-tau * margin))
    wrong = generator.random(n) < rate
    return np.where(clean != wrong, margin, -margin), wrong


def test_calibration_needs_no_true_labels(tmp_path: Path) -> None:
    zeta, _ = two_part(4000, 1.5, 0.25)
    right = audit.load_run(save_run(tmp_path / "right", zeta))
    bins = audit.calibration(right)
    assert all(abs(b.predicted - b.observed) < 4 * b.standard_error for b in bins)
    assert audit.expected_error(bins) < 2 * audit.chance_error(bins)
    # by hand: the tenth of the smallest |ζ|
    least = np.sort(np.abs(right.heldout))[:400]
    q = 1 / (1 + np.exp(-1.5 * least))
    assert bins[0].predicted == pytest.approx((0.75 * q + 0.25 * (1 - q)).mean())
    smallest = right.heldout[np.argsort(np.abs(right.heldout))[:400]]
    assert bins[0].observed == pytest.approx((smallest > 0).mean())
    assert 0.5 <= bins[0].low < bins[-1].high <= 1
    # a fit that expects too few wrong labels is found out
    fits = [NoiseFit(0.05, 0.0, 0.1, 1.5, 2, -0.5, 4000)]
    bins = audit.calibration(audit.load_run(save_run(tmp_path / "not", zeta, fits=fits)))
    assert audit.expected_error(bins) > 5 * audit.chance_error(bins)


def test_classes_have_no_observed_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = NoiseFit(0.2, 0.1, 0.3, 1.2, 5, -1.0, N)
    folder = save_run(tmp_path / "run", fits=[fit], preferences=False)
    bins = audit.calibration(audit.load_run(folder))
    assert all(b.observed is None for b in bins)
    zeta = np.sort(log_odds())[:6].astype(float)
    q = 1 / (1 + np.exp(-(1.2 * (zeta + math.log(4)) - math.log(4))))
    assert bins[0].predicted == pytest.approx((0.8 * q + 0.2 * (1 - q) / 4).mean())
    out = command(capsys, folder, "--top", 0)
    assert "nothing here tests it" in out and "± s.e." not in out and "5 labels" in out


def test_posterior_of_visited_and_of_other_examples(tmp_path: Path) -> None:
    fit = NoiseFit(0.2, 0.1, 0.3, 1.2, 5, -1.0, N)
    run = audit.load_run(save_run(tmp_path / "run", fits=[FIT, fit], preferences=False, never=(3, 7)))
    expected = [0.8 if i in (3, 7) else posterior(float(z), fit) for i, z in enumerate(log_odds())]
    np.testing.assert_allclose(run.posterior(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fits", "preferences", "rate", "says"),
    [
        (
            FITS,
            True,
            0.35,
            "(epoch 1.00), because the last one is lower: 0.250",
        ),
        ([replace(FITS[0], rate=0.22), FIT], True, 0.25, None),
        ([replace(FITS[0], exact=False), FIT], True, 0.25, None),
        ([CHANCE, FIT], True, 0.35, "(epoch 1.00), because the last one is lower"),
        ([FITS[0], replace(FIT, rate=0.01, low=0.0)], True, 0.35, "lower: 0.010, 0.000–0.330"),
        ([FIT], True, 0.25, None),
        (FITS, False, 0.25, None),
    ],
)
def test_labels_are_judged_at_the_rate_of_training(
    tmp_path: Path, capsys: Any, fits: list[NoiseFit], preferences: bool, rate: float, says: str | None
) -> None:
    folder = save_run(tmp_path / "run", fits=fits, preferences=preferences, never=(3,))
    run = audit.load_run(folder)
    expected = [posterior(float(z), replace(FIT, rate=rate)) for z in log_odds()]
    expected[3] = 1 - rate
    np.testing.assert_allclose(run.posterior(), expected, rtol=1e-6)
    # the same as in training
    judge = LabelNoise("weight", preferences, ExampleTable(np.arange(N)))
    judge.fits, judge.judging_since = fits, 16
    visit = _Visit(torch.arange(N), None, None, None, None)  # type: ignore[arg-type]
    judge._strength(visit, torch.from_numpy(log_odds()), 2)
    np.testing.assert_allclose(run.posterior()[run.visited], visit.weight[run.visited], rtol=1e-5)
    out = command(capsys, folder, "--top", 0)
    by = FITS[0] if says else fits[-1]
    assert f"estimated share of wrong labels: {by.rate:.3f}, 95 % interval {by.low:.3f}–{by.high:.3f}" in out
    assert says in out if says else "of the first visits" not in out


def test_the_audit_gives_the_reason_that_training_gave(
    tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    early = replace(FIT, epoch=1.75)
    for i, (fits, preferences) in enumerate(
        [(FITS[:2], True), (FITS[:2], False), ([CHANCE, early], True), ([FITS[0], early], False)]
    ):
        judge = LabelNoise("weight" if i else "audit", preferences, ExampleTable(np.arange(N)))
        judge.fits = fits
        caplog.clear()
        judge.warn_at_end(48)
        reason = re.search("no label was judged, because .*: raise num_train_epochs", caplog.text)
        out = command(
            capsys, save_run(tmp_path / str(i), fits=fits, preferences=preferences, since=None), "--top", 0
        )
        assert f"warning: {reason[0]}" in out


def test_first_visits_that_leave_the_rate_open_are_named(tmp_path: Path, capsys: Any) -> None:
    for i, (first, preferences, says) in enumerate(
        [(replace(FITS[0], high=0.44), True, True), (CHANCE, True, True), (CHANCE, False, False)]
        + [(FITS[0], True, False), (replace(CHANCE, exact=False), True, False)]
    ):
        run = save_run(tmp_path / str(i), fits=[first, *FITS[1:]], preferences=preferences)
        out = command(capsys, run, "--top", 0)
        assert ("may be far off" in out) == says
        assert ("leave the noise rate open (0.200 to 0.440)" in out) == (i == 0)
        assert ("first visits of the pairs" in out and "hardly better than by chance" in out) == (i == 1)


def test_truth_is_compared_with_visited_examples_only(tmp_path: Path) -> None:
    run = audit.load_run(save_run(tmp_path / "run", never=(0, 1)))
    truth = audit.compare_with_truth(run, WRONG)
    seen = np.arange(N) > 1
    called = np.array([posterior(float(z)) < 0.5 for z in log_odds()]) & seen
    assert (truth.count, truth.num_wrong) == (N - 2, (WRONG & seen).sum())
    assert truth.precision == (called & WRONG).sum() / called.sum()
    assert truth.recall == (called & WRONG).sum() / (WRONG & seen).sum()
    assert 0 < truth.recall < 1  # the example has something to miss
    assert truth.auroc_suspicion == auroc(-log_odds()[seen], WRONG[seen])
    assert truth.auroc_loss == auroc(run.loss_mean[seen], WRONG[seen]) != truth.auroc_suspicion
    assert sum(b.count for b in truth.bins) == N - 2
    assert truth.bins[0].observed < 0.5 < truth.bins[-1].observed


def test_posterior_is_reliable_on_data_of_the_model(tmp_path: Path) -> None:
    zeta, wrong = two_part(6000, 1.5, 0.25)
    run = audit.load_run(save_run(tmp_path / "run", zeta, fits=[FIT]))
    # right means: not replaced, which is what the posterior is of
    bins = audit.compare_with_truth(run, wrong).bins
    assert all(abs(b.predicted - b.observed) < 4 * b.standard_error + 1e-3 for b in bins)


# -- the report -------------------------------------------------------------------------------------------


def test_report_without_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, run, "--top", 3)
    assert "60 preference pairs; poprisk_label_noise=weight" in out
    assert "estimated share of wrong labels: 0.350, 95 % interval 0.200–0.420" in out
    called = sum(posterior(float(z)) < 0.5 for z in log_odds())
    assert f"(posterior below 0.5): {called} of 60 ({100 * called / 60:.1f} %)" in out
    assert "weights were given from optimizer step 32 on (epoch 2.00)" in out
    assert "the share is that of the first visits (epoch 1.00), because the last one is lower: 0.250" in out
    for row in (r"1\.00 │ +16 │ 0\.350 │ +0\.200–0\.420 │ 1\.00 │ +-0\.6500", r"3\.00 │ +48 │ 0\.250"):
        assert re.search(row, out)
    assert "There are no true labels" in out and "AUROC" not in out and "warning" not in out
    worst = np.argsort(log_odds())[:4]
    shown = [int(found) for found in re.findall(r"^│ +(\d+) │ +-\d\.\d\d │ +0\.\d{3} │ +1 │", out, re.M)]
    assert shown == worst[:3].tolist() and "example" not in out.split("most contradicted")[1]
    assert "most contradicted" not in command(capsys, run, "--top", 0)


def test_report_with_truth(run: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, run, "--dataset", saved, "--top", 2)
    truth = audit.compare_with_truth(audit.load_run(run), WRONG)
    assert "known to be wrong (is_flipped): 15 of 60 (25.0 %)" in out
    assert f"suspicion {truth.auroc_suspicion:.3f}, mean loss {truth.auroc_loss:.3f}" in out
    assert f"precision {truth.precision:.3f}" in out and f"recall {truth.recall:.3f}" in out
    assert "reliability of the posterior" in out and "There are no true labels" not in out
    worst = int(np.argmin(log_odds()))
    assert all(f"{name} {worst}" in out for name in ("prompt: prompt", "chosen: good", "rejected: bad"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "audit"}, "scored only; weights would have been given from optimizer step 32"),
        (
            {"since": None, "fits": FITS[:2]},
            "no label was judged, because held-out labels were predicted better and better until the end",
        ),
        (
            {"since": None, "fits": [FITS[0], replace(FIT, epoch=1.75)], "preferences": False},
            "because classes are judged from the end of the second epoch on at the earliest",
        ),
        (
            {"since": None, "fits": [CHANCE, replace(FIT, epoch=1.75)], "mode": "audit"},
            "no label was judged, because pairs that the model had been trained on before are",
        ),
        (
            {"since": None, "fits": [CHANCE]},
            "no label was judged, because held-out labels were predicted hardly better than by chance",
        ),
        (
            {"since": 16, "fits": FITS[:1]},
            "from optimizer step 16 on (epoch 1.00): for less than a quarter of an epoch, if at all",
        ),
        ({"fits": []}, "warning: the noise rate was not estimated"),
        (
            {"fits": [NoiseFit(MAX_RATE, 0.3, MAX_RATE, 0.1, 2, -0.5, N)]},
            "warning: the estimate is at its limit",
        ),
        ({"fits": [*FITS, CHANCE]}, "warning: held-out labels are predicted hardly better than by chance"),
        (
            {"fits": [NoiseFit(0.2, 0.1, 0.3, 3.0, 10, -0.5, N)], "preferences": False},
            "τ is at its limit of 3",
        ),
        (
            {"fits": FITS[:2]},
            "warning: held-out labels were predicted better and better until the end (by 0.095",
        ),
        ({"never": (0, 1)}, "2 of them never trained on"),
        ({"preferences": False}, "60 examples;"),
    ],
)
def test_what_the_report_warns_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], says: str
) -> None:
    assert says not in command(capsys, save_run(tmp_path / "plain"))
    out = command(capsys, save_run(tmp_path / "run", **options))
    assert says in out and "most contradicted" in out


def test_truth_without_a_fit(tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, save_run(tmp_path / "run", fits=[]), "--dataset", saved, "--top", 1)
    assert "AUROC" in out and "precision" not in out and "–" in out.split("P(right)")[1]


def test_long_history_is_thinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = [NoiseFit(0.2, 0.1, 0.3, 1.0, 2, -0.5, N, step, step / 4) for step in range(4, 84)]
    out = command(capsys, save_run(tmp_path / "run", fits=fits), "--top", 0)
    shown = re.findall(r"^│ +(\d+\.\d\d) │ +\d+ │ 0\.200", out, re.M)
    assert len(shown) == 20 and shown[0] == "1.00" and shown[-1] == "20.75" and "(20 of 80)" in out


# -- finding the data -------------------------------------------------------------------------------------


def test_folder_of_parquet_files_and_its_splits(run: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    pairs(flips=False).to_parquet(folder / "train.parquet")
    pairs(flips=False).select(range(9)).to_parquet(folder / "test.parquet")
    worst = int(np.argmin(log_odds()))
    out = command(capsys, run, "--dataset", folder, "--top", 1)
    assert f"good {worst}" in out and "There are no true labels" in out
    assert "in the data (9 rows)" in refused(capsys, run, "--dataset", folder, "--split", "test")
    assert "nowhere" in refused(capsys, run, "--dataset", folder, "--split", "nowhere")
    assert "other" in refused(capsys, run, "--dataset", folder, "--config_name", "other")


def test_saved_splits(run: Path, tmp_path: Path, capsys: Any) -> None:
    splits = {"train": pairs().select(range(9)), "kept": pairs()}
    DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert "AUROC" in command(capsys, run, "--dataset", tmp_path / "dict", "--split", "kept")
    assert "(9 rows)" in refused(capsys, run, "--dataset", tmp_path / "dict")
    sentence = refused(capsys, run, "--dataset", tmp_path / "dict", "--split", "test")
    assert "has no split test: it has train, kept." in sentence


def test_examples_are_found_by_their_index(tmp_path: Path, capsys: Any) -> None:
    ids = np.random.default_rng(5).permutation(1000)[:N] - 100
    run = save_run(tmp_path / "run", ids=ids)
    order = np.random.default_rng(6).permutation(N)
    # another order, and a row that was not trained on
    data = pairs().add_column(INDEX, ids).select(order)
    more = data.select([0]).remove_columns(INDEX).add_column(INDEX, np.array([5000]))
    data = datasets.concatenate_datasets([more, data])
    data.save_to_disk(tmp_path / "data")
    rows = audit.find_rows(data, audit.load_run(run))
    assert np.array_equal(np.asarray(data[INDEX])[rows], ids)
    out = command(capsys, run, "--dataset", tmp_path / "data", "--top", 1)
    worst = int(np.argmin(log_odds()))
    assert f"good {worst}" in out and f"│ {ids[worst]:>5}" in out
    assert "1 rows of the data are not in the run" in out
    truth = audit.compare_with_truth(audit.load_run(run), WRONG)
    assert f"suspicion {truth.auroc_suspicion:.3f}" in out


def test_data_of_another_run_are_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    def sentence(data: Dataset, name: str) -> str:
        data.save_to_disk(tmp_path / name)
        return refused(capsys, run, "--dataset", tmp_path / name)

    assert "example_index 50 is not in the data (50 rows)" in sentence(pairs().select(range(50)), "few")
    more = datasets.concatenate_datasets([pairs(), pairs()])
    assert "the data have 120 rows and the run 60 examples" in sentence(more, "many")
    ids = np.arange(N)
    assert "example_index 59 is not in the data" in sentence(pairs().add_column(INDEX, ids - 1), "moved")
    with pytest.raises(AuditError, match="the data are empty"):
        audit.find_rows(pairs().select([]), audit.load_run(run))
    assert "must be unique" in sentence(pairs().add_column(INDEX, ids // 2), "twice")
    assert "must hold integers" in sentence(pairs().add_column(INDEX, ids / 2), "halves")
    missing = pairs(flips=False).add_column("is_flipped", [None, *[True] * (N - 1)])
    assert "is_flipped of the data has missing values" in sentence(missing, "missing")


def test_only_a_bool_column_is_the_truth(run: Path, tmp_path: Path, capsys: Any) -> None:
    pairs(flips=False).add_column("is_flipped", WRONG.astype(int)).save_to_disk(tmp_path / "data")
    assert "AUROC" not in command(capsys, run, "--dataset", tmp_path / "data")


def test_unreadable_data_are_refused(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.parquet"
    pairs().to_parquet(file)
    for wrong in (tmp_path / "nowhere", "./nowhere", "a/b/c", file):
        assert refused(capsys, run, "--dataset", wrong) == f"--dataset {wrong} is not a folder."
    broken = tmp_path / "broken"
    broken.mkdir()
    assert "broken cannot be read" in refused(capsys, run, "--dataset", broken)
    (broken / "train.parquet").write_bytes(file.read_bytes()[:200])
    assert "broken cannot be read" in refused(capsys, run, "--dataset", broken)
    next(saved.glob("*.arrow")).write_bytes(b"no table")
    assert "data cannot be read" in refused(capsys, run, "--dataset", saved)
    assert "typo is no folder here, and cannot be read" in refused(capsys, run, "--dataset", "typo")


# -- examples as text -------------------------------------------------------------------------------------


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_conversations_are_shown_by_their_content() -> None:
    question, good, bad = (
        message("user", "Why?"),
        message("assistant", "Because."),
        message("assistant", "No."),
    )
    expected = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    whole = {"chosen": [question, good], "rejected": [question, bad]}
    assert audit.example_text(whole, {}) == expected
    assert audit.example_text({"prompt": "Why?", **whole}, {}) == expected
    apart = {"prompt": [question], "chosen": [good], "rejected": [bad]}
    assert audit.example_text(apart, {}) == expected
    parts = [{"type": "image"}, {"type": "text", "text": "Look"}]
    shown = audit.example_text({"prompt": [message("user", parts)], "chosen": [good], "rejected": [good]}, {})
    assert shown == {"prompt": "image / Look", "chosen": "Because.", "rejected": "Because."}


def test_a_long_common_beginning_does_not_hide_the_difference() -> None:
    start = "word " * 100
    shown = audit.example_text({"chosen": start + "goodness", "rejected": start + "gold"}, {})
    assert shown["chosen"] == "… goodness" and shown["rejected"] == "… gold"
    assert shown["prompt"].startswith("word word") and len(shown["prompt"]) <= 160
    same = audit.example_text({"chosen": start, "rejected": start}, {})
    assert same["chosen"] == same["rejected"] != "… "


def test_labels_are_named() -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    assert audit.example_text({"sentence": "a", "label": 1}, features) == {"sentence": "a", "label": "good"}
    assert audit.example_text({"sentence": "a", "label": -1}, features)["label"] == "-1"
    plain = {"idx": 1, "text": "a", "other": "b", "labels": 3}
    assert audit.example_text(plain, {**features, "labels": Value("int64")}) == {"text": "a", "labels": "3"}
    unusual = {"idx": 1, "premise": "a", "hypothesis": "b"}
    assert audit.example_text(unusual, {}) == {"premise": "a", "hypothesis": "b"}


def test_text_is_shortened_and_cannot_steer_the_terminal() -> None:
    assert audit.shorten("a\n\n b\t\x1b[31mred") == "a b [31mred"
    assert audit.shorten("x" * 400) == "x" * 158 + " …" and audit.shorten("x" * 160) == "x" * 160


def test_markup_in_the_data_is_text(run: Path, tmp_path: Path, capsys: Any) -> None:
    texts = Dataset.from_dict({"text": ["[bold]loud[/bold] [/nothing]"] * N, "label": [0] * N})
    texts.save_to_disk(tmp_path / "data")
    assert "[bold]loud[/bold] [/nothing]" in command(capsys, run, "--dataset", tmp_path / "data", "--top", 1)


# -- the figure -------------------------------------------------------------------------------------------


def figure_of(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> Any:
    """The figure that a command line has drawn."""
    from matplotlib import pyplot

    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    audit.main([str(arg) for arg in argv])
    monkeypatch.undo()
    pyplot.close(figures[0])
    return figures[0]


def test_figure(run: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "figure.png"
    figure = figure_of(monkeypatch, run, "--dataset", saved, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in path.parent.iterdir()] == [path.name]
    left, right, second = figure.axes
    assert "nats" in left.get_xlabel() and left.get_ylabel() and second.get_ylabel() and right.get_xlabel()
    below = sum(posterior(float(z)) < 0.5 for z in log_odds())
    assert sum(p.get_height() for bars in left.containers[:2] for p in bars) == N
    assert sum(p.get_height() for p in left.containers[0]) == below
    # no bar is of both sides: two of them meet where the posterior is 1/2
    meet = min((p.get_x() for p in left.containers[1]), key=lambda x: abs(posterior(x) - 0.5))
    assert posterior(meet) == pytest.approx(0.5, abs=1e-6)
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert (
        f"posterior below 0.5: {100 * below / N:.1f} % ({below})" in names
        and "known to be wrong (15)" in names
    )
    z, curve = second.lines[0].get_data()
    assert curve[100] == pytest.approx(posterior(float(z[100])), rel=1e-5)
    line = next(line for line in right.lines if line.get_label().startswith("estimate"))
    assert line.get_xydata().tolist() == [[1.0, 0.35], [2.0, 0.3], [3.0, 0.25]]
    band = right.collections[0].get_paths()[0].vertices
    assert {(1.0, 0.2), (1.0, 0.42), (3.0, 0.15), (3.0, 0.33)} <= {(x, y) for x, y in band.tolist()}
    begin = next(line for line in right.lines if line.get_label() == "weights begin")
    assert begin.get_xdata()[0] == 2.0
    assert next(line for line in right.lines if line.get_label() == "of the first visits: 0.350")


@pytest.mark.parametrize(
    "options",
    [
        {"fits": []},
        {"fits": [FIT]},
        {"heldout": np.array([0.7])},
        {"heldout": np.zeros(5), "mode": "audit"},
        {"fits": [NoiseFit(0.0, 0.0, 0.1, 1.0, 2, -0.1, N)]},
        {"fits": [NoiseFit(0.1, 0.0, 0.2, 1.0, 4, -0.1, N)], "preferences": False},
        {"heldout": np.concatenate([log_odds(), [1e4]])},
    ],
)
def test_figures_of_unusual_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    path = tmp_path / "figure.png"
    figure = figure_of(monkeypatch, save_run(tmp_path / "run", **options), "--plot", path)
    drawn = sum(p.get_height() for bars in figure.axes[0].containers for p in getattr(bars, "patches", bars))
    assert path.is_file() and drawn == len(options.get("heldout", log_odds()))


# -- corrected data ---------------------------------------------------------------------------------------


def written(capsys: Any, run: Path, data: Path, kind: str, to: Path) -> tuple[str, Dataset]:
    out = command(capsys, run, "--dataset", data, "--write", kind, "--to", to, "--top", 0)
    # the source is as it was, and nothing lies about
    assert not list(data.glob("cache*")) and not list(to.parent.glob(".*"))
    return out, load_from_disk(str(to))


def test_filtered(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    out, data = written(capsys, run, saved, "filtered", tmp_path / "new" / "to")
    kept = [i for i, z in enumerate(log_odds()) if posterior(float(z)) >= 0.5]
    assert data["prompt"][:] == [f"prompt {i}" for i in kept] and data["example_index"][:] == kept
    assert data.remove_columns("example_index").features == pairs().features
    assert 0 < len(kept) < N and f"({N - len(kept)} of 60 rows dropped)" in out


def test_weighted(tmp_path: Path, saved: Path, capsys: Any) -> None:
    run = save_run(tmp_path / "run", never=(2,))
    (tmp_path / "to").mkdir()  # empty: allowed
    _, data = written(capsys, run, saved, "weighted", tmp_path / "to")
    expected = [posterior(float(z)) for z in log_odds()]
    expected[2] = 0.65
    np.testing.assert_allclose(data["label_weight"][:], expected, rtol=1e-6)
    assert data.features["label_weight"].dtype == "float32"
    assert data.remove_columns("label_weight")[:] == pairs()[:]


@pytest.mark.parametrize("scores", [True, False])
def test_reflipped(run: Path, tmp_path: Path, capsys: Any, scores: bool) -> None:
    pairs(scores=scores).save_to_disk(tmp_path / "data")
    out, data = written(capsys, run, tmp_path / "data", "reflipped", tmp_path / "to")
    swapped = [posterior(float(z)) < 0.5 for z in log_odds()]
    assert data["reflipped"][:] == swapped and data.features["reflipped"].dtype == "bool"
    assert f"({sum(swapped)} of 60 rows swapped)" in out
    for i, row in enumerate(data):
        good, bad = (("rejected", "chosen") if swapped[i] else ("chosen", "rejected"))[:2]
        assert (row[good], row[bad], row["prompt"]) == (f"good {i}", f"bad {i}", f"prompt {i}")
        if scores:
            assert (row[f"score_{good}"], row[f"score_{bad}"]) == (i, -i)
        assert row["is_flipped"] == (WRONG[i] != swapped[i])  # the wrong way round now
    assert ("score_chosen" in data.column_names) == scores


def test_reflipped_conversations(run: Path, tmp_path: Path, capsys: Any) -> None:
    chosen = [[message("user", f"q {i}"), message("assistant", f"good {i}")] for i in range(N)]
    rejected = [[message("user", f"q {i}"), message("assistant", f"bad {i}")] for i in range(N)]
    models = {"chosen_model": ["a"] * N, "rejected_model": ["b"] * N, "chosen_by": ["c"] * N}
    source = Dataset.from_dict({"chosen": chosen, "rejected": rejected, **models})
    source.with_format("torch", columns=["chosen_by"]).save_to_disk(tmp_path / "data")
    _, data = written(capsys, run, tmp_path / "data", "reflipped", tmp_path / "to")
    worst, best = int(np.argmin(log_odds())), int(np.argmax(log_odds()))
    assert data[worst]["chosen"] == rejected[worst] and data[worst]["rejected"] == chosen[worst]
    assert data[best]["chosen"] == chosen[best]
    assert [data[worst][f"{name}_model"] for name in ("chosen", "rejected")] == ["b", "a"]
    assert data[worst]["chosen_by"] == "c"
    assert data.remove_columns("reflipped").features == source.features


def test_written_rows_are_found_by_their_index(tmp_path: Path, capsys: Any) -> None:
    ids = np.arange(N)[::-1].copy() * 3
    run = save_run(tmp_path / "run", ids=ids)
    order = np.random.default_rng(2).permutation(N)
    more = pairs().add_column(INDEX, ids + 1).select([0])
    data = datasets.concatenate_datasets([pairs().add_column(INDEX, ids).select(order), more])
    data.save_to_disk(tmp_path / "data")
    _, data = written(capsys, run, tmp_path / "data", "weighted", tmp_path / "to")
    expected = [posterior(float(log_odds()[i])) for i in order] + [0.65]
    np.testing.assert_allclose(data["label_weight"][:], expected, rtol=1e-6)


def test_what_cannot_be_written(run: Path, saved: Path, tmp_path: Path, capsys: Any) -> None:
    def sentence(kind: str, run: Path = run, data: Path = saved) -> str:
        found = refused(capsys, run, "--dataset", data, "--write", kind, "--to", tmp_path / "to")
        assert not (tmp_path / "to").exists()
        return found

    classes = save_run(tmp_path / "classes", preferences=False)
    assert "reflipped is for preference pairs" in sentence("reflipped", classes)
    assert "holds no estimate of the noise rate" in sentence(
        "filtered", save_run(tmp_path / "unfit", fits=[])
    )
    hopeless = save_run(tmp_path / "hopeless", np.full(N, -9.0))
    assert "would drop every row" in sentence("filtered", hopeless)
    pairs(scores=False).remove_columns("rejected").save_to_disk(tmp_path / "half")
    assert "needs the columns chosen and rejected" in sentence("reflipped", data=tmp_path / "half")
    pairs().add_column("margin", [1.0] * N).save_to_disk(tmp_path / "margin")
    assert "cannot turn the column margin round" in sentence("reflipped", data=tmp_path / "margin")
    capped = NoiseFit(MAX_RATE, 0.3, MAX_RATE, 0.1, 2, -0.5, N)
    for name, options, why in (
        ("guess", {"fits": [CHANCE]}, "predicted hardly better than by chance"),
        ("capped", {"fits": [capped], "preferences": False}, "at its limit of 0.45"),
        ("open", {"fits": [replace(FITS[0], high=0.44), *FITS[1:]]}, "leave the noise rate open"),
        ("waiting", {"since": None}, "predicted better and better until the end"),
    ):
        unsure = save_run(tmp_path / name, **options)
        said = sentence("weighted", unsure)
        assert "would follow an estimate that means little: " in said and why in said
    tokens = Dataset.from_dict({"input_ids": [[i] for i in range(N)], "labels": [0] * N})
    other = save_run(tmp_path / "other", sample=take_sample(tokens, np.arange(N)))
    assert "was trained on (input_ids, labels): nothing tells" in sentence("filtered", other)
    for kind, column in (("weighted", "label_weight"), ("reflipped", "reflipped")):
        pairs().add_column(column, [0] * N).save_to_disk(tmp_path / column)
        assert f"adds a column {column}, which the data have already" in sentence(
            kind, data=tmp_path / column
        )


@pytest.mark.parametrize("kind", audit.WRITES)
def test_nothing_is_left_half_written(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full(self: Dataset, path: str) -> None:
        Path(path).mkdir()
        Path(path, "half").write_text("")
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Dataset, "save_to_disk", full)
    sentence = refused(capsys, run, "--dataset", saved, "--write", kind, "--to", tmp_path / "to")
    assert "No space left on device" in sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_figure_is_not_left_half_written(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def full(self: Figure, path: Path, **kwargs: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "figure.png").write_text("before")
    monkeypatch.setattr(Figure, "savefig", full)
    assert "No space left" in refused(capsys, run, "--plot", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_text() == "before" and not list(tmp_path.glob(".*"))


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "x"], "--to has no effect without --write."),
        (["--write", "filtered", "--to", "x"], "--write needs --dataset, which it makes a copy of."),
        (["--write", "filtered", "--dataset", "x"], "--write needs --to FOLDER."),
        (["--split", "train"], "--split has no effect without --dataset."),
        (["--config_name", "x"], "--config_name has no effect without --dataset."),
        (["--dataset", ""], "--dataset is empty: give a name on the Hub or a folder."),
        (["--top", "-1"], "--top must be 0 or more."),
        (["--plot", "figure.pdf"], "--plot figure.pdf must end in .png."),
    ],
)
def test_options_are_refused_before_any_work(
    tmp_path: Path, capsys: Any, options: list[str], says: str
) -> None:
    # the run is not there, and that would be noticed first if anything were read
    assert refused(capsys, tmp_path / "nowhere", *options) == says


def test_targets_are_refused_before_any_work(tmp_path: Path, saved: Path, capsys: Any) -> None:
    write = ["--dataset", saved, "--write", "filtered", "--to"]
    nowhere, file, folder = tmp_path / "nowhere", tmp_path / "file", tmp_path / "x.png"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("")
    assert refused(capsys, nowhere, *write, folder) == f"--to {folder} is not empty: give another folder."
    assert refused(capsys, nowhere, *write, file) == f"--to {file} is a file: give a folder."
    assert refused(capsys, nowhere, "--plot", folder) == f"--plot {folder} is a folder."
    assert (
        refused(capsys, nowhere, *write, file / "a" / "b") == f"--to {file}/a/b goes through a file, {file}."
    )
    assert f"--plot {file}/a.png goes through a file" in refused(capsys, nowhere, "--plot", file / "a.png")
    assert f"--to {saved}/new lies inside the data" in refused(capsys, nowhere, *write, saved / "new")
    assert file.read_text() == "mine" and (folder / "mine").is_file()


def test_rows_in_another_order_are_refused(tmp_path: Path, saved: Path, capsys: Any) -> None:
    sample = take_sample(pairs(), np.arange(N))
    assert len(sample) == N and set(sample["0"]) == set(pairs().column_names)
    run = save_run(tmp_path / "run", sample=sample)
    assert "estimated share" in command(capsys, run, "--dataset", saved)
    pairs().shuffle(seed=1).save_to_disk(str(tmp_path / "shuffled"))
    says = refused(
        capsys, run, "--dataset", tmp_path / "shuffled", "--write", "filtered", "--to", tmp_path / "to"
    )
    assert "the data are not those of the run: 'prompt' of the row with example_index 0" in says
    assert not (tmp_path / "to").exists()
    more = pairs().remove_columns("prompt").add_column("mine", [1] * N)  # others are passed over
    more.save_to_disk(str(tmp_path / "more"))
    assert "estimated share" in command(capsys, run, "--dataset", tmp_path / "more")
    moved = pairs().add_column("example_index", np.arange(N)).shuffle(seed=1)  # known by their index
    moved.save_to_disk(str(tmp_path / "moved"))
    assert "estimated share" in command(capsys, run, "--dataset", tmp_path / "moved")


def test_options_of_saved_data_without_effect(run: Path, saved: Path, capsys: Any) -> None:
    assert "--split has no effect" in refused(capsys, run, "--dataset", saved, "--split", "train")
    assert "--config_name has no effect" in refused(capsys, run, "--dataset", saved, "--config_name", "x")


@pytest.mark.parametrize("wrong", [["--writ", "filtered"], ["--write", "shuffled"], ["--top", "some"], []])
def test_argparse_refuses(run: Path, capsys: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        audit.main([str(run), *wrong] if wrong else [])
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib", "datasets", "pyarrow"])
def test_missing_packages(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = refused(capsys, run, "--dataset", saved, "--plot", tmp_path / "figure.png")
    assert f"needs {package}: pip install 'hf_poprisk[recipes]'." in sentence


def test_matplotlib_is_needed_for_figures_only(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "most contradicted" in command(capsys, run)


def test_folders_that_are_not_of_a_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused(capsys, nowhere) == f"{nowhere} is not a folder."
    assert "is not a folder" in refused(capsys, run / TABLE_NAME)
    for name in (TABLE_NAME, FITS_NAME):
        content = (run / name).read_bytes()
        (run / name).unlink()
        assert f"holds no {name}" in refused(capsys, run)
        (run / name).write_bytes(content)
    assert command(capsys, run)


def change(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, [values])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.drop_columns(["suspicion"]), "has no column suspicion"),
        (lambda t: t.drop_columns([INDEX]), "has no column example_index"),
        (lambda t: change(t, "visits", pa.array(np.ones(N))), "visits of .* must hold integers"),
        (lambda t: change(t, "heldout_logodds", pa.array(["x"] * N)), "must hold floating-point numbers"),
        (lambda t: change(t, "loss_mean", pa.array([None] + [1.0] * (N - 1))), "must hold floating-point"),
        (lambda t: change(t, INDEX, pa.array([0] * N)), "has an example_index more than once"),
        (lambda t: change(t, "visits", pa.array([0] * N)), "no example that was trained on"),
        (lambda t: change(t, "suspicion", pa.array([math.nan] * N)), "scores that are not finite"),
        (lambda t: t.slice(0, 0), "no example that was trained on"),
    ],
)
def test_tables_of_something_else(run: Path, capsys: Any, damage: Any, says: str) -> None:
    pq.write_table(damage(pq.read_table(run / TABLE_NAME)), run / TABLE_NAME)
    assert re.search(says, refused(capsys, run))


def test_scores_of_two_moments_are_not_taken_for_one(run: Path, tmp_path: Path, capsys: Any) -> None:
    later = save_run(tmp_path / "later", never=(3,))
    (later / TABLE_NAME).replace(run / TABLE_NAME)
    assert "are not of the same moment" in refused(capsys, run)


@pytest.mark.parametrize("content", [b"", b"no table at all", None])
def test_damaged_table(run: Path, capsys: Any, content: bytes | None) -> None:
    whole = (run / TABLE_NAME).read_bytes()
    (run / TABLE_NAME).write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert f"{TABLE_NAME} cannot be read" in refused(capsys, run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("fits"),
        lambda c: c.pop("mode"),
        lambda c: c.update(mode="sideways"),
        lambda c: c.update(mode=["weight"]),
        lambda c: c.update(preferences="yes"),
        lambda c: c.update(judging_since=1.5),
        lambda c: c.update(fits=3),
        lambda c: c["fits"][0].pop("tau"),
        lambda c: c["fits"][0].update(more=1),
        lambda c: c["fits"][0].update(rate="0.3"),
        lambda c: c["fits"][0].update(rate=math.nan),
        lambda c: c["fits"][0].update(low=0.5),
        lambda c: c["fits"][0].update(rate=0.5, high=0.5),
        lambda c: c["fits"][0].update(tau=0.0),
        lambda c: c["fits"][0].update(num_labels=1),
    ],
)
def test_damaged_fits(run: Path, capsys: Any, damage: Any) -> None:
    content = json.loads((run / FITS_NAME).read_text())
    damage(content)
    (run / FITS_NAME).write_text(json.dumps(content))
    assert f"{FITS_NAME} cannot be read" in refused(capsys, run)


@pytest.mark.parametrize("text", ["", "[]", "{", '"text"', "\ufeff{}"])
def test_fits_that_are_no_json(run: Path, capsys: Any, text: str) -> None:
    (run / FITS_NAME).write_text(text)
    assert f"{FITS_NAME} cannot be read" in refused(capsys, run)


def test_interrupted(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_poprisk.leave_one_out.command.load_run", stop)
    with pytest.raises(SystemExit) as stopped:
        audit.main([str(run)])
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_as_a_module(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["audit.py", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("hf_poprisk", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"python -m hf_poprisk.audit: error: {folder} is not a folder.\n"


def test_help_names_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        audit.main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--dataset", "--split", "--config_name", "--top", "--plot", "--write", "--to"):
        assert re.search(rf"^  {option} .*\n? *\w", out, re.M)


def test_errors_are_of_one_kind(run: Path) -> None:
    (run / TABLE_NAME).unlink()
    with pytest.raises(AuditError):
        audit.load_run(run)


def test_data_from_before_the_labels_were_altered_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run, data = audit.load_run(save_run(folder)), pairs(flips=False)
    check_labels(data, run)  # no record, nothing to say
    record = {"data": {"examples": N, "altered_labels": 15}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "hf_poprisk.leave_one_out.data.load_record", lambda folder: SimpleNamespace(config=record)
        )
        (folder / "poprisk_config.json").write_text("{}")
        with pytest.raises(AuditError, match="15 labels of the run had been altered on purpose"):
            check_labels(data, run)
        check_labels(data.add_column("is_flipped", WRONG), run)
        record["data"]["altered_labels"] = None
        check_labels(data, run)
