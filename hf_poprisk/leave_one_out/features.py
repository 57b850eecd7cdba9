"""What the regression sees of every example: gradients of what it gives for the example, in two parts.

The head is apart from the layers below it: on some tasks one of them tells much more than the
other, and which one the held-out likelihood says beforehand (``judgement.py``).
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_poprisk.leave_one_out.chunks import Chunks
from hf_poprisk.per_example.basis import Features, LayerBasis, measure_bases
from hf_poprisk.per_example.factors import LinearFactors, linear_layers
from hf_poprisk.per_example.undisturbed import mode, undisturbed

logger = logging.getLogger(__name__)

_MAX_FEATURES = 1 << 17  # k: what the buckets share is noise in the inner products, of the order of 1/√k
_FEWEST_FEATURES = 1 << 12
_MAX_NUMBERS = 1 << 28  # n · k, a gigabyte
_NUM_FOR_BASES = 256  # examples that the bases are measured on
_CHUNK = 32  # micro-batches


class LabelFeatures(NamedTuple):
    """Of each part that the model has, the head and the layers below it.

    Attributes:
        parts: [n of this rank, k] float32.
        bases: name of a layer → its basis.
        labels: what ``labels`` gave, [n of this rank]; None without it.
    """

    parts: list[np.ndarray]
    bases: list[dict[str, LayerBasis]]
    labels: Tensor | None = None


def label_features(
    model: nn.Module,
    batches: Callable[[int | None], Iterable[Any]],
    log_odds: Callable[[nn.Module, Any], Tensor],
    rows_per_example: int = 1,
    k: int = _MAX_FEATURES,
    classifier: bool = False,
    labels: Callable[[], Tensor] | None = None,
    chunks: Chunks | None = None,
) -> LabelFeatures:
    """Features of the gradients of the labels' log-odds, over all linear layers, in eval mode.

    Args:
        model: not wrapped; left as it is.
        batches: ``batches(count)`` iterates over micro-batches of some ``count`` examples of all ranks, those
            that are this rank's, or over all of this rank's with None; the same ones each time.
        log_odds: (model, micro-batch) → z [N] with its graph.
        rows_per_example: of what the layers see; row j belongs to example j mod N.
        k: features of each part.
        classifier: the last linear layer is the head.
        labels: the labels of the micro-batch that log_odds was given last, [N].
        chunks: keeps what is finished, and has what an earlier call with the same arguments has finished.

    Raises:
        ValueError: a model without linear layers, or whose layers do not see the examples as rows; or
            gradients that are not finite.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError("the model has no linear layer, and labels are judged by the gradients of those.")
    if (share := _share(model, layers)) < 0.5:
        logger.warning(
            f"labels are judged by the gradients of linear layers, which hold {share:.0%} of the model's "
            "weights but for its embeddings: stacked experts and convolutions have no part in it."
        )

    checked = False

    def check(batch: Any) -> None:
        """An example's gradient must be in its own rows: z of the first one has none in the others'."""
        factors = LinearFactors(model, layers, _of_the_first)
        with factors.forward():
            z = log_odds(model, copy.copy(batch))  # a loss may take its labels out
        if len(z) > 1:
            factors.backward(z * (torch.arange(len(z), device=z.device) == 0), rows_per_example)

    def run(see: Any, count: int | None, done: Callable[[int], None] = lambda _: None, skip: int = 0) -> None:
        nonlocal checked
        for i, batch in enumerate(batches(count)):
            if i < skip:
                continue
            if not checked:
                check(batch)
                checked = True
            factors = LinearFactors(model, layers, see)
            with factors.forward():
                z = log_odds(model, batch)
            factors.backward(z, rows_per_example)
            done(len(z))

    with undisturbed(model, model.parameters()), mode(model, False), torch.enable_grad():
        kept = None if chunks is None else chunks.load("bases")
        if kept is None:
            bases = measure_bases(lambda see: run(see, _NUM_FOR_BASES))
            if chunks is not None:
                chunks.save("bases", {f"{f}/{n}": getattr(b, f) for n, b in bases.items() for f in _OF_BASIS})
        else:
            names = sorted(key.removeprefix("left/") for key in kept if key.startswith("left/"))
            device = next(model.parameters()).device
            bases = {n: LayerBasis(*(kept[f"{f}/{n}"].to(device) for f in _OF_BASIS)) for n in names}
            checked = True
        get_head = getattr(model, "get_output_embeddings", None)
        output = get_head() if get_head is not None else None
        of_head = set() if output is None else set(output.modules())  # several where an adapter wraps it
        if classifier:
            of_head = {layers[[name for name in layers if name in bases][-1]]}
        below, head = (
            {n: x for n, x in bases.items() if (layers[n] in of_head) is part} for part in (False, True)
        )
        of_parts = [part for part in (head, below) if part]
        parts = [Features(part, k) for part in of_parts]
        finished: list[dict[str, Tensor]] = []
        while chunks is not None and (kept := chunks.load(f"{len(finished):05}")) is not None:
            finished.append(kept)
        unfinished: list[dict[str, Tensor]] = []  # micro-batches

        def see(name: str, a: Tensor, d: Tensor) -> None:
            for part in parts:
                part.see(name, a, d)

        def done(num_examples: int) -> None:
            found = {f"part{i}": part.take(num_examples).cpu() for i, part in enumerate(parts)}
            unfinished.append(found if labels is None else found | {"labels": labels()})
            if len(unfinished) == _CHUNK:
                finish()

        def finish() -> None:
            chunk = {key: torch.cat([found[key] for found in unfinished]) for key in unfinished[0]}
            unfinished.clear()
            if chunks is not None:
                chunks.save(f"{len(finished):05}", chunk)
            finished.append(chunk)

        run(see, None, done, skip=_CHUNK * len(finished))
        if unfinished:
            finish()

    def whole(key: str) -> Tensor:
        return torch.cat([chunk.pop(key) for chunk in finished])

    found = [whole(f"part{i}").numpy() for i in range(len(parts))]
    return LabelFeatures(found, of_parts, None if labels is None else whole("labels"))


_OF_BASIS = [field.name for field in fields(LayerBasis)]


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
    return min(_MAX_FEATURES, max(_FEWEST_FEATURES, _MAX_NUMBERS // n))


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


class ClassLogits(TorchFunctionMode):
    """While it is entered, keeps the logits and labels that the one cross-entropy is computed of."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            call = inspect.signature(func).bind(*args, **kwargs)
            call.apply_defaults()
            self._calls.append(call.arguments)
        return func(*args, **kwargs)

    @property
    def found(self) -> tuple[Tensor, Tensor]:
        """The logits, [N, K] with their graph, and the labels, [N] int64, negative where they are ignored."""
        return self._calls[0]["input"], self._calls[0]["target"].detach()

    def wrong(self, num_examples: int) -> str | None:
        """Why a loss is not the cross-entropy of one label per example; what else it adds is not seen."""
        if not self._calls:
            return "it computes none"
        if len(self._calls) > 1:
            return "it takes more than one log-probability of an example"
        call, (logits, labels) = self._calls[0], self.found
        if logits.dim() != 2 or labels.dim() != 1 or logits.shape[1] < 2:
            return f"its logits are {list(logits.shape)} and not [examples, labels]"
        if len(logits) != num_examples:
            return f"it has {len(logits)} terms for {num_examples} examples"
        if call["weight"] is not None or call["label_smoothing"]:
            return "its cross-entropy has class weights or label smoothing"
        if call["ignore_index"] >= 0:
            return "its cross-entropy ignores a label that is not negative"
        return None
