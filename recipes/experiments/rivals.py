"""Optimizers of others, with the betas that their authors recommend and no weight decay."""

from pytorch_optimizer import SOAP, Lion, Muon
from torch import nn
from torch.optim import Optimizer


def lion(model: nn.Module, lr: float) -> Optimizer:
    """arXiv:2302.06675, betas .9 and .99."""
    return Lion(_trained(model), lr=lr)


def soap(model: nn.Module, lr: float) -> Optimizer:
    """arXiv:2409.11321, betas .95 and .95, a new basis every 10 steps; a vocabulary is rotated too."""
    return SOAP(_trained(model), lr=lr, weight_decay=0.0)


def muon(model: nn.Module, lr: float) -> Optimizer:
    """Muon, momentum .95, for the matrices between embedding and head; AdamW, betas .9 and .95, for the rest.

    One rate for both: the writes are scaled to the size of AdamW's, as in arXiv:2502.16982.
    """
    outside = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in _trained(model):
        groups[p.dim() == 2 and p not in outside].append(p)
    return Muon(
        [{"params": found, "use_muon": hidden, "lr": lr} for hidden, found in groups.items()],
        use_adjusted_lr=True,
    )


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
