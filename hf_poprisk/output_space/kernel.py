"""The empirical neural tangent kernel K = J Jᵀ of any model, J = ∂u/∂w, in memory of a chunk of outputs.

One backward per output and no per-example tricks, so every architecture and every differentiable output
works; the trainable parameters are those with ``requires_grad``, all of them or an adapter's. With a
preconditioner P it is K_P = J P Jᵀ, the kernel that Adam descends by. Source: arXiv:2605.01172, section on
output space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_poprisk.output_space.tasks import Batch, Forward, Outputs

_Row = tuple[int, int]  # which batch, and which of its outputs


def empirical_ntk(
    model: nn.Module,
    probe: Sequence[Batch],
    outputs: Outputs,
    chunk: int = 64,
    scales: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The kernel of the probe's outputs.

    Args:
        model: evaluated in ``eval`` mode and left as it was; its gradients and hooks are not touched.
        probe: collated batches; one example each is fastest, as a backward runs through its whole batch.
        outputs: ``outputs(forward, batch) -> [b, k]``, as of a ``Task``.
        chunk: outputs whose gradients are held at a time, twice: memory is 2 · chunk · parameters. Pairs of
            chunks are recomputed, so the time falls with it.
        scales: P's diagonal per parameter name, of the parameter's shape, ≥ 0; None is the identity.

    Returns:
        [N, N] float64, N outputs in the order of the probe, an example's k outputs side by side. Products of
        gradients are taken in the parameters' precision, at least float32.

    Raises:
        ValueError: nothing to train, an empty probe, or chunk < 1.
    """
    return kernels(model, probe, [], outputs, chunk, scales)[0]


