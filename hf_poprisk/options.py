"""The options of the gate: which values they take, and which parameters a pattern names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_poprisk.gate import GATES

ESTIMATORS = ("example", "group", "ema")
NOTHING_TO_TRAIN = (
    "nothing to train: no parameter requires a gradient; unfreeze some, or load an adapter with "
    "is_trainable=True."
)


def check_gate_options(
    gate: str, estimator: str, warmup_steps: int, ema_alpha: float | None, prefix: str = ""
) -> None:
    """Refuse bad values and options that would have no effect.

    Args:
        prefix: how the caller's users spell the names, for the messages.

    Raises:
        ValueError: one sentence that names the option and the way out.
    """
    whole = isinstance(warmup_steps, int) and not isinstance(warmup_steps, bool)
    number = isinstance(ema_alpha, int | float) and not isinstance(ema_alpha, bool)
    for name, value, fits, allowed in (
        ("gate", gate, gate in GATES, f"one of {', '.join(GATES)}"),
        ("estimator", estimator, estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
        ("warmup_steps", warmup_steps, whole and warmup_steps >= 0, "an integer ≥ 0"),
        ("ema_alpha", ema_alpha, ema_alpha is None or number and 0 < ema_alpha < math.inf, "a number > 0"),
    ):
        if not fits:
            raise ValueError(f"{prefix}{name} must be {allowed}; got {value!r}.")
    if ema_alpha is not None and estimator != "ema":
        raise ValueError(
            f"{prefix}ema_alpha has no effect with {prefix}estimator={estimator!r}: remove it or set "
            f"{prefix}estimator='ema'."
        )


def matching(named_parameters: Iterable[tuple[str, Tensor]], patterns: Sequence[str]) -> list[Tensor]:
    """The trainable parameters whose name matches one of the regular expressions (``re.search``).

    Raises:
        ValueError: a pattern that is not a regular expression, or that matches no trainable parameter, of
            which there may be none.
    """
    check_patterns(patterns)
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if patterns and not named:
        raise ValueError(NOTHING_TO_TRAIN)
    found: dict[Tensor, None] = {}
    for pattern in patterns:
        hits = [p for name, p in named if re.search(pattern, name)]
        if not hits:
            raise ValueError(f"the pattern {pattern!r} matches no trainable parameter.")
        found.update(dict.fromkeys(hits))
    return list(found)


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise ``ValueError`` for the first pattern that is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what AdamW's parameter groups may ask for and the gate cannot do."""
    for option in ("amsgrad", "maximize", "differentiable"):
        if group.get(option):
            raise ValueError(f"{option}=True is not supported by PopRiskAdamW: leave it off.")
