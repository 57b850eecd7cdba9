"""Runs an experiment: one training run per cell, each a row of its CSV file. Finished cells are skipped.

    python recipes/experiments/run.py                             # which experiments there are
    python recipes/experiments/run.py pinn --jobs 2               # run it, or go on with it
    python recipes/experiments/run.py pinn --arm adamw soft --learning_rate 0.01 --seed 0

The file is ``recipes/experiments/results/NAME.csv``; after a kill only the cells that were running are lost.
Every axis of the experiment is an option. Values that it does not declare need a file of your own, ``--out``.
"""

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes

import common
import datasets
import filelock
import pandas as pd
import torch
import transformers
from common import RecipeError
from experiment import NAMES, Cell, Experiment, load, read, results_of
from joblib import Parallel, delayed, parallel_config
from tables import table
from tqdm import tqdm


def work(name: str, cell: Cell) -> dict[str, Any]:
    """Run one cell, in a process of its own or in this one.

    Returns:
        Its row of the results, numbers to six digits; what failed as ``error``, so that the others go on.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("hf_poprisk").setLevel(logging.ERROR)
    experiment, begin = load(name), time.perf_counter()
    try:
        found = experiment.run(experiment.options(cell))
    except RecipeError:  # every other cell would fail of it as well
        raise
    except (Exception, SystemExit) as error:
        return {"error": f"{cell}: {type(error).__name__}: {error}"}
    found |= {"seconds": time.perf_counter() - begin}
    return cell | {name: rounded(value) for name, value in found.items()} | {"torch": torch.__version__}


def rounded(value: Any) -> Any:
    """To six digits; what is not finite is no result."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def run_cells(name: str, cells: list[Cell], path: Path, jobs: int) -> int:
    """Run those cells that ``path`` does not hold, and write each as soon as it is finished.

    Args:
        name: of the experiment, as ``load`` takes it.
        jobs: so many cells at a time, a process with one thread each.

    Returns:
        How many failed.
    """
    experiment, failed = load(name), 0
    rows = read(experiment, path)
    done = set(rows[list(experiment.axes)].itertuples(index=False, name=None))
    todo = [cell for cell in cells if tuple(cell.values()) not in done]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them in {path} already.", flush=True)
    with parallel_config("loky", inner_max_num_threads=1) if jobs > 1 else parallel_config("sequential"):
        parallel = Parallel(jobs, return_as="generator_unordered", batch_size=1)
        for row in tqdm(parallel(delayed(work)(name, cell) for cell in todo), total=len(todo), unit="cell"):
            if "error" in row:
                failed += 1
                tqdm.write(f"failed: {row['error']}", file=sys.stderr)
                continue
            new = pd.DataFrame([row])
            rows = pd.concat([rows, new], ignore_index=True) if len(rows) else new
            write(rows, path)
    return failed


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a results file: a second run that writes to it is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(tempfile.gettempdir(), f"{str(path.resolve()).replace('/', '+')}.lock")
    try:
        with filelock.FileLock(lock, timeout=0):
            yield
    except filelock.Timeout as error:
        raise RecipeError(f"another run is writing to {path}: wait for its end.") from error


def write(rows: pd.DataFrame, path: Path) -> None:
    """Beside the file and then in its place: whoever reads it or kills this sees whole rows."""
    beside = path.with_name(f".{path.name}.new")
    rows.to_csv(beside, index=False)
    beside.replace(path)


def parse(argv: list[str]) -> tuple[str, Experiment, dict[str, list[Any]], Path, int]:
    """Name, experiment, the chosen values of its axes, results file and jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("experiment", help=", ".join(NAMES) + ", or a Python file")
    name = parser.parse_known_args(argv)[0].experiment
    experiment = load(name)
    for axis, values in experiment.axes.items():
        kind = type(values[0])
        parser.add_argument(f"--{axis}", nargs="+", type=kind, help=" ".join(map(str, values)))
    parser.add_argument("--out", type=Path, help="a results file of your own")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--help", "-h", action="help")
    args = parser.parse_args(argv)
    chosen = {axis: given for axis in experiment.axes if (given := getattr(args, axis)) is not None}
    for axis, given in chosen.items():
        other = [value for value in given if value not in experiment.axes[axis]]
        if other and (axis == "arm" or axis != "seed" and args.out is None):
            way_out = "" if axis == "arm" else "; with --out FILE it may be another"
            raise RecipeError(
                f"--{axis} {other[0]} is none of {', '.join(map(str, experiment.axes[axis]))}{way_out}."
            )
    if args.jobs < 1:
        raise RecipeError("--jobs must be at least 1.")
    return name, experiment, chosen, args.out or results_of(name), args.jobs


def main(argv: list[str]) -> int:
    """The exit code: 1 if a cell failed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, *(f"{name:16} {load(name).title}" for name in NAMES), sep="\n")
        return 0
    name, experiment, chosen, path, jobs = parse(argv)
    with alone(path):
        failed = run_cells(name, experiment.cells(chosen), path, jobs)
    rows = read(experiment, path)
    for report in experiment.reports if len(rows) else ():
        print("", table(experiment, rows, report), sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    common.run(lambda: sys.exit(main(sys.argv[1:])))
