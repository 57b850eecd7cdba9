"""Experiments: what one is, and how it is checked.

An experiment is a YAML file with these keys:

    title, claim, verdict: words for the page
    short:     the verdict in README: supported, supported only at equal learning rate, not supported here
    script:    the Python file beside it, with ``run(cell) -> dict``, and the names of its ``OPTIONS`` and of
               its ``RESULTS``
    settings:  options that all runs share
    arms:      name → options that make the arm; the first one is the baseline
    grid:      option → values, the same for every arm; ``select`` chooses the best point, on average
    facets:    option → values, reported one by one
    seeds:     one run each; they draw the data, the weights and the order, the same for every arm
    reports:   a table for each: select and report, results of validation and of test data, and which is
               better, lower or higher; ``ratio: true`` compares by quotients, as for "times sooner". The
               figure takes the first. A result may be None: never reached
    equal:     a point of the grid at which all arms are compared as well
    columns:   more results to print → their headings
    curve:     x and y, lists among the results or a facet and a result; dashed, one more of them; x_label,
               y_label; log, the axes that are

grid, settings, facets, equal and columns may be left out.
"""

import importlib.util
import itertools
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import common
import yaml
from controls import OPTIONS, TAKEN
from sweep import Row, key, load_rows

from hf_poprisk import PopRiskTrainingArguments

FIELDS = ("arm", "options", "seed")
DICTIONARIES = ("arms", "curve", "settings", "grid", "facets", "equal", "columns")


