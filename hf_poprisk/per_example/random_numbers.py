"""The state of all generators that a model may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draw inside this block what will be drawn after it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def random_state() -> tuple[Any, ...]:
    # SpecAugment of the speech models draws from numpy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])
