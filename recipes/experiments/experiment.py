"""What an experiment is: arms, axes and seeds, a run of one cell, and a CSV file with a row per cell."""

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from common import RecipeError

HERE = Path(__file__).parent
NAMES = (  # the order of the pages
    "double_descent",
    "grokking_add",
    "grokking_divide",
    "image",
    "pinn",
    "text_noise",
    "labels_classes",
    "labels_judged",
    "labels_pairs",
)

Cell = dict[str, Any]  # arm, one value of every axis, seed


@dataclass(frozen=True)
class Report:
    """One table: the result ``select``, of validation data, chooses the settings; ``result`` is shown."""

    select: str
    result: str
    better: str  # lower or higher
    ratio: bool = False  # arms are compared by quotients, as for "times sooner"


@dataclass(frozen=True)
class Experiment:
    """An experiment; the first arm is what the others are compared with."""

    title: str
    verdict: str  # in a few words, for README
    run: Callable[[Cell], dict[str, float | None]]  # options of a cell → results; None: never reached
    arms: dict[str, dict[str, Any]]  # name → options that make it
    reports: Sequence[Report]
    settings: dict[str, Any] = field(default_factory=dict)  # options that all cells share
    facets: dict[str, list[Any]] = field(default_factory=dict)  # axes that are reported value by value
    grid: dict[str, list[Any]] = field(default_factory=dict)  # axes of which validation data choose a point
    seeds: Sequence[int] = (0, 1, 2, 3, 4)  # they draw data, weights and order, the same for every arm
    equal: dict[str, Any] = field(default_factory=dict)  # a point of the grid where arms are compared too
    columns: dict[str, str] = field(default_factory=dict)  # more results to show → their headings

    @property
    def axes(self) -> dict[str, list[Any]]:
        """All that tells one cell from another → its values."""
        return {"arm": list(self.arms), **self.facets, **self.grid, "seed": list(self.seeds)}

    def cells(self, chosen: dict[str, list[Any]] | None = None) -> list[Cell]:
        """All cells, or those with the ``chosen`` values; seed by seed, so that what is there is balanced."""
        axes = self.axes | (chosen or {})
        order = ["seed", *(name for name in axes if name not in ("arm", "seed")), "arm"]
        cells = (dict(zip(order, v, strict=True)) for v in itertools.product(*(axes[n] for n in order)))
        return [{name: cell[name] for name in axes} for cell in cells]

    def options(self, cell: Cell) -> Cell:
        """What ``run`` is given: the settings, the options of the arm, and the cell itself."""
        return self.settings | self.arms[cell["arm"]] | cell

    def declared(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of ``rows`` that are on the grid."""
        known = [rows[name].isin(values) for name, values in self.axes.items()]
        return rows[pd.concat(known, axis=1).all(axis=1)]


def load(name: str) -> Experiment:
    """The experiment of a file in this folder, by its name, or of a Python file elsewhere, by its path."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        sys.path.insert(0, str(path.resolve().parent))
        name = path.stem
    elif name not in NAMES:
        raise RecipeError(f"{name} is no experiment: give one of {', '.join(NAMES)}, or a Python file.")
    found = getattr(importlib.import_module(name), "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise RecipeError(f"{path} defines no EXPERIMENT: see recipes/experiments/README.md.")
    return found


def results_of(name: str) -> Path:
    """Where the results of an experiment are: in ``results``, or beside a file that lies elsewhere."""
    return Path(name).with_suffix(".csv") if name.endswith(".py") else HERE / "results" / f"{name}.csv"


def read(experiment: Experiment, path: Path) -> pd.DataFrame:
    """The finished cells, a row each; empty where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=list(experiment.axes))
    try:
        rows = pd.read_csv(path, engine="python")  # which reads numbers exactly
    except (ValueError, pd.errors.ParserError) as error:
        raise RecipeError(f"{path} is no CSV file: {error}.") from error
    missing = set(experiment.axes) - set(rows.columns)
    if missing:
        raise RecipeError(f"{path} is of another experiment: it has no column {', '.join(sorted(missing))}.")
    return rows
