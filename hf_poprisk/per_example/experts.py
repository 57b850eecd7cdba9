"""Mixtures of experts whose weights are stacked: the block is run example by example, the rest at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.layout import Layout, Rows, Slot, joined


def stacked_experts(module: nn.Module) -> bool:
    """Whether a module is a block of transformers' that routes each token to experts, [experts, …, …].

    A block treats a token alike whatever lies beside it, so an example can go through it alone.
    """
    if hasattr(module, "map"):  # JetMoE's attention, which calls the experts in two parts
        return False
    return _of_transformers(module) and any(
        _of_transformers(child)
        and type(child).__name__.endswith("Experts")
        and any(p.dim() == 3 for p in child.parameters(recurse=False))
        for child in module.children()
    )


def run_experts(module: Any, capture: Capture, *args: Any, **kwargs: Any) -> Any:
    """The block on each example's tokens, with the parameters of the router and of all experts."""
    forward = type(module).forward
    places = [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if capture.wants(p)]
    params = dict.fromkeys(p for _, _, p in places)
    if not params:
        return forward(module, *args, **kwargs)
    # only the tokens can be taken apart: nothing else is known to belong to the examples
    x, *others = [*args, *kwargs.values()]
    only_tokens = not others and isinstance(x, Tensor) and x.dim() == 3
    if not only_tokens:
        why = "its block of experts was given more than [rows, tokens, width]"
        capture.misfits.update(dict.fromkeys(params, why))
    if not only_tokens or not capture.fits(x, params):
        return forward(module, *args, **kwargs)
    given = []
    for i, part in enumerate(_examples(x, capture.layout)):
        own = {p: capture.for_example(p, i) for p in params}
        try:
            for m, name, p in places:
                m._parameters[name] = own[p]
            with capture.paused():
                given.append(forward(module, part))
        finally:
            for m, name, p in places:
                m._parameters[name] = p
    if isinstance(given[0], Tensor):
        return _together(given, capture.layout)
    return type(given[0])(_together(parts, capture.layout) for parts in zip(*given, strict=True))


def _examples(x: Tensor, layout: Layout) -> Iterator[Tensor]:
    """[rows, tokens, width] of each example; contiguous, as blocks take views of it."""
    if isinstance(layout, Rows):
        return (x[i :: layout.num_examples].contiguous() for i in range(layout.num_examples))
    return (x[:, span].contiguous() for span in layout.spans())


def _together(parts: Any, layout: Layout) -> Tensor:
    """Of the examples' [rows, tokens, …], or [rows · tokens, …]."""
    return joined(parts, Slot(0 if isinstance(layout, Rows) or parts[0].dim() < 3 else 1), layout)


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")
