"""The experiments about the claims: their runner, their tables, and one small run of each."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import save_tiny_model

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "claims")]

import common  # noqa: E402
import controls  # noqa: E402
import double_descent  # noqa: E402
import evidence  # noqa: E402
import grokking  # noqa: E402
import image  # noqa: E402
import pinn  # noqa: E402

from hf_poprisk import PopRiskAdamW  # noqa: E402
from hf_poprisk.gate import null_openness  # noqa: E402

SMALL = {  # options that make a run of an experiment a matter of a second
    "grokking-add": {"steps": 10, "every": 5, "p": 11, "examples_per_step": 16},
    "grokking-divide": {"steps": 10, "every": 5, "p": 13, "width": 16, "examples_per_step": 16},
    "pinn": {"steps": 10, "every": 5},
    "image": {"steps": 10, "every": 5, "size": 24},
    "double-descent": {"steps": 10, "every": 5, "num_train": 200},
    "text-noise": {"epochs": 1, "max_length": 4, "examples_per_step": 128},
}


@pytest.mark.parametrize("path", evidence.experiments(), ids=lambda path: path.stem)
def test_every_arm_of_every_experiment_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, small, ends = evidence.Experiment.load(path), SMALL[path.stem], {}
    if path.stem == "text-noise":
        small = small | {"model": str(save_tiny_model(tmp_path / "model", "llama", tied=True))}
    fit = controls.fit

    def watched(model: Any, *args: Any) -> Any:
        curves = fit(model, *args)
        ends[arm] = torch.cat([p.detach().flatten() for p in model.parameters()])
        return curves

    monkeypatch.setattr(controls, "fit", watched)
    for arm, cell in {cell["arm"]: cell for cell in reversed(experiment.cells())}.items():
        found = evidence.work(experiment.script, cell | {"options": cell["options"] | small})
        names = [name for report in experiment.reports for name in (report["select"], report["report"])]
        assert all(isinstance(found[name], int | float) for name in (*names, *experiment.columns)), arm
        assert len(found[experiment.curve["y"]] if experiment.curve["x"] not in experiment.facets else [1])
    same = {frozenset((a, b)) for a in ends for b in ends if a != b and torch.equal(ends[a], ends[b])}
    assert same <= {frozenset(("adamw", "weight"))}  # no label is judged in the first epoch


def test_cells_are_all_different_and_balanced() -> None:
    for path in evidence.experiments():
        experiment = evidence.Experiment.load(path)
        cells = experiment.cells()
        assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
        counts = [sum(cell["arm"] == arm for cell in cells) for arm in experiment.arms]
        assert len(set(counts)) == 1  # the same budget for every arm
        assert next(iter(experiment.arms.values())) == {"poprisk_gate": "none"}  # against AdamW


def test_the_random_mask_writes_as_much_as_noise_would_open() -> None:
    weight = torch.nn.Parameter(torch.zeros(20000))
    optimizer = controls.RandomMaskAdamW([weight], lr=1.0, weight_decay=0.0, gate="hard")
    for _ in range(8):
        with optimizer.example():
            (weight.sum() / 8).backward()  # every gate would open
    optimizer.close_window()
    optimizer.step()
    assert (weight != 0).float().mean().item() == pytest.approx(null_openness(8, "hard"), abs=0.02)
    assert issubclass(controls.RandomMaskAdamW, PopRiskAdamW)


def test_fit_trains_as_a_loop_of_its_own() -> None:
    """The same steps by hand with torch's AdamW: order of the rows, learning rate and decay arrive."""
    x, y = torch.randn(12, 64), torch.arange(12) % 10
    options = {"seed": 3, "steps": 6, "examples_per_step": 4, "learning_rate": 0.01, "weight_decay": 0.1}
    torch.manual_seed(0)
    model, by_hand = double_descent.Network(8), double_descent.Network(8)
    by_hand.load_state_dict(model.state_dict())
    seen: list[Any] = []
    forward = model.forward
    model.forward = lambda x, labels: (seen.append((x, labels)), forward(x, labels))[1]  # type: ignore[method-assign]
    curves = controls.fit(
        model, controls.Rows(x=x, labels=y), options | {"poprisk_gate": "none"}, lambda s: {"a": s}, 2
    )
    assert curves == {"step": [2, 4, 6], "a": [2, 4, 6]} and len(seen) == 6
    assert sorted(int(row) for _, labels in seen[:3] for row in labels) == sorted(y.tolist())
    weights, biases = ([p for p in by_hand.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for inputs, labels in seen:
        optimizer.zero_grad()
        by_hand(inputs, labels)["loss"].backward()
        optimizer.step()
    for got, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_measuring_may_end_the_training() -> None:
    options = {"seed": 0, "steps": 6, "examples_per_step": 4, "learning_rate": 0.01, "poprisk_gate": "none"}
    data = controls.Rows(x=torch.randn(12, 64), labels=torch.arange(12) % 10)
    curves = controls.fit(double_descent.Network(4), data, options, lambda s: {} if s < 4 else None, 1)
    assert curves == {"step": [1, 2, 3]}


def test_tables_of_an_operation() -> None:
    pairs, quotient = grokking.table("divide", 13)
    assert len(pairs) == 13 * 12 and torch.equal(quotient * pairs[:, 1] % 13, pairs[:, 0])
    pairs, total = grokking.table("add", 5)
    assert pairs[7].tolist() == [1, 2] and total[7] == 3 and len(pairs) == 25


def test_the_network_carries_the_derivatives_of_its_value() -> None:
    model = pinn.Network(8, 2, 5.0).double()
    point = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    one = torch.tensor([[True]])
    (expected,) = torch.autograd.grad(model.rows(point[:, None], one[0]).sum(), point)
    rows = torch.stack(
        [point.detach(), torch.eye(2, dtype=torch.float64)[:1], torch.eye(2, dtype=torch.float64)[1:]], 1
    )
    found = model.rows(rows, torch.tensor([True, False, False]))[0, 1:]
    torch.testing.assert_close(found, expected[0])


def test_the_equation_is_the_one_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a network is zero where u = sin(x - beta t) is put in its place, and only there."""
    model, n = pinn.Network(8, 2, 5.0), 40
    interior = torch.rand(n, 2) * torch.tensor([6.28, 1.0])
    x, t = interior.T.requires_grad_()

    def exact(beta: float) -> torch.Tensor:
        phase, columns = x - beta * t, torch.zeros(n, 6)
        columns[:, pinn.IN_X], columns[:, pinn.IN_T] = phase.cos(), -beta * phase.cos()
        columns[:, pinn.INITIAL] = x.sin()
        return columns

    for beta in (5.0, 4.0):
        monkeypatch.setattr(model, "rows", lambda points, is_value, beta=beta: exact(beta))
        loss = model(interior, x, x.sin(), t)["loss"].item()
        assert (loss < 1e-10) == (beta == 5.0)


def test_the_picture_and_its_early_stop() -> None:
    grey = image.picture(24)
    assert grey.shape == (24, 24) and 0 <= grey.min() < 0.3 < 0.6 < grey.max() <= 1
    cell = evidence.Experiment.load(RECIPES / "claims/image.yaml").cells()[0]["options"]
    options = (
        cell | SMALL["image"] | {"early": True, "steps": 200, "every": 20, "seed": 0, "learning_rate": 0.03}
    )
    found = image.run(options)
    at = found["held_error"].index(min(found["held_error"]))
    assert found["test_psnr"] == found["test_psnrs"][at] and at < 9


EXPERIMENT = {
    "title": "A title",
    "claim": "A claim.",
    "verdict": "A verdict.",
    "script": "double_descent.py",
    "arms": {"adamw": {"poprisk_gate": "none"}, "hard": {"poprisk_gate": "hard"}},
    "grid": {"learning_rate": [0.1, 0.2, 0.3]},
    "seeds": [0, 1],
    "reports": [{"select": "validation_error", "report": "test_error", "better": "lower"}],
    "equal": {"learning_rate": 0.1},
    "curve": {"x": "step", "y": "curve"},
}


def made_up(options: dict[str, Any], arm: str, seed: int, validation: float, test: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "options": EXPERIMENT["arms"][arm] | options,
        "seed": seed,
        "validation_error": validation,
        "test_error": test,
        "step": [1, 2],
        "curve": [test, test],
        "seconds": 30.0,
        "versions": {"torch": "2"},
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty recipes folder of its own."""
    tmp_path /= "recipes"
    tmp_path.mkdir()
    (tmp_path / "claims").mkdir()
    (tmp_path / "results").mkdir()
    for script in RECIPES.glob("claims/*.py"):
        (tmp_path / "claims" / script.name).write_text(script.read_text())
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    return tmp_path


def write(place: Path, rows: list[dict[str, Any]], **changed: Any) -> Path:
    path = place / "claims" / "one.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | changed))
    (place / "results" / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_chooses_by_validation_and_pairs_the_seeds(place: Path) -> None:
    rows = [
        made_up(
            {"learning_rate": rate},
            arm,
            seed,
            validation=1 - rate,
            test=rate + (arm == "hard") * 0.1 * (1 + seed),
        )
        for rate in (0.1, 0.2)
        for arm in ("adamw", "hard")
        for seed in (0, 1)
    ]
    rows.append(made_up({"learning_rate": 0.3}, "hard", 0, validation=0.0, test=0.0))  # one seed of two
    rows.append(made_up({"learning_rate": 0.7}, "hard", 0, validation=0.0, test=0.0))  # not of this grid
    page = evidence.section(write(place, rows))
    assert "| adamw | 0.2 | 0.800 | 0.200 ± 0.000 |  | 0.100 ± 0.000 |  |" in page
    assert "| hard | 0.2 | 0.800 | 0.350 ± 0.050 | +0.150 [-0.485, +0.785] | 0.250 ± 0.050 | +0.150 [" in page
    assert "9 runs, 2 seeds, 4 minutes" in page and "**3 of 12 runs are missing.**" in page
    higher = [{"select": "validation_error", "report": "test_error", "better": "higher"}]
    assert "| adamw | 0.1* | 0.900 | 0.100" in evidence.section(write(place, rows, reports=higher))


def test_facets_are_chosen_for_one_by_one(place: Path) -> None:
    rows = [
        made_up(
            {"width": width, "learning_rate": rate}, arm, seed, abs(rate - width / 10), rate + seed * 0.01
        )
        for width in (1, 2)
        for rate in (0.1, 0.2)
        for arm in ("adamw", "hard")
        for seed in (0, 1)
    ]
    path = write(place, rows, facets={"width": [1, 2]}, equal={}, curve={"x": "width", "y": "test_error"})
    page = evidence.section(path)
    assert "| 1 | 0.105 ± 0.005 (0.1*) | 0.105 ± 0.005 (0.1*) | +0.000 [+0.000, +0.000] |" in page
    assert "| 2 | 0.205 ± 0.005 (0.2) |" in page
    experiment = evidence.Experiment.load(path)
    evidence.draw(experiment, experiment.rows(), place / "a.png")
    assert (place / "a.png").stat().st_size > 5000


def test_run_resumes_and_page_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_train": 100, "noise": 0.2, "examples_per_step": 50, "steps": 4, "every": 2, "width": 8}
    more = {"equal": {}, "grid": {"learning_rate": [0.01]}, "curve": {"x": "step", "y": "test_errors"}}
    path = write(place, [], settings=settings, **more)
    for page in (place / "RESULTS.md", place.parent / "README.md"):
        page.write_text(f"Words\n{evidence.BEGIN}\nold\n{evidence.END}\nmore words\n")
    for expected in ("4 runs, 0 of them", "4 runs, 4 of them"):
        monkeypatch.setattr(sys, "argv", ["evidence.py", "run", str(path)])
        with pytest.raises(SystemExit) as stopped:
            evidence.main()
        printed = capfd.readouterr()
        assert stopped.value.code == 0 and expected in printed.out, printed.err
    rows = evidence.Experiment.load(path).rows()
    assert len(rows) == 4 and all(0 < row["test_error"] < 1 and row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "page"])
    evidence.main()
    page = (place / "RESULTS.md").read_text()
    assert page.startswith("Words\n") and page.endswith("more words\n") and "### A title" in page
    assert "old" not in page and (place / "results" / "one.png").exists()
    assert page == evidence.results_page()
    readme = (place.parent / "README.md").read_text()
    assert "| A title | error | 0." in readme and "| a verdict |" in readme


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": [1]}, "unknown in {}: seed"),
        ({"grid": {"learning_rate": ["1e-3"]}}, "must be numbers: write 1.0e-3"),
        ({"equal": {"learning_rate": 0.5}}, "equal in {} is not on the grid: learning_rate=0.5"),
        ({"reports": [{"select": "a", "report": "b", "better": "up"}]}, "which is lower or higher"),
        ({"script": "none.py"}, "script=none.py is not beside {}"),
        ({"arms": {"adamw": {"poprisk_gat": "none"}}}, "poprisk_gat"),
    ],
)
def test_a_bad_experiment_is_refused(
    place: Path,
    changed: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(place, [], **changed)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "run", str(path)])
    with pytest.raises(SystemExit) as stopped:
        evidence.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message.format(path) in error and error.count("\n") == 1


