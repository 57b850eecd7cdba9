"""Which layers form their per-example gradients, and how each is run while a ``Capture`` lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_poprisk.per_example.calls import run_calls
from hf_poprisk.per_example.capture import Capture, Linear
from hf_poprisk.per_example.experts import run_experts, stacked_experts
from hf_poprisk.per_example.fsdp2 import gathered_modules, plain_copy, whole_parameters
from hf_poprisk.per_example.positions import BIASES, run_bias

_OF_CALLS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm)
_DORA = "peft.tuners.lora.dora.DoraLinearLayer"  # by name: PEFT need not be installed


class BatchedGradients:
    """Forms the per-example gradients of some parameters of a model.

    Args:
        model: the model, not wrapped by DDP; may be a PEFT model, and sharded by FSDP2.
        params: the parameters; frozen ones are left out.

    Attributes:
        uncovered: name → why, for the parameters that no supported layer owns. Not to be used with
            ``capture`` unless empty.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        whole = whole_parameters(model)  # what the layers will see, if FSDP2 shards them
        self._params = {whole.get(p, p) for p in params if p.requires_grad}
        # whose [1, T] positions are known to be added to the rows, and not taken apart first
        self._positions = {
            whole.get(child.weight, child.weight)
            for parent in model.modules()
            if type(parent).__module__.startswith("transformers.")
            for child in parent.children()
            if isinstance(child, nn.Embedding)
        }
        self._runs: list[tuple[nn.Module, str, Callable[..., Any]]] = []  # module, method, what it becomes
        owned: set[Tensor] = set()
        for module in gathered_modules(model):
            own = {n: p for n, p in module.named_parameters(recurse=False) if p in self._params}
            run = _layer(module, own) if own else None
            if stacked_experts(module) and "forward" not in vars(module):
                run, own = run_experts, {n: p for n, p in module.named_parameters() if p in self._params}
            if run is not None:
                owned.update(own.values())
                self._runs.append((module, "forward", run))
            table = getattr(module, "relative_attention_bias", None)  # of T5 and its kin
            if isinstance(table, nn.Embedding) and table.weight in self._params:
                self._runs += [(module, name, run_bias(name)) for name in BIASES if hasattr(module, name)]
        self.uncovered = {
            name: f"a parameter of {type(model.get_submodule(name.rpartition('.')[0])).__name__}"
            for name, p in model.named_parameters()
            if whole.get(p, p) in self._params - owned
        }

    @contextmanager
    def capture(self, capture: Capture) -> Iterator[None]:
        """Run the layers through ``capture`` inside this block, which holds the forward and the backward."""
        capture.positions = self._positions
        for module, method, _ in self._runs:
            if method in vars(module):
                raise RuntimeError(
                    f"the {method} of {type(module).__name__} was replaced after BatchedGradients was built: "
                    "build it again."
                )
        for module, method, run in self._runs:
            setattr(module, method, partial(run, module, capture))
        try:
            yield
        finally:
            for module, method, _ in self._runs:
                delattr(module, method)
            capture.release()


def _layer(module: nn.Module, own: Mapping[str, Tensor]) -> Callable[..., Any] | None:
    """How to run a module that owns some of the parameters; None where there is no way."""
    if "forward" in vars(module):
        return None  # somebody else has replaced it
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return _run_linear if set(own) <= {"weight", "bias"} else None
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return run_calls if plain and set(own) == {"weight"} else None
    if forward is nn.LayerNorm.forward or forward is nn.RMSNorm.forward:
        return _run_norm if len(module.normalized_shape) == 1 else None  # type: ignore[arg-type]
    if f"{type(module).__module__}.{type(module).__qualname__}" == _DORA:
        return _run_dora
    if _is_elementwise(module, own):
        return _run_elementwise
    if isinstance(module, _OF_CALLS):
        return run_calls if set(own) <= {"weight", "bias"} else None
    return run_calls if _is_shared(module, own) else None


def _run_linear(module: Any, capture: Capture, *args: Tensor, **kwargs: Tensor) -> Tensor:
    x, weight, bias = _input(args, kwargs), module.weight, module.bias
    if not (capture.wants(weight) or capture.wants(bias)) or not capture.fits(x, (weight, bias)):
        return type(module).forward(module, x)
    transposed = isinstance(module, Conv1D)
    if not capture.wants(weight):  # frozen or ungated: only the bias goes row by row
        y = F.linear(x, weight.T if transposed else weight)
        return y + capture.per_row(bias, y.dim()).to(y.dtype)
    for p in (weight, bias):
        if capture.wants(p):
            capture.used(p)
    return Linear.apply(x, weight, bias, capture, transposed)


