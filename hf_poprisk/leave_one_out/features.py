"""What the regression sees of every example: gradients of what it gives for the example, in two parts.

The head is apart from the layers below it: on some tasks one of them tells much more than the
other, and which one the held-out likelihood says beforehand (``judgement.py``, ``classes.py``).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_poprisk.per_example.basis import Features, measure_bases
from hf_poprisk.per_example.factors import LinearFactors, linear_layers
from hf_poprisk.per_example.undisturbed import mode, undisturbed

logger = logging.getLogger(__name__)

MAX_FEATURES = 1 << 17  # k: what the buckets share is noise in the inner products, of the order of 1/√k
FEWEST_FEATURES = 1 << 12
MAX_NUMBERS = 1 << 27  # n · k, half a gigabyte
HALF = 0.5  # of the weights: with less, say so
NUM_FOR_BASES = 256  # examples that the bases are measured on


def label_features(
    model: nn.Module,
    batches: Callable[[int | None], Iterable[Any]],
    log_odds: Callable[[nn.Module, Any], Tensor],
    rows_per_example: int = 1,
    k: int = MAX_FEATURES,
    seed: int = 0,
    classifier: bool = False,
) -> list[np.ndarray]:
    """Features of the gradients of the labels' log-odds, over all linear layers, in eval mode.

    Args:
        model: not wrapped; left as it is.
        batches: ``batches(count)`` iterates over micro-batches of some ``count`` examples of all ranks, those
            that are this rank's, or over all of this rank's with None; the same ones each time.
        log_odds: (model, micro-batch) → z [N] with its graph.
        rows_per_example: of what the layers see; row j belongs to example j mod N.
        k: features of each part.
        seed: of the projection.
        classifier: the last linear layer is the head.

    Returns:
        For each part that the model has, the head and the layers below it: [n of this rank, k] float32.

    Raises:
        ValueError: a model without linear layers, or whose layers do not see the examples as rows; or
            gradients that are not finite.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError("the model has no linear layer, and labels are judged by the gradients of those.")
    if (share := _share(model, layers)) < HALF:
        logger.warning(
            f"labels are judged by the gradients of linear layers, which hold {share:.0%} of the model's "
            "weights but for its embeddings: stacked experts and convolutions have no part in it."
        )

    checked = False

    def check(batch: Any) -> None:
        """An example's gradient must be in its own rows: z of the first one has none in the others'."""
        factors = LinearFactors(model, layers, _of_the_first)
        with factors.forward():
            z = log_odds(model, batch)
        if len(z) > 1:
            factors.backward(z * (torch.arange(len(z), device=z.device) == 0), rows_per_example)

    def run(see: Any, count: int | None, done: Callable[[int], None] = lambda _: None) -> None:
        nonlocal checked
        for batch in batches(count):
            if not checked:
                check(batch)
                checked = True
            factors = LinearFactors(model, layers, see)
            with factors.forward():
                z = log_odds(model, batch)
            factors.backward(z, rows_per_example)
            done(len(z))

    with undisturbed(model, model.parameters()), mode(model, False), torch.enable_grad():
        bases = measure_bases(lambda see: run(see, NUM_FOR_BASES))
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        of_head = set() if head is None else set(head.modules())  # several where an adapter wraps it
        if classifier:
            of_head = {layers[[name for name in layers if name in bases][-1]]}
        names: tuple[list[str], list[str]] = ([], [])
        for name in bases:
            names[layers[name] not in of_head].append(name)
        parts = [Features({n: bases[n] for n in part}, k, seed) for part in names if part]
        rows: list[list[Tensor]] = [[] for _ in parts]

        def see(name: str, a: Tensor, d: Tensor) -> None:
            for part in parts:
                part.see(name, a, d)

        def done(num_examples: int) -> None:
            for part, found in zip(parts, rows, strict=True):
                found.append(part.take(num_examples).cpu())

        run(see, None, done)
    return [torch.cat(found).numpy() for found in rows]


def _of_the_first(name: str, a: Tensor, d: Tensor) -> None:
    if d[1:].nan_to_num(0.0, 0.0, 0.0).any():  # what is not finite is said elsewhere
        raise ValueError(
            f"labels cannot be judged by the gradients of {name}, which does not hold the examples of a "
            "micro-batch side by side in its first dimension: give a model whose layers do."
        )


def spread(items: Sequence[int], count: int) -> list[int]:
    """``count`` of the items, evenly spread: data may be sorted."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _share(model: nn.Module, layers: Mapping[str, nn.Module]) -> float:
    """Of the matrices of a model, embeddings aside, what the layers hold."""
    held = {p for module in layers.values() for p in module.parameters(recurse=False)}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} - held
    sizes = {p: p.numel() for p in set(model.parameters()) - tables if p.dim() > 1}
    return sum(n for p, n in sizes.items() if p in held) / max(sum(sizes.values()), 1)


def num_features(n: int) -> int:
    """k for n examples."""
    return min(MAX_FEATURES, max(FEWEST_FEATURES, MAX_NUMBERS // n))


def pair_log_odds(model: nn.Module, inputs: Any) -> Tensor:
    """log p(chosen) − log p(rejected), [N], for rows [chosen…, rejected…] as TRL's DPO collates them."""
    skipped = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    inputs, mask = {k: v for k, v in inputs.items() if k not in skipped}, inputs["completion_mask"]
    # logits of the completions alone: of a short answer the head would be most of the work
    first = max(int(mask.any(0).int().argmax()), 1)
    mask, labels = mask[:, first:], inputs["input_ids"][:, first:, None]
    if _keeps_logits(model):
        inputs["logits_to_keep"] = mask.shape[1] + 1
    logits = model(**inputs, use_cache=False).logits
    logits = logits[:, -mask.shape[1] - 1 : -1]  # behind the virtual tokens of prompt-learning adapters
    log_probs = logits.float().log_softmax(-1).gather(-1, labels)[..., 0]
    chosen, rejected = (log_probs * mask).sum(1).chunk(2)
    return chosen - rejected


def _keeps_logits(model: nn.Module) -> bool:
    base: Any = model
    if hasattr(base, "get_base_model"):  # under an adapter
        base = base.get_base_model()
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def reward_log_odds(model: nn.Module, inputs: Any) -> Tensor:
    """Reward of the chosen minus of the rejected, [N], for rows [chosen…, rejected…]."""
    chosen, rejected = model(**inputs, use_cache=False).logits.squeeze(-1).float().chunk(2)
    return chosen - rejected
