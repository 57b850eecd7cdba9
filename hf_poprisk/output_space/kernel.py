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

from hf_poprisk.output_space.tasks import Batch, Outputs


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
    if chunk < 1:
        raise ValueError(f"chunk must be a number of outputs ≥ 1; got {chunk}.")
    with evaluating(model):
        jacobian = _Jacobian(model, outputs, [*probe, *test], scales)
        n, every = sum(index < len(probe) for index, _ in jacobian.rows), len(jacobian.rows)
        if n == 0:
            raise ValueError("the probe has no outputs: give at least one example.")
        kernel = torch.zeros(every, n, dtype=torch.float64)
        parts = [range(a, min(a + chunk, n)) for a in range(0, n, chunk)]
        tests = [range(a, min(a + chunk, every)) for a in range(n, every, chunk)]
        first, there = parts.pop(0), None
        while True:
            left = jacobian(first) if there is None else there
            kernel[first.start : first.stop, first.start : first.stop] = (left @ left.T).double()
            there = None
            for part in [*tests, *parts]:  # the last of them is kept, and is the next one on the left
                del there
                there = jacobian(part)
                block = (there @ left.T).double()
                kernel[part.start : part.stop, first.start : first.stop] = block
                if part.start < n:
                    kernel[first.start : first.stop, part.start : part.stop] = block.T
            if not parts:
                return kernel[:n], kernel[n:]
            first = parts.pop()
            del left


def output_pull(model: nn.Module, batches: Sequence[Batch], gradients: Tensor, outputs: Outputs) -> Tensor:
    """Jᵀ g, one backward per batch: the parameters' gradient of a loss whose gradient in the outputs is g.

    Args:
        gradients: of all outputs, [n, k].

    Returns:
        [P] over the trainable parameters in the model's order, of their precision, at least float32.
    """
    with evaluating(model):
        jacobian = _Jacobian(model, outputs, batches)
        parts = gradients.reshape(-1).split(jacobian.sizes)
        return torch.stack([jacobian.pull(index, part) for index, part in enumerate(parts)]).sum(0)


class _Jacobian:
    """J √P of the outputs of some batches, row by row.

    Attributes:
        sizes: outputs of each batch.
        rows: of each output its batch and its place there.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs,
        batches: Sequence[Batch],
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        # aliases, so that no hook of the model's own parameters is called and no .grad is written
        self._params = {
            name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad
        }
        if not self._params:
            raise ValueError("the model has no trainable parameter: set requires_grad on what is trained.")
        self._model, self._outputs, self._batches = model, outputs, batches
        params = self._params.values()
        self._size, self._device = sum(p.numel() for p in params), next(iter(params)).device
        wide = any(p.dtype == torch.float64 for p in params)
        self._dtype = torch.float64 if wide else torch.float32
        self._roots: Tensor | float = 1.0
        if scales is not None:
            flat = [scales[name].reshape(-1).to(self._device, self._dtype) for name in self._params]
            self._roots = torch.cat(flat).sqrt_()
        with torch.no_grad():
            self.sizes = [outputs(model, batch).numel() for batch in batches]
        self.rows = [(index, j) for index, size in enumerate(self.sizes) for j in range(size)]

    def _values(self, index: int) -> Tensor:
        """The outputs of a batch side by side, as a function of the aliases."""
        return self._outputs(
            lambda *args, **kwargs: functional_call(self._model, self._params, args, kwargs),
            self._batches[index],
        ).reshape(-1)

    @torch.enable_grad()
    def __call__(self, picked: Sequence[int]) -> Tensor:
        """[rows, parameters]; an output that does not depend on a parameter has zeros there."""
        params, filled = list(self._params.values()), 0
        found = torch.zeros(len(picked), self._size, dtype=self._dtype, device=self._device)
        for index, group in groupby((self.rows[i] for i in picked), key=lambda row: row[0]):
            values = self._values(index)
            for _, j in group:
                grads = torch.autograd.grad(values[j], params, retain_graph=True, allow_unused=True)
                start = 0
                for p, grad in zip(params, grads, strict=True):
                    if grad is not None:
                        found[filled, start : start + p.numel()] = grad.reshape(-1)
                    start += p.numel()
                filled += 1
        return found.mul_(self._roots)

    @torch.enable_grad()
    def pull(self, index: int, vector: Tensor) -> Tensor:
        """Jᵀ v [parameters] of the outputs of one batch."""
        values, params = self._values(index), list(self._params.values())
        grads = torch.autograd.grad(
            values, params, vector.to(values), allow_unused=True, materialize_grads=True
        )
        return torch.cat([grad.reshape(-1).to(self._dtype) for grad in grads])


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