@dataclass(frozen=True)
class Experiment:
    """The YAML file at ``path``; its keys are described above."""

    path: Path
    title: str
    claim: str
    verdict: str
    short: str
    script: str
    arms: dict[str, dict[str, Any]]
    seeds: list[int]
    reports: list[dict[str, Any]]
    curve: dict[str, Any]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    facets: dict[str, list[Any]] = field(default_factory=dict)
    equal: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        """Read and check an experiment.

        Raises:
            RecipeError: a missing or unknown key, an option that nothing reads, ``equal`` off the grid.
        """
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise common.RecipeError(f"{path} is not an experiment: see `python recipes/evidence.py --help`.")
        known = {f.name: f.default_factory is f.default for f in fields(cls)}
        needed = {name for name, required in known.items() if required} - {"path"}
        for wrong, message in (
            (set(content) - set(known) | {"path"} & set(content), "unknown"),
            (needed - set(content), "missing"),
        ):
            if wrong:
                raise common.RecipeError(f"{message} in {path}: {', '.join(sorted(wrong))}.")
        experiment = cls(path=path, **content)
        experiment._check_kinds()
        experiment._check_options()
        experiment._check_results()
        experiment._check_grid()
        experiment._check_values()
        return experiment

    def _check_kinds(self) -> None:
        """Every key holds what the other checks take it for."""
        for name, kind in (("seeds", list), ("reports", list), *dict.fromkeys(DICTIONARIES, dict).items()):
            value = getattr(self, name)
            if not isinstance(value, kind) or (name in ("seeds", "reports", "arms", "curve") and not value):
                what = "list" if kind is list else "mapping"
                raise common.RecipeError(f"{name} in {self.path} must be a {what} with something in it.")
        for report in self.reports:
            given = set(report) - {"ratio"}
            if given != {"select", "report", "better"} or report["better"] not in ("lower", "higher"):
                raise common.RecipeError(
                    f"a report in {self.path} needs select, report and better, which is lower or higher."
                )
        if self.script_path.suffix != ".py" or not self.script_path.is_file():
            raise common.RecipeError(f"script={self.script} is not a Python file beside {self.path}.")

    def _check_options(self) -> None:
        """Nothing that is written has no effect."""
        if not all(isinstance(options, dict) for options in self.arms.values()):
            raise common.RecipeError(
                f"every arm of {self.path} needs options: {{poprisk_gate: none}} is AdamW."
            )
        for options in (self.settings, *self.arms.values()):
            for name, value in options.items():
                if isinstance(value, str) and re.fullmatch(r"[-+.\d]+e[-+]?\d+", value):
                    raise common.RecipeError(f"{name} in {self.path} is text to YAML: write 1.0e-3 for 1e-3.")
        shared = [*self.settings, *self.grid, *self.facets]
        arms = [name for options in self.arms.values() for name in options]
        arguments = set(PopRiskTrainingArguments.__dataclass_fields__) - set(TAKEN)
        unread = {*shared, *arms} - {*module(self.script_path).OPTIONS, *OPTIONS, *arguments}
        if unread:
            raise common.RecipeError(f"nothing reads {', '.join(sorted(unread))} of {self.path}.")
        twice = {name for name in shared if shared.count(name) > 1} | {*arms} & {*self.grid, *self.facets}
        if twice:
            raise common.RecipeError(f"{', '.join(sorted(twice))} is given in two places of {self.path}.")
        if self.facets and (self.equal or self.columns):
            raise common.RecipeError(f"equal and columns have no effect with the facets of {self.path}.")

    def _check_results(self) -> None:
        """What tables and figure show is there, before it is computed."""
        if not all(type(seed) is int for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise common.RecipeError(f"seeds in {self.path} must be different whole numbers.")
        unknown = set(self.curve) - {"x", "y", "dashed", "x_label", "y_label", "log"}
        if unknown or not {"x", "y"} <= set(self.curve) or set(self.curve.get("log", "")) - {"x", "y"}:
            raise common.RecipeError(
                f"curve in {self.path} has x, y, dashed, x_label, y_label, and log: x, y or xy."
            )
        shown = {self.curve[name] for name in ("x", "y", "dashed") if name in self.curve} - set(self.facets)
        shown |= {*self.columns, *(report[name] for report in self.reports for name in ("select", "report"))}
        missing = shown - set(module(self.script_path).RESULTS)
        if missing:
            raise common.RecipeError(
                f"{self.script} returns no {', '.join(sorted(missing))}, shown by {self.path}."
            )

    def _check_grid(self) -> None:
        for name, values in (self.grid | self.facets).items():
            numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
            if not values or not numbers:
                raise common.RecipeError(
                    f"{name} in the grid or the facets of {self.path} must be a list of numbers."
                )
        for name, value in self.equal.items():
            if value not in self.grid.get(name, []):
                raise common.RecipeError(f"equal in {self.path} is not on the grid: {name}={value}.")

    def _check_values(self) -> None:
        """What the trainer would refuse, arm by arm."""
        for cell in {cell["arm"]: cell for cell in self.cells()}.values():
            given = {
                name: value
                for name, value in cell["options"].items()
                if name in PopRiskTrainingArguments.__dataclass_fields__
            }
            try:
                PopRiskTrainingArguments(output_dir=".", use_cpu=True, **given)
            except (TypeError, ValueError) as error:
                raise common.RecipeError(f"the arm {cell['arm']} of {self.path}: {error}") from error

    def cells(self) -> list[Row]:
        """All runs, seed by seed: an interrupted comparison is a balanced one."""
        points = [
            dict(zip(self.facets | self.grid, values, strict=True))
            for values in itertools.product(*self.facets.values(), *self.grid.values())
        ]
        return [
            {"arm": arm, "options": self.settings | options | point, "seed": seed}
            for seed in self.seeds
            for point in points
            for arm, options in self.arms.items()
        ]

    @property
    def script_path(self) -> Path:
        return self.path.parent / str(self.script)

    @property
    def results(self) -> Path:
        """Beside the experiment, if it is not one of the repository's."""
        own = self.path.resolve().parent == (common.ROOT / "claims").resolve()
        return common.ROOT / "results" / f"{self.path.stem}.jsonl" if own else self.path.with_suffix(".jsonl")

    def rows(self) -> list[Row]:
        """The finished runs of this experiment as it is written now."""
        asked = {key(cell, FIELDS) for cell in self.cells()}
        found = load_rows(self.results, FIELDS) if self.results.exists() else []
        return [row for row in found if key(row, FIELDS) in asked]


def module(path: Path) -> Any:
    """An experiment's script, which is no part of any package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def experiments() -> list[Path]:
    """The YAML files of those that the pages are about."""
    return sorted((common.ROOT / "claims").glob("*.yaml"))


def work(script: Path, cell: Row) -> Row:
    """Run one cell in the experiment's script; a result that is not finite counts as None."""
    found = module(script).run(cell["options"] | {"seed": cell["seed"]})
    lost = {name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)}
    return found | dict.fromkeys(lost)
