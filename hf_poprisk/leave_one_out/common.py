"""What the parts of the audit share."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRUTH = "is_flipped"  # the column that tells which labels are wrong, where somebody knows
TEXT_LENGTH = 160  # characters of one column of an example


class AuditError(ValueError):
    """Something the user can put right, said in one sentence."""


def need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise AuditError(f"{what} needs {package}: pip install 'hf_poprisk[recipes]'.")


def one_line(error: BaseException) -> str:
    """The first line of a message, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0], 200).rstrip(".")


def shorten(text: str, length: int = TEXT_LENGTH) -> str:
    """At most ``length`` characters on one line, without those that would steer a terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= length else f"{text[: length - 2].rstrip()} …"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of the target, to rename from."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
