"""What the subcommands of ``hf-poprisk`` share."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right, said in one sentence."""


def need(package: str, what: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}: pip install 'hf_poprisk[recipes]'.")


def one_line(error: BaseException) -> str:
    """The first line of a message, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0], 200).rstrip(".")


def shorten(text: str, length: int) -> str:
    """At most ``length`` characters on one line, without those that would steer a terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= length else f"{text[: length - 2].rstrip()} …"


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of the target, to rename from: nothing is left half-written."""
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