def kernels(
    model: nn.Module,
    probe: Sequence[Batch],
    test: Sequence[Batch],
    outputs: Outputs,
    chunk: int = 64,
    scales: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel of the probe [N, N] and K_QS = J_Q P J_Sᵀ [M, N] of test outputs against it.

    Arguments and errors are those of ``empirical_ntk``. The gradients of the two share their passes.
    """
    with _Jacobian(model, outputs, scales).ready() as jacobian:
        rows = jacobian.rows([*probe, *test])
        n = sum(index < len(probe) for index, _ in rows)
        if chunk < 1:
            raise ValueError(f"chunk must be a number of outputs ≥ 1; got {chunk}.")
        if n == 0:
            raise ValueError("the probe has no outputs: give at least one example.")
        batches = [*probe, *test]
        kernel = torch.zeros(len(rows), n, dtype=torch.float64)
        parts = [range(a, min(a + chunk, n)) for a in range(0, n, chunk)]
        tests = [range(a, min(a + chunk, len(rows))) for a in range(n, len(rows), chunk)]
        first, there = parts.pop(0), None
        while True:
            left = jacobian(batches, [rows[i] for i in first]) if there is None else there
            kernel[first.start : first.stop, first.start : first.stop] = (left @ left.T).double()
            there = None
            for part in [*tests, *parts]:  # the last of them is kept, and is the next one on the left
                del there
                there = jacobian(batches, [rows[i] for i in part])
                block = (there @ left.T).double()
                kernel[part.start : part.stop, first.start : first.stop] = block
                if part.start < n:
                    kernel[first.start : first.stop, part.start : part.stop] = block.T
            if not parts:
                return kernel[:n], kernel[n:]
            first = parts.pop()
            del left


def kernel_product(
    model: nn.Module,
    probe: Sequence[Batch],
    vector: Tensor,
    outputs: Outputs,
    test: Sequence[Batch] | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """K v without K, in memory of one gradient; with ``test`` K_QS v.

    Args:
        vector: [N], over the probe's outputs in the order of ``empirical_ntk``.

    Returns:
        [N] float64, or [M] with ``test``.

    Raises:
        ValueError: a vector of another length; and as ``empirical_ntk``.
    """
    with _Jacobian(model, outputs, scales).ready() as jacobian:
        rows = jacobian.rows(probe)
        if vector.shape != (len(rows),):
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}; the probe has {len(rows)} outputs."
            )
        weights = torch.zeros(jacobian.size, dtype=jacobian.dtype, device=jacobian.device)
        for row, value in zip(rows, vector.tolist(), strict=True):
            weights += value * jacobian(probe, [row])[0]  # J is scaled by √P on either side
        there = probe if test is None else test
        products = [(jacobian(there, [row])[0] @ weights).double() for row in jacobian.rows(there)]
        return torch.stack(products).cpu()


def output_pull(
    model: nn.Module, batches: Sequence[Batch], gradients: Sequence[Tensor], outputs: Outputs
) -> Tensor:
    """Jᵀ g, one backward per batch: the parameters' gradient of a loss whose gradient in the outputs is g.

    Args:
        gradients: of each batch's outputs, [b, k].

    Returns:
        [P] over the trainable parameters in the model's order, of their precision, at least float32.
    """
    with _Jacobian(model, outputs, None).ready() as jacobian:
        return jacobian.transposed(batches, gradients)


def evaluate(model: nn.Module, batches: Sequence[Batch], outputs: Outputs) -> list[Tensor]:
    """The outputs [b, k] of every batch, in ``eval`` mode and without gradients."""
    with evaluating(model), torch.no_grad():
        return [outputs(model, batch) for batch in batches]


class _Jacobian:
    """Rows of J √P."""

    def __init__(self, model: nn.Module, outputs: Outputs, scales: Mapping[str, Tensor] | None) -> None:
        # aliases, so that no hook of the model's own parameters is called and no .grad is written
        self._params = {
            name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad
        }
        if not self._params:
            raise ValueError("the model has no trainable parameter: set requires_grad on what is trained.")
        self._model, self._outputs, self._scales = model, outputs, scales
        params = list(self._params.values())
        self.size, self.device = sum(p.numel() for p in params), params[0].device
        wide = any(p.dtype == torch.float64 for p in params)
        self.dtype = torch.float64 if wide else torch.float32
        self._roots: Tensor | None = None
        if scales is not None:
            flat = [scales[name].reshape(-1).to(self.device, self.dtype) for name in self._params]
            self._roots = torch.cat(flat).sqrt_()

    @contextmanager
    def ready(self) -> Iterator[_Jacobian]:
        with evaluating(self._model):
            yield self

    def _forward(self) -> Forward:
        return lambda *args, **kwargs: functional_call(self._model, self._params, args, kwargs)

    def rows(self, batches: Sequence[Batch]) -> list[_Row]:
        with torch.no_grad():
            sizes = [self._outputs(self._model, batch).numel() for batch in batches]
        return [(index, j) for index, size in enumerate(sizes) for j in range(size)]

    @torch.enable_grad()
    def __call__(self, batches: Sequence[Batch], rows: Sequence[_Row]) -> Tensor:
        """[rows, parameters]; an output that does not depend on a parameter has zeros there."""
        params, filled = list(self._params.values()), 0
        found = torch.zeros(len(rows), self.size, dtype=self.dtype, device=self.device)
        for index, group in groupby(rows, key=lambda row: row[0]):
            values = self._outputs(self._forward(), batches[index]).reshape(-1)
            for _, j in group:
                grads = torch.autograd.grad(values[j], params, retain_graph=True, allow_unused=True)
                start = 0
                for p, grad in zip(params, grads, strict=True):
                    if grad is not None:
                        found[filled, start : start + p.numel()] = grad.reshape(-1)
                    start += p.numel()
                filled += 1
        if self._roots is not None:
            found *= self._roots
        return found

    @torch.enable_grad()
    def transposed(self, batches: Sequence[Batch], vectors: Sequence[Tensor]) -> Tensor:
        """Jᵀ v [parameters], v in one piece per batch and in the precision of the outputs."""
        params = list(self._params.values())
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for batch, vector in zip(batches, vectors, strict=True):
            values = self._outputs(self._forward(), batch).reshape(-1)
            grads = torch.autograd.grad(values, params, vector.reshape(-1).to(values), allow_unused=True)
            pairs = zip(params, grads, strict=True)
            total += torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])
        return total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``eval`` mode inside; after it every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