def _run_norm(module: Any, capture: Capture, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """LayerNorm and torch's RMSNorm take no weight with a row axis: normalise first, then scale."""
    x = _input(args, kwargs)
    params = (module.weight, getattr(module, "bias", None))
    if not any(capture.wants(p) for p in params) or not capture.fits(x, params):
        return type(module).forward(module, x)
    if isinstance(module, nn.LayerNorm):
        y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    else:
        y = F.rms_norm(x, module.normalized_shape, None, module.eps)
    weight, bias = (capture.per_row(p, x.dim()) if capture.wants(p) else p for p in params)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _run_elementwise(module: nn.Module, capture: Capture, *args: Any, **kwargs: Any) -> Any:
    """Any module whose parameters only scale or shift the last axis: give it one copy per row."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if capture.wants(p)}
    x = _input(args, kwargs)
    if not own or not capture.fits(x, own.values()):
        return type(module).forward(module, *args, **kwargs)
    try:
        for name, p in own.items():
            module._parameters[name] = capture.per_row(p, x.dim())  # type: ignore[assignment]
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(own)  # type: ignore[arg-type]


def _run_dora(module: Any, capture: Capture, x: Tensor, **kwargs: Any) -> Tensor:
    """PEFT's DoRA layer gives ``m·f − base``: run it with the magnitude m fixed, then scale by row."""
    magnitude = module.weight
    if not capture.wants(magnitude) or not capture.fits(x, (magnitude,)):
        return type(module).forward(module, x, **kwargs)
    base = kwargs["base_layer"]
    if kwargs.get("base_result") is None:  # so it is when x went through dropout
        kwargs["base_result"] = base(x)

    def lora_weight(**adapters: Any) -> Tensor:
        with capture.paused():  # PEFT runs an identity matrix through the factors, for a norm it detaches
            return type(module).get_lora_weight(module, **adapters)

    module.get_lora_weight = lora_weight
    fixed = magnitude.detach().masked_fill(magnitude == 0, 1.0)
    module._parameters["weight"] = fixed  # type: ignore[assignment]
    try:
        y = type(module).forward(module, x, **kwargs)
    finally:
        module._parameters["weight"] = magnitude
        del module.get_lora_weight
    base_result = kwargs["base_result"]
    if base.bias is not None:
        base_result = base_result - base.bias
    return (y + base_result) * (capture.per_row(magnitude, x.dim()) / fixed) - base_result


def _is_shared(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Class tokens, rows of positions, layer scales: what a part of a model adds to its rows, or scales.

    A guess from the shapes: another use is an error in the backward. Not of whole models: some have a
    mask, which only training uses.
    """
    if isinstance(module, PreTrainedModel) or type(module).forward is nn.Module.forward:
        return False
    dims = 1 if next(module.children(), None) is not None else 2
    return all(p.dim() >= dims and (p.dim() == 1 or p.shape[0] == 1) for p in own.values())


def _is_elementwise(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Try it: with a copy per row, does the module compute the same and give each row its gradient?"""
    if next(module.children(), None) is not None or any(p.dim() != 1 for p in own.values()):
        return False
    first = next(iter(own.values()))
    if first.device.type == "meta" or len({p.shape for p in own.values()}) > 1:
        return False
    module = plain_copy(module)  # its forward may count or remember
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3), (2, 3, 2)):
        x = torch.randn(*shape, first.numel(), generator=generator).to(first.device, first.dtype)
        weight = torch.linspace(0.5, 1.5, x.numel(), device=x.device, dtype=x.dtype).view_as(x)
        ones = (1,) * (x.dim() - 2)
        copies = {name: p.detach().expand(2, *ones, -1).contiguous() for name, p in own.items()}
        try:
            with torch.random.fork_rng(devices=[]):
                rows = [_probe(module, own, x[i : i + 1], weight[i : i + 1]) for i in range(2)]
                y, gradients = _probe(module, copies, x, weight)
        except Exception:  # code of the user's, on an input that it was not made for
            return False
        for i, (row_y, row_gradients) in enumerate(rows):
            own_rows = [y[i : i + 1], *(h[i].flatten() for h in gradients)]
            pairs = zip(own_rows, [row_y, *row_gradients], strict=True)
            if not all(torch.allclose(a.float(), b.float(), rtol=3e-2, atol=3e-2) for a, b in pairs):
                return False
    return True


def _probe(
    module: nn.Module, params: Mapping[str, Tensor], x: Tensor, weight: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The module's output with other parameters, and the gradients of its weighted sum there."""
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    module._parameters.update(params)  # type: ignore[arg-type]
    with torch.enable_grad():
        y = type(module).forward(module, x)
        return y.detach(), torch.autograd.grad((y * weight).sum(), list(params.values()))


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument, whatever a layer calls it."""
    return args[0] if args else next(iter(kwargs.values()))
