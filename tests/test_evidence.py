"""The experiments about the claims: their runner, their tables, and one small run of each."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
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
import overview  # noqa: E402
import pages  # noqa: E402
import pinn  # noqa: E402
from experiment import Experiment, experiments, module, work  # noqa: E402
from figure import draw  # noqa: E402
from sweep import run_cells  # noqa: E402

from hf_poprisk import PopRiskAdamW  # noqa: E402

SMALL = {  # options that make a run of an experiment a matter of a second
    "grokking-add": {"steps": 10, "every": 5, "p": 11, "examples_per_step": 16},
    "grokking-divide": {"steps": 10, "every": 5, "p": 13, "width": 16, "examples_per_step": 16},
    "pinn": {"steps": 10, "every": 5},
    "image": {"steps": 10, "every": 5, "size": 24},
    "double-descent": {"steps": 10, "every": 5, "num_train": 200},
    "text-noise": {"epochs": 2, "max_length": 4, "examples_per_step": 128},
}


@pytest.mark.parametrize("path", experiments(), ids=lambda path: path.stem)
def test_every_arm_of_every_experiment_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, small, ends = Experiment.load(path), SMALL[path.stem], {}
    if path.stem == "text-noise":
        small = small | {"model": str(save_tiny_model(tmp_path / "model", "llama", tied=True))}
    fit = controls.fit

    def watched(model: Any, *args: Any) -> Any:
        curves = fit(model, *args)
        ends[arm] = torch.cat([p.detach().flatten() for p in model.parameters()])
        return curves

    monkeypatch.setattr(controls, "fit", watched)
    for arm, cell in {cell["arm"]: cell for cell in reversed(experiment.cells())}.items():
        found = work(path.parent / experiment.script, cell | {"options": cell["options"] | small})
        names = [name for report in experiment.reports for name in (report["select"], report["report"])]
        assert all(isinstance(found[name], int | float | None) for name in (*names, *experiment.columns)), arm
        assert set(module(path.parent / experiment.script).RESULTS) <= set(found)
        assert len(found[experiment.curve["y"]] if experiment.curve["x"] not in experiment.facets else [1])
    same = {frozenset((a, b)) for a in ends for b in ends if a != b and torch.equal(ends[a], ends[b])}
    assert same <= {frozenset(("adamw", "weight"))}  # the model is too small to judge


def test_cells_are_all_different_and_balanced() -> None:
    for path in experiments():
        experiment = Experiment.load(path)
        cells = experiment.cells()
        assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
        counts = [sum(cell["arm"] == arm for cell in cells) for arm in experiment.arms]
        assert len(set(counts)) == 1  # the same budget for every arm
        assert next(iter(experiment.arms.items())) == ("adamw", {"poprisk_gate": "none"})


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_the_random_mask_writes_as_much_as_the_gate(gate: str) -> None:
    signal = torch.linspace(-1, 1, 20000)
    gradients = [torch.randn(20000) + signal for _ in range(8)]
    written = []
    for kind in (PopRiskAdamW, controls.RandomMaskAdamW):
        weight = torch.nn.Parameter(torch.zeros(20000))
        optimizer = kind([weight], lr=1.0, weight_decay=0.0, gate=gate)
        for gradient in gradients:
            with optimizer.example():
                (weight * gradient).sum().backward()
        optimizer.step()
        written.append(weight.detach().abs())  # the first step of Adam is lr, times q
    assert written[1].mean().item() == pytest.approx(written[0].mean().item(), rel=0.05)
    assert set(written[1].round(decimals=3).tolist()) == {0.0, 1.0}  # a mask, and not by the signal
    assert abs(torch.corrcoef(torch.stack([written[1], signal.abs()]))[0, 1]) < 0.03


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
    for changed, message in (
        ({"steps": 5}, "steps=5 must be a multiple of every=2"),
        ({"examples_per_step": 13}, "examples_per_step=13 of 12 examples"),
        ({"random_mask": True}, "random_mask takes the place of a gate"),
    ):
        with pytest.raises(common.RecipeError, match=message):
            controls.fit(double_descent.Network(4), data, options | changed, lambda s: {}, 2)


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


def test_the_loss_is_that_of_the_equation() -> None:
    """Against the value and its derivatives by autograd."""
    model = pinn.Network(8, 2, 5.0).double()
    interior = torch.rand(20, 2, dtype=torch.float64) * torch.tensor([2 * math.pi, 1.0])
    initial, labels, times = torch.rand(3, 20, dtype=torch.float64)
    points = interior.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.u(points).sum(), points)
    zero, end = torch.zeros(20), torch.full((20,), 2 * math.pi)
    at_start = model.u(torch.stack([initial, zero], 1))
    left, right = (model.u(torch.stack([x, times], 1)) for x in (zero, end))
    expected = (slope[:, 1] + 5.0 * slope[:, 0]) ** 2 + (at_start - labels) ** 2 + (left - right) ** 2
    assert min(part.mean() for part in ((at_start - labels) ** 2, (left - right) ** 2)) > 1e-3
    found = model(interior, initial, labels, times)["loss"]
    torch.testing.assert_close(found, expected.mean(), check_dtype=False, rtol=1e-5, atol=0)


def cell_of(name: str, **options: Any) -> dict[str, Any]:
    """The options of an experiment's first cell, with others in place of some."""
    cell = Experiment.load(RECIPES / f"claims/{name}.yaml").cells()[0]
    return cell["options"] | SMALL[name] | {"seed": 0} | options


