"""The options: the values that each may have, and the parameters that a pattern names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from hf_poprisk.gate import GATES

ESTIMATORS = ("example", "group", "ema")
BASES = ("coordinate", "eigen")
LABEL_NOISE = ("off", "audit", "weight")
SHORTEST_LEAP = 1e-3  # nats: a mean of float32 log-odds is rounded by 2e-6 at 20 nats and by 3e-5 at 500
HUB_ACCESS = ("auto", "manual")
NOTHING_TO_TRAIN = (
    "nothing to train: no parameter requires a gradient; unfreeze some, or load an adapter with "
    "is_trainable=True."
)


def _is_pattern(text: Any) -> bool:
    try:
        return isinstance(text, str) and re.compile(text) is not None
    except re.error:
        return False


# option → whether it fits, and what it must be
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gate": (lambda v: v in GATES, f"one of {', '.join(GATES)}"),
    "estimator": (lambda v: v in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
    "ema_alpha": (
        lambda v: v is None or isinstance(v, int | float) and v is not True and 0 < v < math.inf,
        "a number > 0",
    ),
    "basis": (lambda v: v in BASES, f"one of {', '.join(BASES)}"),
    "kahan": (lambda v: type(v) is bool, "true or false"),
    "exclude": (
        lambda v: v is None or isinstance(v, list) and all(map(_is_pattern, v)),
        "a list of regular expressions",
    ),
    "label_noise": (lambda v: v in LABEL_NOISE, f"one of {', '.join(LABEL_NOISE)}"),
    "judge_after_epochs": (lambda v: type(v) is int and v >= 0, "an integer ≥ 0"),
    "leap": (
        lambda v: isinstance(v, int | float) and v is not True and (v == 0 or SHORTEST_LEAP <= v < math.inf),
        f"0, or a number ≥ {SHORTEST_LEAP:g}, below which float32 shows little but rounding",
    ),
    "weight_column": (lambda v: v is None or isinstance(v, str) and v != "", "the name of a column"),
    "hub_access": (lambda v: v is None or v in HUB_ACCESS, f"one of {', '.join(HUB_ACCESS)}"),
}


def check_options(prefix: str = "", **options: Any) -> None:
    """Refuse bad values, a threshold that would have no effect, and the streaming gate in a basis.

    Args:
        prefix: how the caller's users spell the names, for the messages.

    Raises:
        ValueError: one sentence that names the option and the way out.
    """
    for name, value in options.items():
        fits, allowed = ALLOWED[name]
        if not fits(value):
            raise ValueError(f"{prefix}{name} must be {allowed}; got {value!r}.")
    if options["ema_alpha"] is not None and options["estimator"] != "ema":
        raise ValueError(
            f"{prefix}ema_alpha has no effect with {prefix}estimator={options['estimator']!r}: remove it or "
            f"set {prefix}estimator='ema'."
        )
    if options["basis"] == "eigen" and options.get("kahan"):
        raise ValueError(
            f"{prefix}kahan=True does not go with {prefix}basis='eigen', whose writes are rotated: set "
            f"{prefix}basis='coordinate', or leave {prefix}kahan off."
        )
    if options["basis"] == "eigen" and options["estimator"] == "ema":
        raise ValueError(
            f"{prefix}basis='eigen' does not go with {prefix}estimator='ema': set {prefix}estimator="
            f"'example', or {prefix}basis='coordinate'."
        )


def matching(named_parameters: Iterable[tuple[str, Tensor]], patterns: Sequence[str]) -> list[Tensor]:
    """The trainable parameters whose name matches one of the regular expressions (``re.search``).

    Raises:
        ValueError: a pattern that matches no trainable parameter, of which there may be none.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    if patterns and not named:
        raise ValueError(NOTHING_TO_TRAIN)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name, _ in named):
            raise ValueError(f"the pattern {pattern!r} matches no trainable parameter.")
    return [p for name, p in named if any(re.search(pattern, name) for pattern in patterns)]
