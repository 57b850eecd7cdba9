"""The page: the suspicious rows to look through, sort and filter, in one file that needs nothing else."""

from __future__ import annotations

import json
import re
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.leave_one_out.data import whole_text
from hf_poprisk.leave_one_out.report import rate
from hf_poprisk.leave_one_out.table import Run
from hf_poprisk.user_errors import folder_beside

if TYPE_CHECKING:
    from datasets import Dataset

MAX_ROWS = 2000
MAX_TEXT = 2000  # characters of one column of an example


def write_page(path: Path, run: Run, data: Dataset, rows: np.ndarray) -> None:
    """Write a page with the noise rate, a histogram and the most suspicious rows, as HTML.

    Args:
        path: of the file, which appears whole or not at all.
        data: the training data, for the texts.
        rows: as ``find_rows`` gives them, [n].
    """
    what = "preference pairs" if run.preferences else "examples"
    parts = {
        "title": escape(f"{run.folder.resolve().name}: suspicious {what}"),
        "summary": "\n".join(f"<p>{escape(sentence)}</p>" for sentence in summary(run)),
        "histogram": histogram(run.p_correct[run.judged]),
        "data": json.dumps(table(run, data, rows), ensure_ascii=False, allow_nan=False),
    }
    parts["data"] = parts["data"].replace("<", "\\u003c")  # no text ends the script that it stands in
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    # in one go: the texts of the data may hold such names, too
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template)
    with folder_beside(path) as folder:
        # what UTF-8 cannot hold, half a surrogate pair, becomes the escape that JSON has for it
        (folder / "page.html").write_bytes(page.encode("utf-8", "backslashreplace"))
        (folder / "page.html").replace(path)


def summary(run: Run) -> list[str]:
    """What was found, in words."""
    count, lines = int(run.judged.sum()), rate(run)
    if count < len(run.index):
        lines += [f"{len(run.index) - count:,} more were never judged, and are not shown."]
    shown = f"the {MAX_ROWS:,} most suspicious of {count:,}" if count > MAX_ROWS else f"all {count:,}"
    return [
        *lines,
        f"Rows shown: {shown}, with at most {MAX_TEXT:,} characters of each text. They come in the order of "
        "their leave-one-out log-odds (in judged.parquet), which is that of the probabilities and tells equal"
        " ones apart.",
    ]


def histogram(p_correct: np.ndarray) -> str:
    """A figure with how many labels are how likely to be right; no bar is of both sides of .5."""
    counts, edges = np.histogram(p_correct, np.linspace(0, 1, 21))
    bars = []
    for i, count in enumerate(counts):
        height, side = max(100 * count / counts.max(), count > 0), "below" if i < 10 else "others"
        bars += [
            f'<rect class="{side}" x="{i}.04" y="{100 - height:.2f}" width=".92" height="{height:.2f}">'
            f"<title>{edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,} labels</title></rect>"
        ]
    what = "Labels by the probability that they are right"
    drawing = f'<svg viewBox="0 0 20 100" preserveAspectRatio="none" role="img" aria-label="{what}">'
    caption = f"<figcaption><span>0: mislabeled</span><span>{what}</span><span>1: right</span></figcaption>"
    return "\n".join(["<figure>", drawing, *bars, "</svg>", caption, "</figure>"])


def table(run: Run, data: Dataset, rows: np.ndarray) -> dict[str, Any]:
    """The names of the texts, and of every row the index, the probability and the texts."""
    places = run.suspicious[:MAX_ROWS]
    texts = [whole_text(example, data.features, MAX_TEXT) for example in data.select(rows[places])]
    columns = list(dict.fromkeys(name for text in texts for name in text))
    columns.sort(key=lambda name: name != "prompt")  # which not every row may have
    # an index is text, because it has 64 bits, which a number in JavaScript has not
    indices = map(str, run.index[places].tolist())
    found = [
        [index, p, *(_capped(text.get(name)) for name in columns)]
        for index, p, text in zip(indices, run.p_correct[places].tolist(), texts, strict=True)
    ]
    return {"columns": columns, "rows": found}


def _capped(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