def never_trained(model: Any, data: Any, options: Any, measure: Any, every: int) -> dict[str, list[float]]:
    measured = measure(every)
    return {"step": [every], **{name: [value] for name, value in measured.items()}}


def test_psnr_is_that_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "fit", never_trained)
    monkeypatch.setattr(image, "picture", lambda size: np.full((size, size), 0.25))
    monkeypatch.setattr(
        image.Network, "forward", lambda self, points, labels: {"logits": points[:, 0] * 0 + 0.35}
    )
    found = image.run(cell_of("image"))
    assert found["test_psnr"] == pytest.approx(20.0, abs=1e-3)  # an error of 0.1
    assert found["noisy_psnr"] == pytest.approx(-20 * math.log10(0.18), abs=0.7)  # 0.2, cut at 0


def test_the_picture_is_one() -> None:
    grey = image.picture(24)
    assert grey.shape == (24, 24) and 0 <= grey.min() < 0.3 < 0.6 < grey.max() <= 1


def test_early_stopping_looks_at_noisy_data_that_were_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on: list[Any] = []
    looked_at: list[tuple[Any, float]] = []

    def made_up_fit(model: Any, data: Any, options: Any, measure: Any, every: int) -> dict[str, list[float]]:
        trained_on.append(data)
        found = measure(every)
        looked_at.extend((model, value) for name, value in found.items() if name.startswith("held_"))
        names = [name for name in found if name != "step"]
        curves = {name: [0.1, 0.2, 0.3, 0.4] for name in names}
        held = [name for name in names if name.startswith("held_")]
        return {"step": [1, 2, 3, 4], **curves, **{name: [0.5, 0.3, float("nan"), 0.4] for name in held}}

    for script, name, result in (
        (image, "image", "test_psnr"),
        (double_descent, "double-descent", "test_error"),
        (pinn, "pinn", "test_error"),
    ):
        monkeypatch.setattr(script, "fit", made_up_fit)
        plain, early = script.run(cell_of(name)), script.run(cell_of(name, early=True))
        assert plain[result] == 0.4 and early[result] == 0.2 and early["step"] == [1, 2], name
        every, fewer = trained_on[-2:]
        assert len(fewer) == len(every) - len(every) // 10, name
        kept = {key_of(row) for row in next(iter(fewer._columns.values()))}
        apart = [i for i, row in enumerate(next(iter(every._columns.values()))) if key_of(row) not in kept]
        rows, (model, value) = every.__getitems__(apart), looked_at[-1]  # as noisy as they were given
        if script is double_descent:
            error = model(**rows)["loss"]
        else:
            start = torch.zeros(len(apart))
            values = (
                model.u(torch.stack([rows["initial"], start], 1))
                if script is pinn
                else model(**rows)["logits"].clamp(0, 1)
            )
            error = (values - rows["labels"]).square().mean()
        assert value == pytest.approx(error.item(), rel=1e-5), name


def key_of(row: torch.Tensor) -> tuple[float, ...]:
    return tuple(row.flatten().tolist())


def test_wrong_labels_are_as_many_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        double_descent, "fit", lambda model, data, *a: (seen.append(data), never_trained(model, data, *a))[1]
    )
    for noise in (0.0, 0.2):
        double_descent.run(cell_of("double-descent", noise=noise))
    clean, noisy = (data.__getitems__(list(range(200)))["labels"] for data in seen)
    assert (clean != noisy).sum() == 40 and len(set(noisy[clean != noisy].tolist())) > 5


