"""Many small training runs into one file: resumed, side by side, with an estimate of the time left."""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import yaml
from tqdm import tqdm

Row = dict[str, Any]


@contextlib.contextmanager
def ends_in_a_sentence(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What the user can put right ends the program with one sentence and code 2, Ctrl-C with 130."""
    try:
        yield
    except (common.RecipeError, OSError, yaml.YAMLError, BrokenExecutor) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: finished runs are kept, and the same command goes on.\n")


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
        content, start = file.read(), f'{{"{fields[0]}"'.encode()
        whole = content.rfind(b"\n") + 1
        if content[whole:][: len(start)] != start[: len(content) - whole]:
            raise common.RecipeError(f"the last line of {path} is not of this script: remove it.")
        file.truncate(whole)  # a run that was cut off
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
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    else:
        pool.shutdown()
    finally:
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
