"""The page of the suspicious rows."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_poprisk.leave_one_out import page
from hf_poprisk.leave_one_out.data import find_rows
from hf_poprisk.leave_one_out.page import write_page
from hf_poprisk.leave_one_out.report import rate
from hf_poprisk.leave_one_out.table import load_run
from leave_one_out.judged import FIT, N, command, log_odds, pairs, posterior, refused, save_run

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"double\" 'single' \\ back\\u003cslash &lt; &",
    "\nline\r\nline\rline\u2028line\ttab\x00nul\x1b[31m",
    "😀 مرحبا \u202eright to left",
    "{{title}} {{data}} ${code} \\1",
    "",
    None,
]


class Page(HTMLParser):
    """What a browser would find: elements, texts, and the data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(self.source)
        self.json, self.script = self.texts["script"]
        self.data = json.loads(self.json)
        self.rows, self.columns = self.data["rows"], self.data["columns"]
        self.paragraphs = self.texts["p"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag = self.elements[-1][0] if self.elements else ""
        if data.strip():
            self.texts.setdefault(tag, []).append(data)

    def column(self, name: str) -> list[str | None]:
        return [row[2 + self.columns.index(name)] for row in self.rows]


def written(folder: Path, data: Dataset) -> Page:
    """The page of a run in ``folder / "run"``."""
    run = load_run(folder / "run")
    write_page(folder / "page.html", run, data, find_rows(data, run))
    return Page(folder / "page.html")


def test_it_holds_the_run_and_the_texts_of_pairs(tmp_path: Path, capsys: Any) -> None:
    ids = np.arange(N)[::-1] + 100
    save_run(tmp_path / "run", ids=ids, never=(3, 4))
    pairs().add_column("example_index", np.arange(N) + 100).save_to_disk(tmp_path / "data")
    path = tmp_path / "deep" / "page.html"
    out = command(capsys, tmp_path / "run", "--dataset", tmp_path / "data", "--page", path)
    assert out.endswith(f"page: {path}\n") and list(path.parent.iterdir()) == [path]
    found = Page(path)
    order = [i for i in np.argsort(log_odds()) if i not in (3, 4)]
    assert [row[0] for row in found.rows] == [str(ids[i]) for i in order]
    np.testing.assert_allclose(
        [row[1] for row in found.rows], [posterior(float(log_odds()[i])) for i in order], 1e-5
    )
    assert found.columns == ["prompt", "chosen", "rejected"]
    for name, text in (("prompt", "prompt"), ("chosen", "good"), ("rejected", "bad")):
        assert found.column(name) == [f"{text} {ids[i] - 100}" for i in order]


def test_the_headline_and_the_histogram(tmp_path: Path) -> None:
    save_run(tmp_path / "run", never=(3, 4))
    found = written(tmp_path, pairs())
    p = np.array([posterior(float(z)) for i, z in enumerate(log_odds()) if i not in (3, 4)])
    below = p < 0.5
    *lines, never, shown = found.paragraphs
    assert lines == rate(load_run(tmp_path / "run")) and len(lines) == 3
    assert never.startswith("2 more were never judged") and "all 58, with" in shown
    bars = [attrs for tag, attrs in found.elements if tag == "rect"]
    counts = [int(re.search(r": (\d+) labels", text)[1]) for text in found.texts["title"][1:]]
    assert counts == np.histogram(p, 20, (0, 1))[0].tolist()
    assert (
        sum(counts[:10]) == below.sum() and [bar["class"] for bar in bars] == ["below"] * 10 + ["others"] * 10
    )
    heights = np.array([float(bar["height"]) for bar in bars])
    np.testing.assert_allclose(heights, 100 * np.array(counts) / max(counts), atol=0.01)
    save_run(tmp_path / "run", fit=replace(FIT, high=0.44))
    found = written(tmp_path, pairs())
    assert found.paragraphs[0].startswith("Noise rate: open (25.0%, 95% interval 15.0% to 44.0%). Look at ")


@pytest.mark.parametrize("pairs_of_texts", [True, False])
def test_hostile_texts_stay_texts(tmp_path: Path, pairs_of_texts: bool) -> None:
    order = np.argsort(log_odds())
    texts: list[Any] = [f"text {i}" for i in range(N)]
    for i, hostile in zip(order, HOSTILE, strict=False):
        texts[i] = hostile
    columns = {"prompt": texts, "chosen": texts, "rejected": texts} if pairs_of_texts else {"text": texts}
    save_run(tmp_path / "run", preferences=pairs_of_texts)
    plain = written(tmp_path, Dataset.from_dict({name: ["text"] * N for name in columns}))
    found = written(tmp_path, Dataset.from_dict(columns))
    assert found.columns == list(columns)
    for name in columns:
        assert found.column(name) == [texts[i] for i in order]
    assert "<" not in found.json
    assert found.elements == plain.elements and found.script == plain.script


def test_names_of_folders_and_half_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_run(tmp_path / "<b>&amp;{{data}}")
    run, data = load_run(folder), pairs()
    monkeypatch.setattr(page, "whole_text", lambda *args: {"text": "\ud83d"})  # Arrow would refuse it
    write_page(tmp_path / "page.html", run, data, find_rows(data, run))
    found = Page(tmp_path / "page.html")
    assert found.texts["h1"] == [f"{folder.name}: suspicious preference pairs"]
    assert found.column("text") == ["\ud83d"] * N


def test_classes_are_named_and_indices_are_whole(tmp_path: Path) -> None:
    ids = 2**62 + np.arange(N)  # no double holds them
    labels = (np.arange(N) % 3 - 1).tolist()
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({"sentence": ["word " * 400] * N, "label": labels}, features)
    save_run(tmp_path / "run", ids=ids, preferences=False)
    found = written(tmp_path, data.add_column("example_index", ids))
    order = np.argsort(log_odds())
    assert found.columns == ["sentence", "label"] and found.column("sentence") == ["word " * 400] * N
    assert found.column("label") == [["-1", "bad", "good"][labels[i] + 1] for i in order]
    assert [row[0] for row in found.rows] == [str(2**62 + i) for i in order]
    assert "suspicious examples" in found.texts["h1"][0]


def test_rows_and_texts_are_capped(tmp_path: Path) -> None:
    count = page.MAX_ROWS + 5
    scores = np.linspace(-3, 3, count)
    texts = ["x" * length for length in (1999, 2000, 2001)] + [f"text {i}" for i in range(3, count)]
    save_run(tmp_path / "run", scores, preferences=False)
    found = written(tmp_path, Dataset.from_dict({"text": texts}))
    assert [int(row[0]) for row in found.rows] == list(range(2000))
    assert found.column("text")[:4] == ["x" * 1999, "x" * 2000, "x" * 1999 + "…", "text 3"]
    assert "the 2,000 most suspicious of 2,005, with at most 2,000 characters" in found.paragraphs[-1]
    save_run(tmp_path / "run")
    prompts = [None if i == np.argmin(log_odds()) else f"prompt {i}" for i in range(N)]
    found = written(tmp_path, pairs().remove_columns("prompt").add_column("prompt", prompts))
    assert found.columns == ["prompt", "chosen", "rejected"]  # which not every row has
    assert found.column("prompt")[0] is None and None not in found.column("prompt")[1:]


def test_nothing_is_loaded_no_text_becomes_an_element_and_inputs_have_labels(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    found = written(tmp_path, pairs())
    policy = next(attrs for _, attrs in found.elements if attrs.get("http-equiv"))["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(|XMLHttp|WebSocket", found.source)
    assert not {"src", "href", "srcset", "action"} & {name for _, attrs in found.elements for name in attrs}
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in found.elements}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", found.script)
    assert not re.search(r"\{\{\w+\}\}", found.source)
    for i, (tag, _) in enumerate(found.elements):
        assert tag != "input" or found.elements[i - 1][0] == "label"
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) and set(re.search(r'"(search .*)"\.split', found.script)[1].split()) <= {
        *ids
    }


def test_nothing_is_left_half_written(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pages" / "page.html"
    options = (run, "--dataset", saved, "--page", path)

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "No space left" in refused(capsys, *options)
        assert not list(path.parent.iterdir())
        path.write_text("before")
        assert "No space left" in refused(capsys, *options)
    assert path.read_text() == "before" and list(path.parent.iterdir()) == [path]