def test_the_first_crossing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def crossing(model: Any, data: Any, options: Any, measure: Any, every: int) -> dict[str, list[float]]:
        for step in range(every, 10 * every, every):
            right = step in (2 * every, 4 * every)
            monkeypatch.setattr(model, "logits", lambda pairs, right=right: one_hot(pairs, right))
            if measure(step) is None:
                break
        return {"step": [step]}

    def one_hot(pairs: torch.Tensor, right: bool) -> torch.Tensor:
        return torch.nn.functional.one_hot((pairs.sum(1) + (not right)) % 11, 11).float()

    monkeypatch.setattr(grokking, "fit", crossing)
    found = grokking.run(cell_of("grokking-add"))
    assert found["test_steps"] == found["validation_steps"] == 10 and found["step"] == [15]
    monkeypatch.setattr(grokking, "fit", never_trained)
    assert grokking.run(cell_of("grokking-add"))["test_steps"] is None


EXPERIMENT = {
    "title": "A title",
    "claim": "A claim.",
    "verdict": "It is 1.5 times a verdict.",
    "short": "supported",
    "script": "double_descent.py",
    "arms": {"adamw": {"poprisk_gate": "none"}, "hard": {"poprisk_gate": "hard"}},
    "grid": {"learning_rate": [0.1, 0.2, 0.3]},
    "seeds": [0, 1],
    "reports": [{"select": "validation_error", "report": "test_error", "better": "lower"}],
    "equal": {"learning_rate": 0.1},
    "curve": {"x": "step", "y": "test_errors"},
}


