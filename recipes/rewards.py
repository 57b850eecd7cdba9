"""Rewards for ``hf-poprisk grpo`` and ``rloo``."""

from typing import Any


def different_words(completions: list[Any], **_: Any) -> list[float]:
    """The share of a completion's words that it has not used before; 0 for an empty one."""
    texts = [x if isinstance(x, str) else x[-1]["content"] for x in completions]
    return [len({*text.split()}) / max(len(text.split()), 1) for text in texts]
