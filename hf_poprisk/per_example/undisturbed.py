"""Blocks that leave a model, its gradients and all random numbers as they were."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module, params: Iterable[Tensor]) -> Iterator[None]:
    """Without gradients inside this block, and everything as before after it."""
    grads = {p: p.grad for p in params}
    buffers = {b: b.clone() for b in model.buffers() if b.device.type != "meta"}
    attributes = {m: dict(vars(m)) for m in model.modules()}
    # what they hold is restored in place: hooks that a first forward installs, lists of what was seen
    held = [
        (value, value.copy())
        for values in attributes.values()
        for value in values.values()
        if type(value) in (dict, OrderedDict, list, set)
    ]
    for p in grads:
        p.grad = None
    try:
        with same_random_numbers():
            yield
    finally:
        for p, grad in grads.items():
            p.grad = grad
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In train or in eval mode inside this block."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and not training:  # cuDNN has no backward in eval mode
            module.training = before[module] and not module.dropout
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draw inside this block what will be drawn after it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def random_state() -> tuple[Any, ...]:
    """The state of all generators that a model may draw from."""
    # SpecAugment of the speech models draws from numpy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])
