"""Many small training runs into one file: resumed, side by side, with an estimate of the time left."""

import fcntl
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common
from scipy import stats
from tqdm import tqdm

Row = dict[str, Any]


def load_rows(path: Path, fields: Sequence[str]) -> list[Row]:
    """The finished runs, the first of each cell; what stands after the last end of line is a broken line.

    Args:
        fields: the names that tell one cell from another.

    Raises:
        RecipeError: a line that no run has written.
    """
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            rows.setdefault(key(row, fields), row)
        except (ValueError, KeyError, TypeError) as error:
            raise common.RecipeError(f"line {number} of {path} is not of this script: remove it.") from error
    return list(rows.values())


def key(row: Row, fields: Sequence[str]) -> str:
    return json.dumps([row[name] for name in fields], sort_keys=True)


def run_cells(
    cells: list[Row], work: Callable[[Row], Row], path: Path, processes: int, alike: str = "arm"
) -> int:
    """Run those cells that ``path`` does not hold, and append a line for each.

    Args:
        cells: dictionaries with the same keys.
        work: cell → results; importable by another process.
        processes: at most so many at a time, one thread each.
        alike: the field whose value tells how long a run takes, for the estimate of the time left.

    Returns:
        The exit code: 1 if a run failed.

    Raises:
        RecipeError: another process writes to the file, it holds something else, or a run raised one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = list(cells[0])
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise common.RecipeError(f"another run is writing to {path}: wait for its end.") from error
        rows = load_rows(path, fields)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        done = {key(row, fields) for row in rows}
        todo = [cell for cell in cells if key(cell, fields) not in done]
        print(f"{len(cells)} runs, {len(cells) - len(todo)} of them in {path} already.", flush=True)
        return _run_all(todo, work, rows, file, processes, alike) if todo else 0


def _run_all(
    todo: list[Row], work: Callable[[Row], Row], rows: list[Row], file: Any, processes: int, alike: str
) -> int:
    # for the workers, before they import torch
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    seconds, failed = defaultdict(list), 0
    for row in rows:
        seconds[row[alike]].append(row["seconds"])
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(todo)), context, _prepare_worker)
    left = {pool.submit(_timed, work, cell): cell for cell in todo}
    bar = tqdm(
        total=len(todo), unit="run", disable=False, bar_format="{desc}{bar}{n_fmt}/{total_fmt}{postfix}"
    )
    try:
        for future in as_completed(list(left)):
            cell = left.pop(future)
            try:
                row = future.result()
                file.write((json.dumps(row) + "\n").encode())  # one write, which is all there or not at all
                os.fsync(file.fileno())
                seconds[cell[alike]].append(row["seconds"])
            except (BrokenExecutor, common.RecipeError):  # the others would say the same
                raise
            except Exception as error:
                failed += 1
                bar.write(f"failed: {cell}: {type(error).__name__}: {error}", file=sys.stderr)
            known = fmean(fmean(times) for times in seconds.values()) if seconds else 0.0
            wait = sum(fmean(seconds[c[alike]]) if c[alike] in seconds else known for c in left.values())
            bar.set_postfix_str(f"about {wait / processes / 60:.1f} min left, last {cell[alike]}")
            bar.update()
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    return int(failed > 0)


def _timed(work: Callable[[Row], Row], cell: Row) -> Row:
    begin = time.perf_counter()
    row = cell | work(cell)
    libraries = ("torch", "transformers", "trl", "peft", "numpy", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return row | {"seconds": time.perf_counter() - begin, "versions": versions}


def _prepare_worker() -> None:
    """One thread, no chatter; Ctrl-C is the parent's, and no worker outlives it."""
    import datasets
    import torch
    import transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("hf_poprisk").setLevel(logging.ERROR)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent closes nothing: its workers would wait for ever
    os._exit(1)


def paired(rows: Sequence[Row], base: Sequence[Row], name: str, of: Callable[[float], float]) -> list[float]:
    """Mean over the seeds of ``of`` of ``rows`` minus that of ``base``, and the ends of its 95 % t interval.

    Empty without a common seed; of a single one the mean alone.
    """
    before = {row["seed"]: of(row[name]) for row in base}
    deltas = [of(row[name]) - before[row["seed"]] for row in rows if row["seed"] in before]
    if len(deltas) < 2:
        return deltas
    mean, half = fmean(deltas), stats.t.ppf(0.975, len(deltas) - 1) * stdev(deltas) / len(deltas) ** 0.5
    return [mean, mean - half, mean + half]


def in_brackets(values: Sequence[str]) -> str:
    """A value, its interval in brackets if there is one; – for none."""
    return values[0] + (f" [{', '.join(values[1:])}]" if values[1:] else "") if values else "–"


def paired_difference(rows: Sequence[Row], base: Sequence[Row], name: str, digits: int = 3) -> str:
    """Mean over the seeds of ``rows`` minus ``base``, and its 95 % t interval."""
    return in_brackets([f"{value:+.{digits}f}" for value in paired(rows, base, name, float)])


def paired_quotient(rows: Sequence[Row], base: Sequence[Row], name: str) -> str:
    """Geometric mean over the seeds of ``rows`` over ``base``, and its 95 % t interval."""
    found = in_brackets([f"{math.exp(value):.2f}" for value in paired(rows, base, name, math.log)])
    return found if found == "–" else f"×{found}"


def mean_of(rows: Sequence[Row], name: str, digits: int = 3) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):.{digits}f}" if values else "–"