def made_up(options: dict[str, Any], arm: str, seed: int, validation: float, test: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "options": EXPERIMENT["arms"][arm] | options,
        "seed": seed,
        "validation_error": validation,
        "test_error": test,
        "step": [1, 2],
        "test_errors": [test, test],
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
    for file in ("results/label_noise.jsonl", "results/fresh_seeds.jsonl", "label_noise.yaml"):
        (tmp_path / file).write_text((RECIPES / file).read_text())
    monkeypatch.setattr(common, "ROOT", tmp_path)
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
    page = pages.section(write(place, rows))
    assert "| adamw | 0.2 | 0.800 | 0.200 ± 0.000 |  | 0.100 ± 0.000 |  |" in page
    assert "| hard | 0.2 | 0.800 | 0.350 ± 0.050 | +0.150 [-0.485, +0.785] | 0.250 ± 0.050 | +0.150 [" in page
    assert "9 runs, 2 seeds, 4 minutes" in page and "**3 of 12 runs are missing.**" in page
    higher = [{"select": "validation_error", "report": "test_error", "better": "higher"}]
    assert "| adamw | 0.1* | 0.900 | 0.100" in pages.section(write(place, rows, reports=higher))


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
    curve = {"x": "width", "y": "test_error", "dashed": "validation_error", "log": "x"}
    path = write(place, rows, facets={"width": [1, 2]}, equal={}, curve=curve)
    page = pages.section(path)
    assert "| 1 | 0.105 ± 0.005 (0.1*) | 0.105 ± 0.005 (0.1*) | +0.000 [+0.000, +0.000] |" in page
    assert "| 2 | 0.205 ± 0.005 (0.2) |" in page
    experiment = Experiment.load(path)
    draw(experiment, experiment.rows(), place / "a.png")
    assert (place / "a.png").stat().st_size > 5000


def test_who_never_got_there_is_not_averaged(place: Path) -> None:
    rows = [
        made_up({"learning_rate": rate}, arm, seed, validation=value, test=value)
        for rate, values in (
            (0.1, {"adamw": (100, 200), "hard": (200, 400)}),
            (0.2, {"adamw": (50, None), "hard": (None, None)}),
        )
        for arm, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    report = {"select": "validation_error", "report": "test_error", "better": "lower", "ratio": True}
    page = pages.section(write(place, rows, reports=[report], equal={"learning_rate": 0.2}))
    assert "| adamw | 0.1* | 150 | 150 ± 50 |  | 1 of 2, at 50 |  |" in page
    assert "| hard | 0.1* | 300 | 300 ± 100 | ×2.00 [2.00, 2.00] | 0 of 2 | – |" in page


def test_a_gate_is_held_against_adamw_and_its_own_mask(place: Path) -> None:
    arms = EXPERIMENT["arms"] | {
        "random-mask": {"poprisk_gate": "hard", "random_mask": True},
        "soft": {"poprisk_gate": "soft"},
    }
    errors = {"adamw": 0.5, "random-mask": 0.2, "hard": 0.3}
    rows = [
        made_up({"learning_rate": 0.1}, "adamw", seed, 0.0, errors[arm] + 0.01 * seed * (arm == "hard"))
        | {"arm": arm, "options": arms[arm] | {"learning_rate": 0.1}}
        for arm in errors
        for seed in (0, 1, 2)
    ]
    experiment = Experiment.load(write(place, rows, arms=arms, seeds=[0, 1, 2]))
    lines = overview.overview([experiment], []).splitlines()
    against = ["-0.190 [-0.215, -0.165]", "+0.110 [+0.085, +0.135]", "–", "–"]
    assert lines[2] == f"| one: error | {' | '.join(['0.500 ± 0.000', *against, '3'])} |"
    counts = ["1, 1 better, 0 worse", "1, 0 better, 1 worse", *["0, 0 better, 0 worse"] * 2]
    assert lines[3] == f"| intervals |  | {' | '.join(counts)} |  |"
    report = {"report": "steps", "better": "lower", "ratio": True}
    base = [{"seed": seed, "steps": 8} for seed in (0, 1, 2)]
    for steps, expected in (
        ((2, 2, 3), 1),
        ((16, 16, 15), -1),
        ((4, 16, 8), 0),
        ((2, None, 2), None),
        ((2, 2), None),
    ):
        mine = [{"seed": seed, "steps": n} for seed, n in enumerate(steps)]
        assert overview.verdict(mine, base, report) == expected, steps


def test_a_finished_run_stays_where_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.axes

    rows = [made_up({"learning_rate": 0.1}, "adamw", seed, 0.0, 0.0) for seed in (0, 1)]
    rows[0] |= {"step": [1, 2, 3], "test_errors": [0.0, 0.2, 0.4]}
    rows[1] |= {"step": [1], "test_errors": [1.0]}
    experiment = Experiment.load(write(place, rows))
    drawn: list[Any] = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, *a, **k: (drawn.append(a), plot(self, *a, **k))[1]
    )
    draw(experiment, experiment.rows(), place / "a.png")
    assert drawn[0][0] == [1, 2, 3] and drawn[0][1].tolist() == pytest.approx([0.5, 0.6, 0.7])


def test_run_resumes_and_page_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_train": 100, "noise": 0.2, "examples_per_step": 50, "steps": 4, "every": 2, "width": 8}
    more = {"equal": {}, "grid": {"learning_rate": [0.01]}, "curve": {"x": "step", "y": "test_errors"}}
    path = write(place, [], settings=settings, **more)
    for page, names in (
        (place / "RESULTS.md", ["overview", "experiments"]),
        (place / "LABEL_NOISE.md", ["aims", "fresh", "tables"]),
        (place.parent / "README.md", ["summary", "labels"]),
    ):
        parts = [f"{pages.BEGIN.format(name)}\nold\n{pages.END}\n" for name in names]
        page.write_text(f"Words\n{''.join(parts)}more words\n")
    for expected in ("4 runs, 0 of them", "4 runs, 4 of them"):
        monkeypatch.setattr(sys, "argv", ["evidence.py", "run", str(path)])
        with pytest.raises(SystemExit) as stopped:
            evidence.main()
        printed = capfd.readouterr()
        assert stopped.value.code == 0 and expected in printed.out, printed.err
        assert "| adamw | 0.01 |" in printed.out
    rows = Experiment.load(path).rows()
    assert len(rows) == 4 and all(0 < row["test_error"] < 1 and row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "page"])
    evidence.main()
    page = (place / "RESULTS.md").read_text()
    assert page.startswith("Words\n") and page.endswith("more words\n") and "### A title" in page
    assert "old" not in page and (place / "results" / "one.png").exists()
    assert all(path.read_text() == content for path, content in pages.pages().items())
    readme = (place.parent / "README.md").read_text()
    assert "| A title | error | 0." in readme and "| supported |" in readme


