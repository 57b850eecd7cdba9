"""TRL's fused language-model head, run example by example.

The head multiplies all tokens of a micro-batch at once, and none of its rows says whose it is. TRL has no
hook there: its autograd function is replaced while a micro-batch is captured. This is the only place that
reaches into TRL's private names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.layout import Layout, Packed

_NAMES = ("_ChunkedLogProbFunction", "_use_triton")


@contextmanager
def head_by_example(capture: Capture, model: nn.Module, utils: ModuleType) -> Iterator[None]:
    """Let the head's weight be captured in the forward and backward inside this block.

    Args:
        capture: of the micro-batch.
        model: whose forward gets the labels; not wrapped by DDP.
        utils: ``trl.trainer.utils``.

    Raises:
        RuntimeError: a TRL whose head is another one.
    """
    missing = [name for name in _NAMES if not hasattr(utils, name)]
    if missing:
        raise RuntimeError(
            f"{utils.__name__} has no {', '.join(missing)}: this TRL has another fused head; install the "
            "version of scripts/constraints.txt."
        )
    stock, seen = utils._ChunkedLogProbFunction, {}

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update({name: kwargs.get(name) for name in ("labels", "shift_labels")})

    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Any:
        if not (capture.wants(weight) or capture.wants(bias)):
            return stock.apply(hidden, weight, bias, labels, *rest)
        layout = capture.layout
        shifted = seen["labels"][:, 1:] if seen["shift_labels"] is None else seen["shift_labels"]
        lengths = _lengths(layout, shifted, labelled=utils._use_triton(hidden.device))
        parts = list(zip(hidden.split(lengths), labels.split(lengths), strict=True))
        outputs: list[Any] = [None] * len(parts)
        for i in range(layout.num_examples):
            mine = [capture.for_example(p, i) if capture.wants(p) else p for p in (weight, bias)]
            for row in range(i, len(parts), layout.num_examples):
                part_hidden, part_labels = parts[row]
                outputs[row] = stock.apply(part_hidden, *mine, part_labels, *rest)
        columns = zip(*outputs, strict=True)
        return tuple(None if column[0] is None else torch.cat(column) for column in columns)

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    utils._ChunkedLogProbFunction = SimpleNamespace(apply=apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = stock  # type: ignore[attr-defined]
        hook.remove()


def _lengths(layout: Layout, shifted: Tensor, labelled: bool) -> list[int]:
    """Tokens of each row (of each sequence of a packed row) in the head's flat input.

    Args:
        shifted: next-token labels, [rows, tokens].
        labelled: whether the labelled tokens alone are there, as on a GPU.
    """
    if isinstance(layout, Packed):
        *first, last = layout.lengths
        rows = shifted[0].split([*first, last - layout.num_tokens + shifted.shape[1]])
    else:
        rows = shifted.unbind()
    return [int((row != -100).sum()) if labelled else len(row) for row in rows]
