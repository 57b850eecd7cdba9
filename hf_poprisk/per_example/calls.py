"""The calls inside a module's forward that take its parameters, each sent where the gradient is captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_poprisk.per_example.capture import Capture, Embedding
from hf_poprisk.per_example.convolutions import convolution, on_channels
from hf_poprisk.per_example.layout import Rows

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_ELEMENTWISE = {"add", "sub", "mul"}
_ELEMENTWISE |= {f"__{kind}{name}__" for name in _ELEMENTWISE for kind in ("", "r", "i")} | {"add_", "mul_"}


def run_calls(module: Any, capture: Capture, *args: Any, **kwargs: Any) -> Any:
    """Whatever the module does around the calls; a use that is none of them is an error in the backward."""
    own = [p for p in module.parameters(recurse=False) if capture.wants(p)]
    if not own:
        return type(module).forward(module, *args, **kwargs)
    with _Calls(own, capture):
        return type(module).forward(module, *args, **kwargs)


class _Calls(TorchFunctionMode):
    def __init__(self, own: list[Tensor], capture: Capture) -> None:
        super().__init__()
        self._own, self._capture = set(own), capture

    def _is_own(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(self._is_own, (*args, *kwargs.values()))):
            run = self._instead_of(func, args, kwargs)
            if run is not None:
                return run
        return func(*args, **kwargs)

    def _instead_of(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What the call returns, if it is one of those that are known and shows the examples."""
        if func is F.embedding:
            return self._embedding(*args, **kwargs) if self._is_own(args[1]) else None
        if func in _CONVOLUTIONS:
            return convolution(self._capture, *args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "expand" and self._is_own(args[0]):
            sizes = torch.Size(args[1] if isinstance(args[1], tuple | list) else args[1:])
            copies = self._copies(args[0], sizes[0], len(sizes))
            return None if copies is None else copies.expand(sizes)
        if name == "reshape" and args[0].dim() == 1 and args[1:] == (1, -1, 1, 1):  # sinks: of each head
            return self._of_heads(args[0])
        if name in _ELEMENTWISE and len(args) == 2 and not kwargs and isinstance(args[0], Tensor):
            return self._elementwise(func, *args)
        return None

    def _embedding(
        self, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
    ) -> Tensor | None:
        capture = self._capture
        if ids.dim() == 2 and ids.shape[0] == 1 and weight in capture.positions:
            ids = ids.expand(capture.layout.num_rows, *ids.shape[1:])  # positions, the same for every row
        if not capture.fits(ids, (weight,)):  # ids of one axis may as well be positions
            return None
        capture.lookup(weight, ids)
        return Embedding.apply(weight, ids, padding_idx, capture)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
    ) -> Tensor | None:
        """It takes no weight with a row axis: normalise first, then scale. So with groups."""
        if len(shape) > 1 or not self._capture.fits(x, (weight, bias)):
            return None
        return self._scaled(F.layer_norm(x, shape, None, None, eps), weight, bias, x.dim())

    def _group_norm(
        self, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
    ) -> Tensor | None:
        if not self._capture.fits(x, (weight, bias), packed=False):
            return None
        return self._scaled(F.group_norm(x, groups, None, None, eps), weight, bias, 2)

    def _scaled(self, y: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int) -> Tensor:
        """``dims`` as that of ``per_row``; 2 puts the parameters on the channels."""
        for p, operation in ((weight, torch.mul), (bias, torch.add)):
            if p is not None and self._capture.wants(p):
                p = self._capture.per_row(p, dims)
                p = on_channels(p, y.dim()) if dims == 2 else p
            elif p is not None and dims == 2:
                p = on_channels(p[None], y.dim())
            y = y if p is None else operation(y, p)
        return y

    def _elementwise(self, func: Any, a: Tensor, b: Any) -> Tensor | None:
        own, other = (a, b) if self._is_own(a) else (b, a)
        if not isinstance(other, Tensor) or self._is_own(other) or not self._capture.fits(other, (own,)):
            return None
        copies = self._copies(own, other.shape[0], other.dim())
        if copies is None:
            return None
        return func(copies, other) if own is a else func(other, copies)

    def _of_heads(self, param: Tensor) -> Tensor | None:
        """What is to be expanded over the rows, [1, heads, 1, 1], as one copy per row."""
        rows = isinstance(self._capture.layout, Rows)
        return on_channels(self._capture.per_row(param, 2), 4) if rows else None

    def _copies(self, param: Tensor, rows: int, dims: int) -> Tensor | None:
        """One copy per row, with ``dims`` axes, where the parameter would be broadcast over the rows."""
        layout = self._capture.layout
        if not isinstance(layout, Rows) or rows != layout.num_rows:
            return None
        if param.dim() < dims:
            return self._capture.per_row(param, dims)
        if param.dim() > dims or param.shape[0] > 1:
            return None
        return self._capture.per_row(param, dims + 1).flatten(0, 1)