def test_an_interrupted_run_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "run_cells", interrupted)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "run", str(write(place, []))])
    with pytest.raises(SystemExit) as stopped:
        evidence.main()
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path, cells = tmp_path / "notes.json", [{"arm": "adamw", "seed": 0}]
    row = json.dumps({**cells[0], "seconds": 1.0})
    for tail in ('{"mine": 1}', "x", row[1:]):
        path.write_text(tail)
        with pytest.raises(common.RecipeError, match="the last line of .* is not of this script: remove it"):
            run_cells(cells, work, path, processes=1)
        assert path.read_text() == tail
    for tail in (row[:1], row[:9], row[:-1]):  # a run that was cut off
        path.write_text(f"{row}\n{tail}")
        assert run_cells(cells, work, path, processes=1) == 0 and path.read_text() == f"{row}\n"


def test_an_experiment_of_ones_own_lies_elsewhere(tmp_path: Path, place: Path) -> None:
    here = tmp_path / "mine"
    here.mkdir()
    written = write(place, [])
    (here / "one.yaml").write_text(written.read_text())
    with pytest.raises(common.RecipeError, match="not a Python file beside"):
        Experiment.load(here / "one.yaml")
    (here / "double_descent.py").write_text((RECIPES / "claims/double_descent.py").read_text())
    assert Experiment.load(here / "one.yaml").results == here / "one.jsonl"
    assert Experiment.load(written).results == place / "results" / "one.jsonl"


def test_what_is_not_finite_is_no_result(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("def run(cell): return {'a': float('nan'), 'b': 1.0, 'c': [float('nan')]}\n")
    found = work(script, {"options": {}, "seed": 0})
    assert found["a"] is None and found["b"] == 1.0 and math.isnan(found["c"][0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": [1]}, "unknown in {}: seed"),
        (
            {"grid": {"learning_rate": ["1e-3"]}},
            "learning_rate in the grid or the facets of {} must be a list of numbers",
        ),
        ({"grid": {"learning_rate": 0.1}}, "must be a list of numbers"),
        ({"settings": {"learning_rate": "1e-3"}, "grid": {}, "equal": {}}, "is text to YAML: write 1.0e-3"),
        ({"arms": {"adamw": None}}, "every arm of {} needs options"),
        ({"seeds": [0, 0]}, "seeds in {} must be different whole numbers"),
        ({"curve": {"x": "step", "y": "test_errors", "xlable": "a"}}, "curve in {} has x, y, dashed"),
        ({"curve": {"x": "step", "y": "test_errors", "log": "z"}}, "curve in {} has x, y, dashed"),
        ({"curve": {"x": "step", "y": "test_eror"}}, "double_descent.py returns no test_eror, shown by {}"),
        ({"columns": {"trian_error": "a"}}, "returns no trian_error"),
        ({"equal": {"learning_rate": 0.5}}, "equal in {} is not on the grid: learning_rate=0.5"),
        ({"reports": [{"select": "a", "report": "b", "better": "up"}]}, "which is lower or higher"),
        ({"script": "none.py"}, "script=none.py is not a Python file beside {}"),
        ({"arms": {"adamw": {"poprisk_gat": "none"}}}, "nothing reads poprisk_gat of {}"),
        ({"arms": {"adamw": {"poprisk_gate": "med"}}}, "the arm adamw of {}: poprisk_gate"),
        ({"settings": {"max_steps": 3}}, "nothing reads max_steps of {}"),
        ({"arms": {"adamw": {"learning_rate": 0.1}}}, "learning_rate is given in two places of {}"),
        ({"facets": {"width": [1]}}, "equal and columns have no effect with the facets"),
        ({"seeds": 3}, "seeds in {} must be a list with something in it"),
        ({"arms": []}, "arms in {} must be a mapping"),
        ({"curve": {}}, "curve in {} must be a mapping with something in it"),
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


def test_the_pages_are_what_the_command_writes() -> None:
    assert {path.name for path in pages.pages()} == {"RESULTS.md", "LABEL_NOISE.md", "README.md"}
    for path, content in pages.pages().items():
        assert path.read_text() == content, path
    for path in experiments():
        experiment = Experiment.load(path)
        assert not experiment.rows() or (RECIPES / "results" / f"{path.stem}.png").exists()


def test_a_missing_model_is_said() -> None:
    cell = Experiment.load(RECIPES / "claims/text-noise.yaml").cells()[0]
    with pytest.raises(common.RecipeError, match=r"model=outputs/none is not a folder"):
        work(RECIPES / "claims/text.py", cell | {"options": cell["options"] | {"model": "outputs/none"}})
