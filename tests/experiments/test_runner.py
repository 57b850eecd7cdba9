"""The experiments' runner, tables and pages: a made-up experiment, and the results as they are."""

import dataclasses
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import common
import experiment as system
import filelock
import labels_tables
import page
import pandas as pd
import pytest
import run
import tables
from experiment import Experiment, Report

MADE_UP = """
from pathlib import Path
from experiment import Experiment, Report

def work(cell):
    log = Path(__file__).with_name("log")
    log.write_text((log.read_text() if log.exists() else "") + "x")
    if Path(__file__).with_name("stop").exists() and len(log.read_text()) > 1:
        raise KeyboardInterrupt
    if cell["shift"] < 0:
        raise ValueError("below zero")
    test = cell["rate"] + cell["shift"]
    return {"validation_error": cell["rate"], "test_error": test, "lost": float("nan")}

EXPERIMENT = Experiment(
    title="A title", verdict="supported", run=work, arms={"adamw": {"shift": 0.0}, "hard": {"shift": 1 / 3}},
    grid={"rate": [0.1]}, seeds=[0], reports=[Report("validation_error", "test_error", "lower")],
)
"""


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    path = tmp_path / f"made_up_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(MADE_UP)
    return path


def test_two_cells_run_resume_and_are_skipped_when_finished(
    made_up: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.with_name("stop").touch()
    with pytest.raises(KeyboardInterrupt):  # in the second cell
        run.main([str(made_up)])
    results = made_up.with_suffix(".csv")
    assert len(pd.read_csv(results)) == 1  # what was finished is there
    made_up.with_name("stop").unlink()
    for already in (1, 2):
        capsys.readouterr()
        assert run.main([str(made_up)]) == 0
        printed = capsys.readouterr().out
        assert f"2 cells, {already} of them in" in printed
        assert made_up.with_name("log").read_text() == "xxx"
    assert "| hard | 0.1 | 0.433 | +0.333 |" in printed
    rows = pd.read_csv(results)
    assert rows["test_error"].tolist() == [0.1, 0.433333] and rows["lost"].isna().all()
    assert list(rows)[:3] == ["arm", "rate", "seed"] and (rows["seconds"] >= 0).all()


def test_a_cell_that_fails_leaves_the_others(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up.write_text(MADE_UP.replace("1 / 3", "-1.0"))
    assert run.main([str(made_up)]) == 1
    assert "ValueError: below zero" in capsys.readouterr().err
    assert pd.read_csv(made_up.with_suffix(".csv"))["arm"].tolist() == ["adamw"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("nothing", "nothing is no experiment: give one of double_descent"),
        ("{}/empty.py", "defines no EXPERIMENT"),
        ("{}/made_up.py --arm soft", "--arm soft is none of adamw, hard."),
        ("{}/made_up.py --arm soft --out a.csv", "--arm soft is none of"),
        ("{}/made_up.py --rate 0.2", "--rate 0.2 is none of 0.1; with --out FILE it may be another."),
        ("{}/made_up.py --jobs 0", "--jobs must be at least 1"),
        ("{}/made_up.py --out {}/other.csv", "it has no column arm, rate, seed"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(
    argv: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name, text in (("made_up", MADE_UP), ("empty", "")):
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    monkeypatch.setattr(run, "work", lambda *args: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["run.py", *argv.replace("{}", str(tmp_path)).split()])
    with pytest.raises(SystemExit, match=f"run.py: error: .*{re.escape(message)}") as refused:
        common.run(lambda: run.main(sys.argv[1:]))
    assert "\n" not in str(refused.value)


def test_one_process_writes_to_a_file(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(self: Any, *args: Any, **kwargs: Any) -> None:
        raise filelock.Timeout("lock")

    monkeypatch.setattr(filelock.FileLock, "acquire", held)
    with pytest.raises(common.RecipeError, match="another run is writing to"):
        run.main([str(made_up)])


def test_cells_run_side_by_side_with_values_of_ones_own(made_up: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.csv"
    own = ["--arm", "adamw", "--rate", "0.5", "--seed", "0", "1", "--jobs", "2", "--out", str(out)]
    assert run.main([str(made_up), *own]) == 0
    rows = pd.read_csv(out)
    assert rows["rate"].tolist() == [0.5, 0.5] and sorted(rows["seed"]) == [0, 1]
    assert not made_up.with_suffix(".csv").exists()


@pytest.mark.parametrize("name", system.NAMES)
def test_every_experiment_is_well_formed(name: str) -> None:
    experiment = system.load(name)
    cells = experiment.cells()
    assert len({tuple(cell.values()) for cell in cells}) == len(cells)
    assert all(list(cell) == list(experiment.axes) for cell in cells)
    counts = [sum(cell["arm"] == arm for cell in cells) for arm in experiment.arms]
    assert len(set(counts)) == 1  # the same budget for every arm
    first = ("gradients", {"features": "gradients"}) if name == "labels_judged" else None
    assert next(iter(experiment.arms.items())) == (first or ("adamw", {"poprisk_gate": "none"}))
    rows = system.read(experiment, system.results_of(name))
    assert not rows.duplicated(list(experiment.axes)).any()
    assert len(experiment.declared(rows)) == len(rows)
    shown = {r for report in experiment.reports for r in (report.select, report.result)}
    assert shown | set(experiment.columns) <= set(rows)


def test_the_pages_agree_with_the_results() -> None:
    named = []
    for path in page.PAGES:
        text = path.read_text()
        assert page.written(text) == text, f"{path.name}: run python recipes/experiments/page.py"
        assert text.count("<!-- generated: ") == len(found := page.MARKED.findall(text))
        named += [name for _, name, _ in found]
    assert len(set(named)) == len(named) and set(named) <= set(page.PARTS)
    assert set(page.PARTS) - {"summary", "labels"} <= set(named)
    with pytest.raises(common.RecipeError, match="nonsense is no generated part"):
        page.written(
            "<!-- generated: python a.py, nonsense -->\n<!-- b -->\n<!-- end of the generated part -->"
        )


def test_the_answer_has_the_numbers_of_the_tables() -> None:
    answer = (page.HERE / "README.md").read_text().partition("The source's claims")[0]
    tables = "".join(match[0] for path in page.PAGES for match in page.MARKED.finditer(path.read_text()))
    told = set(re.findall(r"0\.\d{3}", answer))
    assert len(told) == 10 and told <= set(re.findall(r"0\.\d{3}", tables))
    assert "| intervals | 21, 11 better, 2 worse | 21, 0 better, 3 worse |" in tables
    assert "| 21, 2 better, 2 worse |  |" in tables


def test_every_link_of_a_page_leads_somewhere() -> None:
    root = page.ROOT
    pages = [root / "README.md", *(root / "recipes").rglob("*.md"), page.GUIDE]
    for path in pages:
        for target, anchor in re.findall(r"\]\(([^:)#]*)(#[^)]*)?\)", path.read_text()):
            file = path.parent / target if target else path
            assert file.exists(), (path, target)
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.M) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor[1:] in anchors, (path, target, anchor)


def test_the_results_are_small() -> None:
    files = list((page.HERE / "results").iterdir())
    assert sum(path.stat().st_size for path in files) < 1_000_000
    figures = [path for path in files if path.suffix == ".png"]
    assert len(figures) <= 4 and all(path.stat().st_size < 60_000 for path in figures)


def experiment_of(**changed: Any) -> Experiment:
    plain = Experiment(
        title="A title",
        verdict="supported",
        run=lambda cell: {},
        arms={"adamw": {}, "hard": {}},
        reports=[Report("validation_error", "test_error", "lower")],
        grid={"learning_rate": [0.1, 0.2, 0.3]},
        seeds=[0, 1],
        equal={"learning_rate": 0.1},
    )
    return dataclasses.replace(plain, **changed)


def frame(*rows: tuple[str, float, int, float | None, float | None], **more: Any) -> pd.DataFrame:
    names = ("arm", "learning_rate", "seed", "validation_error", "test_error")
    return pd.DataFrame([dict(zip(names, row, strict=True)) | more for row in rows])


def test_the_table_chooses_by_validation_and_pairs_the_seeds() -> None:
    places = [(arm, rate, seed) for rate in (0.1, 0.2) for arm in ("adamw", "hard") for seed in (0, 1)]
    rows = [(a, rate, seed, 1 - rate, rate + (a == "hard") * 0.1 * (1 + seed)) for a, rate, seed in places]
    rows.append(("hard", 0.3, 0, 0.0, 0.0))  # one seed of two
    experiment = experiment_of()
    found = experiment.declared(frame(*rows, ("hard", 0.7, 0, 0.0, 0.0)))  # not of this grid
    assert len(found) == 9
    printed = tables.table(experiment, found, experiment.reports[0])
    assert "| adamw | 0.2* | 0.200 ± 0.000 |  | 0.100 ± 0.000 |  |" in printed
    assert "| hard | 0.2 | 0.350 ± 0.050 | +0.150 [-0.485, +0.785] | 0.250 ± 0.050 | +0.150 [" in printed
    higher = dataclasses.replace(experiment.reports[0], better="higher")
    assert "| adamw | 0.1* | 0.100" in tables.table(experiment, found, higher)


def test_facets_are_chosen_for_one_by_one() -> None:
    experiment = experiment_of(facets={"width": [1, 2]}, equal={})
    axes = ((1, 2), (0.1, 0.2), ("adamw", "hard"), (0, 1))
    rows = [
        frame((arm, rate, seed, abs(rate - width / 10), rate + seed * 0.01), width=width)
        for width, rate, arm, seed in itertools.product(*axes)
    ]
    printed = tables.table(experiment, pd.concat(rows), experiment.reports[0])
    assert "| 1 | 0.105 ± 0.005 (0.1*) | +0.000 [+0.000, +0.000] (0.1*) |" in printed
    assert "| 2 | 0.205 ± 0.005 (0.2*) |" in printed


def test_who_never_got_there_is_not_averaged() -> None:
    values = {(0.1, "adamw"): (100, 200), (0.1, "hard"): (200, 400)}
    values |= {(0.2, "adamw"): (50, None), (0.2, "hard"): (None, None)}
    rows = [(arm, r, s, x, x) for (r, arm), pair in values.items() for s, x in enumerate(pair)]
    report = Report("validation_error", "test_error", "lower", ratio=True)
    printed = tables.table(experiment_of(equal={"learning_rate": 0.2}), frame(*rows), report)
    assert "| adamw | 0.1* | 150 ± 50 |  | 1 of 2, at 50 |  |" in printed
    assert "| hard | 0.1* | 300 ± 100 | ×2.00 [2.00, 2.00] | 0 of 2 | – |" in printed


def test_a_gate_is_held_against_adamw_and_its_own_mask() -> None:
    tests = {"adamw": [0.5] * 3, "random-mask": [0.2] * 3, "hard": [0.3, 0.31, 0.32]}
    rows = [(arm, 0.1, seed, 0.0, x) for arm, errors in tests.items() for seed, x in enumerate(errors)]
    experiment = experiment_of()
    entries, verdicts = page.beside_masks(frame(*rows), experiment, experiment.reports[0])
    assert entries == ["-0.190 [-0.215, -0.165]", "+0.110 [+0.085, +0.135]", "–", "–", "3"]
    assert verdicts == [1, -1, None, None]
    report = Report("steps", "steps", "lower", ratio=True)
    base = pd.DataFrame({"seed": [0, 1, 2], "steps": 8})
    known = {(2, 2, 3): 1, (16, 16, 15): -1, (4, 16, 8): 0, (2, None, 2): None, (2, 2): None}
    for steps, expected in known.items():
        mine = pd.DataFrame({"seed": range(len(steps)), "steps": steps})
        assert page.verdict(mine, base, report) == expected, steps


def test_weight_is_held_against_what_it_should_beat() -> None:
    def row(arm: str, rate: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
        plain = {"data": "digits", "noise": 0.3, "arm": arm, "learning_rate": rate, "seed": seed}
        scores = {"validation_accuracy": validation, "test_accuracy": test, "test_accuracy_best": test}
        return plain | scores | {"noise_rate": None, "auroc_suspicion": None} | more

    rows = [row("adamw", rate, seed, 0.5 + rate, 0.6 - rate) for rate in (0.1, 0.2) for seed in (0, 1)]
    rows += [
        row("weight", 0.2, seed, 0.9, 0.39 + 0.02 * seed, noise_rate=0.3 + seed, auroc_suspicion=0.9 + seed)
        for seed in (0, 1)
    ]
    rows += [row("adamw", 0.1, 0, 0.5, 0.6, noise=0.0)]  # beside nothing
    _, _, *lines = labels_tables.aims(pd.DataFrame(rows)).splitlines()
    start = ["digits, 30 %", "0.400", "0.400", "+0.000 [-0.127, +0.127]", "1 of 2"]
    rest = ["-0.100 [-0.227, +0.027]", "+0.000 to +0.000", "0.30 to 1.30", "0.900"]
    assert lines == [f"| {' | '.join([*start, *rest])} |"]
    only = [row("adamw", 0.1, 0, 0.5, 0.6), row("weight", 0.2, 0, 0.9, 0.7, noise_rate=0.3)]
    found = labels_tables.aims(pd.DataFrame(only))
    assert "| 0.600 | 0.700 | +0.100 | 1 of 1 | +0.100 | – | 0.30 to 0.30 | – |" in found
