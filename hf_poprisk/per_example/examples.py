"""A micro-batch of several examples: where they are, and how some of them are taken out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_poprisk.per_example.layout import Layout, Packed, Rows

# What a vision processor gives per image, and the shape of the patches that one image has in it.
_IMAGES = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_NO_IMAGE = object()  # of rows that hold text alone: the model is not to be given any


class NotSeparable(ValueError):
    """The examples of this micro-batch cannot be taken out of it."""


def find_layout(
    inputs: Any, rows_per_example: int = 1, main_input: str = "input_ids", collated_rows: int | None = None
) -> Layout:
    """Which part of a collated micro-batch belongs to which example.

    A single row whose ``position_ids`` start over holds several sequences, one after the other.

    Args:
        inputs: the micro-batch.
        rows_per_example: of what the model is called on.
        main_input: the key that tells how many rows there are, if it is there.
        collated_rows: of an example in ``inputs``, where the loss makes other rows of them.

    Raises:
        NotSeparable: no tensor with rows, or rows that do not divide over the examples.
    """
    if isinstance(inputs, Mapping) and (lengths := _packed_lengths(inputs)) is not None:
        return Packed(lengths)
    rows = num_rows(inputs, main_input)
    if rows is None:
        raise NotSeparable("the batch holds no tensor whose first axis could be its rows")
    own = collated_rows or rows_per_example
    if rows % own:
        raise NotSeparable(f"{rows} rows are not examples of {own} rows each")
    return Rows(rows // own, rows // own * rows_per_example)


def num_rows(inputs: Any, main_input: str) -> int | None:
    first = inputs.get(main_input) if isinstance(inputs, Mapping) else None
    tensors = (x for x in [first, *_leaves(inputs)] if isinstance(x, Tensor) and x.dim() > 0)
    return next((x.shape[0] for x in tensors), None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _packed_lengths(inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
    positions, ids = inputs.get("position_ids"), inputs.get("input_ids")
    if not (isinstance(positions, Tensor) and isinstance(ids, Tensor)):
        return None
    if positions.shape != ids.shape or ids.dim() != 2 or ids.shape[0] != 1:
        return None
    if inputs.get("attention_mask") is not None:
        return None  # a single padded row
    used = positions[0].nonzero().flatten()
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    if not len(used) or starts[0] != 0:
        return None
    # what pads the row to a multiple has position 0 too: it has no label, and goes with the last sequence
    starts = [start for start in starts if start < int(used[-1])]
    return tuple(b - a for a, b in pairwise([*starts, positions.shape[1]]))


def take(inputs: Any, layout: Layout, examples: Sequence[int], config: Any = None) -> Any:
    """The part of ``inputs`` that belongs to some examples, in whatever it is nested.

    Args:
        inputs: what a collator makes, or the arguments of a model: tensors with the rows on their first or
            second axis, lists with an entry per row or example, images beside ``input_ids``, and anything
            that all examples share (numbers, texts, tensors whose first axis is 1).
        layout: of the batch.
        examples: which ones, in order.
        config: of the model; says which token stands for an image.

    Raises:
        NotSeparable: a tensor or list that is neither, by name.
    """
    if isinstance(layout, Packed):
        return _take_packed(inputs, layout, examples)
    return _Taker(layout, examples, config)(inputs)


class _Taker:
    """Takes the rows of some examples."""

    def __init__(self, layout: Rows, examples: Sequence[int], config: Any) -> None:
        self._layout, self._examples, self._config = layout, examples, config
        firsts = range(0, layout.num_rows, layout.num_examples)
        self._rows = [first + i for first in firsts for i in examples]

    def __call__(self, value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            images = self._images(value)
            parts = {k: images[k] if k in images else self(v, k) for k, v in value.items()}
            return _like(value, {k: v for k, v in parts.items() if v is not _NO_IMAGE})
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, list | tuple):
            return self._sequence(value, name)
        return value

    def _tensor(self, value: Tensor, name: str) -> Tensor:
        rows = self._layout.num_rows
        if value.dim() == 0:
            return value
        if name == "position_ids" and value.dim() == 3 and value.shape[1] == rows:
            return _select(value, 1, self._rows)  # of several kinds: [3, rows, tokens]
        if (own := self._own(value)) is not None:
            return _select(value, 0, own)
        if value.shape[0] == 1:
            return value
        if value.dim() > 1 and value.shape[1] == rows:  # sequence first
            return _select(value, 1, self._rows)
        raise self._hidden(name, value)

    def _sequence(self, value: Any, name: str) -> Any:
        own, leaves = self._own(value), list(_leaves(value))
        held = [isinstance(x, Tensor) and x.dim() > 0 and self._own(x) is not None for x in leaves]
        if own is not None and (name or not any(held)):
            if held and all(held):
                raise NotSeparable(
                    f"inputs[{name!r}] may hold an entry per example or tensors of all of them: its length "
                    "is theirs"
                )
            return _like(value, [value[i] for i in own])
        if any(held):
            return _like(value, [self(v, f"{name}[{i}]") for i, v in enumerate(value)])
        if not any(isinstance(x, Tensor) for x in leaves):
            return value
        raise self._hidden(name, value)

    def _own(self, value: Any) -> Sequence[int] | None:
        """Which entries are the examples', where there is one per row or example."""
        if len(value) == self._layout.num_rows:
            return self._rows
        return self._examples if len(value) == self._layout.num_examples else None

    def _hidden(self, name: str, value: Any) -> NotSeparable:
        return NotSeparable(
            f"inputs[{name!r}] has {len(value)} entries for {self._layout.num_examples} examples, which "
            "hides them"
        )

    def _images(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What an image processor gives, taken by the images that the rows hold."""
        taken: dict[str, Any] = {}
        for pixels, grid in _IMAGES.items():
            values, grids = inputs.get(pixels), inputs.get(grid)
            if not isinstance(values, Tensor):
                continue
            if not isinstance(grids, Tensor):
                if self._own(values) is not None:
                    continue  # one image per row
                sizes, patches = None, [1] * len(values)
            else:
                sizes = patches = grids.prod(-1).tolist()
            owners = self._image_rows(inputs, pixels, len(patches), sizes)
            mine = [image for row in self._rows for image, owner in enumerate(owners) if owner == row]
            parts = values.split(patches)
            taken[pixels] = torch.cat([parts[i] for i in mine]) if mine else _NO_IMAGE
            for name, value in inputs.items():  # the grid, sizes, masks: one entry per image
                beside = name.startswith(("image_", "pixel_")) and name not in _IMAGES
                if name == grid or beside and isinstance(value, Tensor) and len(value) == len(patches):
                    taken[name] = value[mine] if mine else _NO_IMAGE
        return taken

    def _image_rows(
        self, inputs: Mapping[str, Any], name: str, images: int, sizes: list[int] | None
    ) -> list[int]:
        """The row of each image: in order, as many as the row has image tokens for."""
        rows = self._layout.num_rows
        kind = "video" if name.endswith("videos") else "image"
        token = getattr(self._config, f"{kind}_token_id", None)
        ids = inputs.get("input_ids")
        tokens = None if token is None or ids is None else (ids == token).sum(1).tolist()
        if tokens is None or not sum(tokens):
            if images == rows:
                return list(range(rows))
            raise NotSeparable(
                f"{name!r} holds {images} images for {rows} rows, and nothing says whose they are"
            )
        merge = getattr(getattr(self._config, "vision_config", None), "spatial_merge_size", 1) ** 2
        left = [sum(tokens) // images] * images if sizes is None else [size // merge for size in sizes]
        owners, row, room = [], 0, tokens[0]
        for size in left:
            while room < size and row + 1 < rows:
                row, room = row + 1, tokens[row + 1]
            owners.append(row)
            room -= size
        if room or sum(left) != sum(tokens):
            raise NotSeparable(f"{name!r} does not fit the image tokens of the rows")
        return owners


def _take_packed(inputs: Any, layout: Packed, examples: Sequence[int]) -> Any:
    spans, lengths = [layout.spans()[i] for i in examples], layout.of(examples).lengths

    def part(value: Any, name: str) -> Any:
        if name.startswith("cu_seq_lens"):
            return torch.tensor([0, *lengths], device=value.device).cumsum(0).to(value.dtype)
        if name.startswith("max_length"):
            return max(lengths)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape[:2] != (1, layout.num_tokens):
            raise NotSeparable(f"inputs[{name!r}] is {list(value.shape)}, which hides the packed sequences")
        return torch.cat([value[:, span] for span in spans], 1)

    return _mapped(part, inputs)


def copied(batch: Any) -> Any:
    """A loss may take things out of the batch that it is given, or scale them in place."""
    return _mapped(lambda value, name: value.clone() if isinstance(value, Tensor) else value, batch)


def _mapped(function: Callable[[Any, str], Any], value: Any, name: str = "") -> Any:
    """``function(value, name)`` of everything in a batch; the name is that in the innermost mapping."""
    if isinstance(value, Mapping):
        return _like(value, {k: _mapped(function, v, k) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return _like(value, [_mapped(function, v, name) for v in value])
    return function(value, name)


def _select(value: Tensor, axis: int, rows: Sequence[int]) -> Tensor:
    if len(rows) == 1:
        return value.narrow(axis, rows[0], 1)
    return value.index_select(axis, torch.tensor(rows, device=value.device))


def _like(value: Any, content: Any) -> Any:
    """A container of the kind of ``value`` with another content."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*content)
    kind = type(value)
    try:
        return content if type(content) is kind else kind(content)
    except TypeError:  # a mapping with a constructor of its own
        return content
