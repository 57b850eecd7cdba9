"""AdamW and the gate in the Kronecker eigenbasis of each linear layer's gradients (``basis="eigen"``).

With H_i the gradient of example i, U_L and U_R are the eigenvectors of ``Σ H_i H_iᵀ`` and ``Σ H_iᵀ H_i``,
measured once, before the first step. The moments see ``G' = U_Lᵀ G U_R``, the gate compares its square with
``Q' = Σ_i (U_Lᵀ H_i U_R)²``, and AdamW's write Δ' is rotated back, ``W ← (1 − lr·wd) W + U_L Δ' U_Rᵀ``;
weight decay is the same in every basis.
(SOAP, arXiv:2409.11321, follows a running basis of batch gradients instead.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from hf_poprisk.leave_one_out.leap import trained_layers
from hf_poprisk.leave_one_out.mixin import Passes
from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.per_example.basis import Sides, complete_bases
from hf_poprisk.per_example.factors import LinearFactors
from hf_poprisk.per_example.undisturbed import mode, undisturbed

LEFT, RIGHT = "basis_left", "basis_right"  # in the state of a parameter
_NUM_EXAMPLES = 256  # that the bases are measured on


class EigenPopRiskAdamW(PopRiskAdamW):
    """What ``PopRiskAdamW(..., basis="eigen")`` gives; its state holds the bases too."""

    @property
    def bases(self) -> Mapping[Tensor, Sides]:  # type: ignore[override]
        """Parameter → (U_L or None, U_R or None), of those that have one, in group order."""
        held = ((p, self.state.get(p, {})) for p in self._all_parameters())
        return {p: (s.get(LEFT), s.get(RIGHT)) for p, s in held if LEFT in s or RIGHT in s}

    def set_bases(self, bases: Mapping[Tensor, Sides]) -> None:
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
        self._window = None

    def _update(self) -> None:
        if not self.bases:
            raise RuntimeError("basis='eigen' has no bases: call set_bases before the first step.")
        super()._update()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        super().load_state_dict(state_dict)
        # torch has cast the bases to the parameter's dtype, and in bfloat16 they are not orthogonal
        saved = (state_dict["state"].get(i, {}) for g in state_dict["param_groups"] for i in g["params"])
        for p, state in zip(self._all_parameters(), saved, strict=True):
            for side in (LEFT, RIGHT):
                if side in state:
                    self.state[p][side] = _held(state[side], p)
        self._window = None


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
        if not optimizer.bases:
            try:
                self._measure(optimizer)
            except ValueError as error:
                reason = str(error).rstrip(".")
                raise ValueError(
                    f"poprisk_basis=eigen has nothing to measure ({reason}): set poprisk_basis=coordinate."
                ) from error
        turned = list(optimizer.bases)
        every = sum(p.numel() for p in optimizer._all_parameters() if p.requires_grad)
        what = "AdamW's moments and the gate" if optimizer.needs_examples else "AdamW's moments"
        trainer._say(
            f"poprisk_basis=eigen: {what} of {sum(p.numel() for p in turned):,} of {every:,} parameters "
            f"({len(turned)} matrices) are in the eigenbasis of their gradients."
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
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        bases = {}
        for name, (left, right) in found.items():
            layer = layers[name]
            # among tokens, few of which the examples hold, most directions are rounding
            left = None if layer is head or layer.weight in tables else left
            bases[layer.weight] = (right, left) if isinstance(layer, Conv1D) else (left, right)
        optimizer.set_bases(bases)
        if not optimizer.bases:
            raise ValueError("no layer that is trained has a gradient and a side that is short enough")
