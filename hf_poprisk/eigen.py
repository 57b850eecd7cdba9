"""AdamW whose moments live in the Kronecker eigenbasis of each linear layer's gradients (``basis="eigen"``).

With H_i the gradient of example i, U_L and U_R are the eigenvectors of ``Σ H_i H_iᵀ`` and ``Σ H_iᵀ H_i``,
measured once, before the first step. The moments see ``G' = U_Lᵀ G U_R``, and AdamW's write Δ' is rotated
back, ``W ← (1 − lr·wd) W + U_L Δ' U_Rᵀ``; weight decay is the same in every basis.
(SOAP, arXiv:2409.11321, follows a running basis of batch gradients instead.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from hf_poprisk.gated_adamw import plain_adamw
from hf_poprisk.leave_one_out.leap import trained_layers
from hf_poprisk.leave_one_out.mixin import Passes
from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.per_example.basis import complete_bases
from hf_poprisk.per_example.factors import LinearFactors
from hf_poprisk.per_example.undisturbed import mode, undisturbed

LEFT, RIGHT = "basis_left", "basis_right"  # in the state of a parameter
_NUM_EXAMPLES = 256  # that the bases are measured on


def rotated(state: Mapping[str, Any], x: Tensor) -> Tensor:
    """U_Lᵀ X U_R, in the bases' dtype; x itself where the state holds no basis."""
    if LEFT in state:
        x = state[LEFT].T @ x.to(state[LEFT].dtype)
    return x.to(state[RIGHT].dtype) @ state[RIGHT] if RIGHT in state else x


def rotated_back(state: Mapping[str, Any], x: Tensor) -> Tensor:
    """U_L X U_Rᵀ, the inverse."""
    if LEFT in state:
        x = state[LEFT] @ x.to(state[LEFT].dtype)
    return x.to(state[RIGHT].dtype) @ state[RIGHT].T if RIGHT in state else x


class EigenPopRiskAdamW(PopRiskAdamW):
    """What ``PopRiskAdamW(..., gate="none", basis="eigen")`` gives; its state holds the bases too."""

    @property
    def rotated_parameters(self) -> list[Tensor]:
        """Those with a basis, in group order."""
        held = ((p, self.state.get(p, {})) for p in self._all_parameters())
        return [p for p, state in held if LEFT in state or RIGHT in state]

    def set_bases(self, bases: Mapping[Tensor, Sequence[Tensor | None]]) -> None:
        """Before the first step. A parameter without a basis gets AdamW's own update.

        Args:
            bases: parameter [m, n] → (U_L [m, m] or None, U_R [n, n] or None), orthogonal; None does not
                rotate that side. Held in float32, or float64 for a parameter of that.

        Raises:
            RuntimeError: there are moments already.
        """
        if any(self.state.values()):
            raise RuntimeError("the moments are in another basis already: call set_bases before any step.")
        for p, sides in bases.items():
            found = {k: _held(u, p) for k, u in zip((LEFT, RIGHT), sides, strict=True) if u is not None}
            if found:  # torch makes the moments of an empty state only
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.tensor(0.0), **zeros, **found}

    def _update(self) -> None:
        if not self.rotated_parameters:
            raise RuntimeError("basis='eigen' has no bases: call set_bases before the first step.")
        for group in self.param_groups:
            plain = []
            for row in self._rows(group):
                param, grad, exp_avg, exp_avg_sq, step = row
                state = self.state[param]
                if LEFT not in state and RIGHT not in state:
                    plain.append(row)
                    continue
                write = torch.zeros_like(param)
                turned = rotated(state, grad).to(param.dtype)
                plain_adamw({**group, "weight_decay": 0.0}, [(write, turned, exp_avg, exp_avg_sq, step)])
                param.mul_(1 - float(group["lr"]) * float(group["weight_decay"]))
                param.add_(rotated_back(state, write))
            plain_adamw(group, plain)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        super().load_state_dict(state_dict)
        # torch has cast the bases to the parameter's dtype, and in bfloat16 they are not orthogonal
        saved = (state_dict["state"].get(i, {}) for g in state_dict["param_groups"] for i in g["params"])
        for p, state in zip(self._all_parameters(), saved, strict=True):
            for side in (LEFT, RIGHT):
                if side in state:
                    self.state[p][side] = _held(state[side], p)


def _held(basis: Tensor, param: Tensor) -> Tensor:
    return basis.to(param.device, torch.promote_types(param.dtype, torch.float32))


class MeasureBases(TrainerCallback):
    """Gives a trainer's optimizer its bases when training begins, unless a checkpoint did.

    Raises:
        ValueError: no linear layer is trained; when it measures, also gradients that are not finite, or
            layers that do not see the examples as rows.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._layers()

    def _layers(self) -> dict[str, Any]:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return trained_layers(model, "poprisk_basis", "coordinate")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        optimizer = trainer._poprisk_optimizer()
        if not optimizer.rotated_parameters:
            try:
                self._measure(optimizer)
            except ValueError as error:
                reason = str(error).rstrip(".")
                raise ValueError(
                    f"poprisk_basis=eigen has nothing to measure ({reason}): set poprisk_basis=coordinate."
                ) from error
        turned = optimizer.rotated_parameters
        every = sum(p.numel() for p in optimizer._all_parameters() if p.requires_grad)
        trainer._say(
            f"poprisk_basis=eigen: AdamW's moments of {sum(p.numel() for p in turned):,} of {every:,} "
            f"parameters ({len(turned)} matrices) are in the eigenbasis of their gradients."
        )

    def _measure(self, optimizer: EigenPopRiskAdamW) -> None:
        trainer, held = self._trainer, set(optimizer._all_parameters())
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        layers = {name: layer for name, layer in self._layers().items() if layer.weight in held}
        passes = Passes(trainer)

        def run(see: Any) -> None:
            for batch in passes.batches(_NUM_EXAMPLES):
                factors = LinearFactors(model, layers, see)
                with factors.forward():
                    if trainer.label_log_odds is not None:
                        z = passes.log_odds(model, batch)  # TRL's loss does not call the head
                    else:
                        with trainer.compute_loss_context_manager():
                            loss = trainer.compute_loss(model, batch)
                        z = loss.expand(passes.num_examples)  # a mean over them: their sum
                factors.backward(z, trainer.rows_per_example)

        with (
            trainer._trying_out(model),
            undisturbed(model, model.parameters()),
            mode(model, False),
            torch.enable_grad(),
        ):
            found = complete_bases(run)
        bases, get_head = {}, getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        for name, (left, right) in found.items():
            layer = layers[name]
            if layer is head:  # among tokens, few of which the examples hold, most directions are rounding
                left = None
            bases[layer.weight] = (right, left) if isinstance(layer, Conv1D) else (left, right)
        optimizer.set_bases(bases)
        if not optimizer.rotated_parameters:
            raise ValueError("no layer that is trained has a gradient and a side that is short enough")
