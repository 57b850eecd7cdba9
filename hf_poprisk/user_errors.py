"""What the subcommands of ``hf-poprisk`` share."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def is_refusal(error: BaseException) -> bool:
    """Whether a line of this package raised it on purpose, with a whole sentence."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    ours = frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("hf_poprisk.")
    return ours and str(error).endswith(".")


@contextmanager
def no_empty_folder(folder: str | Path) -> Iterator[None]:
    """If the block fails, folders that it made on the way there go again, unless they hold something."""
    path = Path(folder).absolute()
    new = [p for p in (path, *path.parents) if not p.exists()]
    try:
        yield
    except BaseException:
        for p in new:
            with suppress(OSError):
                p.rmdir()
        raise


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