def test_options_of_the_command_are_checked(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(place, [])
    (place / "RESULTS.md").write_text("no marks")
    for argv, message in (
        (["run", str(path), "--arms", "soft"], "--arms soft: not in"),
        (["run", str(path), "--seeds", "7"], "--seeds 7: not in"),
        (["run", str(place / "none.yaml")], "none.yaml"),
        (["page"], "lost the marks"),
    ):
        monkeypatch.setattr(sys, "argv", ["evidence.py", *argv])
        with pytest.raises(SystemExit) as stopped:
            evidence.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_the_results_page_is_what_the_command_writes() -> None:
    assert (RECIPES / "RESULTS.md").read_text() == evidence.results_page()
    assert (RECIPES.parent / "README.md").read_text() == evidence.readme()
    for path in evidence.experiments():
        experiment = evidence.Experiment.load(path)
        assert not experiment.rows() or (RECIPES / "results" / f"{path.stem}.png").exists()


def test_a_missing_model_is_said() -> None:
    cell = evidence.Experiment.load(RECIPES / "claims/text-noise.yaml").cells()[0]
    with pytest.raises(common.RecipeError, match=r"model=outputs/none is not a folder"):
        evidence.work("text.py", cell | {"options": cell["options"] | {"model": "outputs/none"}})
