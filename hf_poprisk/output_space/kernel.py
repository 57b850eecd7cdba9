"""The empirical neural tangent kernel K = J Jᵀ of any model, J = ∂u/∂w, in memory of a chunk of outputs.

One backward per output and no per-example tricks, so every architecture and every differentiable output
works; the trainable parameters are those with ``requires_grad``, all of them or an adapter's. With a
preconditioner P it is K_P = J P Jᵀ, the kernel that Adam descends by. Source: arXiv:2605.01172, section on
output space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_poprisk.output_space.tasks import Batch, Outputs
from hf_poprisk.per_example.undisturbed import mode


def empirical_ntk(model: nn.Module, probe: Sequence[Batch], outputs: Outputs, chunk: int = 64) -> Tensor:
    """The kernel of the probe alone, [N, N]; see ``kernels``."""
    return kernels(model, probe, [], outputs, chunk)[0]


def kernels(
    model: nn.Module,
    probe: Sequence[Batch],
    test: Sequence[Batch],
    outputs: Outputs,
    chunk: int = 64,
    scales: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel of the probe's outputs, and K_QS = J_Q P J_Sᵀ of test outputs against it.

    Args:
        model: evaluated in ``eval`` mode and left as it was; its gradients and hooks are not touched.
        probe, test: collated batches; one example each is fastest, as a backward runs through a whole batch.
        outputs: ``outputs(forward, batch) -> [b, k]``, as of a ``Task``.
        chunk: outputs whose gradients are held at a time, twice: memory is 2 · chunk · parameters. Pairs of
            chunks are recomputed, so the time falls with it.
        scales: P's diagonal per parameter name, of the parameter's shape, ≥ 0; None is the identity.

    Returns:
        [N, N] and [M, N] float64, outputs in the order of the batches, an example's k outputs side by side.
        Products of gradients are taken in the parameters' precision, at least float32.

    Raises:
        ValueError: nothing to train, an empty probe, or chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be a number of outputs ≥ 1; got {chunk}.")
    with mode(model, False):
        jacobian = _Jacobian(model, outputs, [*probe, *test], scales)
        n, every = sum(index < len(probe) for index, _ in jacobian.rows), len(jacobian.rows)
        if n == 0:
            raise ValueError("the probe has no outputs: give at least one example.")
        kernel = torch.zeros(every, n, dtype=torch.float64)
        first, *parts = (slice(a, min(a + chunk, n)) for a in range(0, n, chunk))
        tests = [slice(a, a + chunk) for a in range(n, every, chunk)]
        left = jacobian(first)
        while True:
            kernel[first, first] = (left @ left.T).double()
            there = None
            for part in [*tests, *parts]:  # the last of them is kept, and is the next one on the left
                del there
                there = jacobian(part)
                kernel[part, first] = (there @ left.T).double()
            for part in parts:
                kernel[first, part] = kernel[part, first].T
            if not parts:
                return kernel[:n], kernel[n:]
            first, left = parts.pop(), there


class _Jacobian:
    """J √P of the outputs of some batches, row by row; ``rows`` are each output's batch and place there."""

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs,
        batches: Sequence[Batch],
        scales: Mapping[str, Tensor] | None,
    ) -> None:
        # aliases, so that no hook of the model's own parameters is called and no .grad is written
        self._params = {
            name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad
        }
        if not self._params:
            raise ValueError("the model has no trainable parameter: set requires_grad on what is trained.")
        self._model, self._outputs, self._batches = model, outputs, batches
        wide = any(p.dtype == torch.float64 for p in self._params.values())
        self._dtype = torch.float64 if wide else torch.float32
        self._roots = None if scales is None else self._flat([scales[name] for name in self._params]).sqrt_()
        with torch.no_grad():
            sizes = [outputs(model, batch).numel() for batch in batches]
        self.rows = [(index, j) for index, size in enumerate(sizes) for j in range(size)]

    def _flat(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.reshape(-1).to(self._dtype) for value in values])

    @torch.enable_grad()
    def __call__(self, picked: slice) -> Tensor:
        """[rows, parameters]; an output that does not depend on a parameter has zeros there."""
        params, rows = list(self._params.values()), self.rows[picked]
        size = sum(p.numel() for p in params)
        found = torch.empty(len(rows), size, dtype=self._dtype, device=params[0].device)
        unfilled = iter(found)
        for index, group in groupby(rows, key=lambda row: row[0]):
            values = self._outputs(
                lambda *args, **kwargs: functional_call(self._model, self._params, args, kwargs),
                self._batches[index],
            ).reshape(-1)
            for _, j in group:
                grads = torch.autograd.grad(values[j], params, retain_graph=True, materialize_grads=True)
                next(unfilled).copy_(self._flat(grads))
        return found if self._roots is None else found.mul_(self._roots)
