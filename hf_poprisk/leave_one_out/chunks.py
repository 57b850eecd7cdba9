"""Finished parts of a judgement in a folder, so that one that was killed goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

UNFINISHED = "unfinished-"  # how the name of the folder begins; it ends with the fingerprint


class Chunks:
    """Named tensors in a file per chunk, until ``remove``.

    Args:
        folder: where they are kept, in a folder that the first chunk makes.
        fingerprint: of all that they depend on; those of another one are removed.

    Attributes:
        found: whether some are there.
        others: whether there were some of another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._made = None if folder.is_dir() else folder
        self._folder = folder / f"{UNFINISHED}{fingerprint}"
        self.found = self._folder.is_dir()
        others = [path for path in folder.glob(f"{UNFINISHED}*") if path != self._folder]
        self.others = bool(others)
        for path in others:
            shutil.rmtree(path)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """A chunk on the CPU; None if it is not there, or not whole."""
        try:
            return load_file(self._folder / name)
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a chunk, which appears whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file({key: x.contiguous() for key, x in tensors.items()}, self._folder / f"_{name}")
        (self._folder / f"_{name}").replace(self._folder / name)

    def remove(self) -> None:
        """All of them, and the folder around them if the first one made it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._made is not None and self._made.is_dir() and not any(self._made.iterdir()):
            self._made.rmdir()
