"""Where the examples of a micro-batch are, in whatever it is nested, and how they are taken out."""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from losses import Kind, first_step, gap
from models import layout, save_tiny_model, trainer_of, trl_trainer_of
from peft import LoraConfig
from test_trainer import Record
from torch import nn
from transformers import BatchEncoding, DataCollatorWithFlattening, Trainer

from hf_poprisk import PopRiskMixin
from hf_poprisk.per_example import Packed, Rows
from hf_poprisk.per_example.examples import NotSeparable, copied, find_layout, take


def test_rows_are_found_in_nested_batches() -> None:
    x = torch.zeros(6, 3)
    for inputs in (
        {"x": x},
        {"a": {"x": x}, "b": {"x": x}},
        (x, torch.zeros(6)),
        [{"x": x}, None],
        BatchEncoding({"x": x}),
    ):
        assert find_layout(inputs) == Rows(6, 6)
    assert find_layout({"scale": 2.0, "x": x}, rows_per_example=2) == Rows(3, 6)
    with pytest.raises(NotSeparable, match="6 rows are not examples of 4 rows each"):
        find_layout({"x": x}, rows_per_example=4)
    with pytest.raises(NotSeparable, match="holds no tensor"):
        find_layout({"text": "none"})


def test_containers_keep_their_kind() -> None:
    x = torch.arange(8).view(4, 2)
    for inputs, kind in (
        ({"x": x}, dict),
        (OrderedDict(x=x), OrderedDict),
        (BatchEncoding({"x": x}), BatchEncoding),
    ):
        taken = take(inputs, Rows(4, 4), [2])
        assert type(taken) is kind and taken["x"].tolist() == [[4, 5]]
        again = copied(inputs)  # for a loss that works in place
        assert type(again) is kind and again["x"] is not x and torch.equal(again["x"], x)
    taken = take(([x, x, x], {"n": (x,)}, None, "text"), Rows(2, 4), [1])
    assert [t.tolist() for t in taken[0]] == [[[2, 3], [6, 7]]] * 3
    assert taken[1]["n"][0].tolist() == [[2, 3], [6, 7]] and taken[2:] == (None, "text")
    of_each = [{"x": torch.zeros(3)}, {"x": torch.ones(3)}]  # an entry per example
    assert take(of_each, Rows(2, 2), [1])[0]["x"].tolist() == [1, 1, 1]


def test_a_list_as_long_as_the_examples_is_one_per_example() -> None:
    """Unless its tensors could be of all examples: then nothing is guessed."""
    ragged = {"points": [torch.zeros(3, 2), torch.ones(2, 2)], "x": torch.zeros(2, 4)}
    assert take(ragged, Rows(2, 2), [1])["points"][0].tolist() == [[1, 1], [1, 1]]
    with pytest.raises(NotSeparable, match="'views'.* may hold an entry per example or tensors of all"):
        take({"views": [torch.zeros(2, 3), torch.zeros(2, 3)]}, Rows(2, 2), [0])
    views = {"views": [torch.zeros(4, 3), torch.ones(4, 3)]}  # of four examples
    assert [len(view) for view in take(views, Rows(4, 4), [0])["views"]] == [1, 1]


def test_what_the_examples_share_is_left_alone() -> None:
    positions = torch.arange(3)[None]
    several = torch.arange(12).view(3, 4, 1)  # of several kinds: [3, rows, tokens]
    taken = take(
        {"x": torch.zeros(4, 3), "scale": torch.tensor(2.0), "position_ids": positions, "kinds": several},
        Rows(4, 4),
        [1],
    )
    assert taken["scale"] == 2 and taken["position_ids"] is positions
    assert taken["kinds"].flatten().tolist() == [1, 5, 9]


def images(counts: list[int], known: bool = True) -> tuple[dict[str, Any], Any]:
    """Rows with so many images, of different sizes, each patch numbered by its image."""
    grid = torch.tensor([[1, 2, 2 * (1 + i % 3)] for i in range(sum(counts))])
    sizes = grid.prod(-1)
    ids, image = [], 0
    for count in counts:
        row = [7]
        for _ in range(count):
            row += [99] * int(sizes[image] // 4) + [8]
            image += 1
        ids.append(row + [0] * (20 - len(row)))
    pixels = torch.arange(len(grid)).repeat_interleave(sizes)[:, None].float()
    config = SimpleNamespace(image_token_id=99, vision_config=SimpleNamespace(spatial_merge_size=2))
    batch = {"input_ids": torch.tensor(ids), "pixel_values": pixels, "image_grid_thw": grid}
    return batch, config if known else None


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 0, 1, 3], [0, 4, 0, 0], [3, 1, 2, 1]])
def test_pixels_go_with_the_rows_whose_images_they_are(counts: list[int]) -> None:
    batch, config = images(counts)
    for rows_per_example in (1, 2):
        n = 4 // rows_per_example
        for example in range(n):
            rows = range(example, 4, n)
            first = [sum(counts[:row]) for row in rows]
            mine = [
                i for start, row in zip(first, rows, strict=True) for i in range(start, start + counts[row])
            ]
            taken = take(batch, Rows(n, 4), [example], config)
            if not mine:  # a model that is given no images runs on the text alone
                assert taken.keys() == {"input_ids"}
                continue
            assert taken["image_grid_thw"].tolist() == batch["image_grid_thw"][mine].tolist()
            assert taken["pixel_values"].unique_consecutive().tolist() == mine


def test_pixels_of_nobody_known_are_refused() -> None:
    batch, config = images([2, 1, 1, 2], known=False)
    sentence = "'pixel_values' holds 6 images for 4 rows, and nothing says whose"
    with pytest.raises(NotSeparable, match=sentence):
        take(batch, Rows(4, 4), [0], config)
    batch, config = images([1, 1, 1, 1], known=False)
    assert take(batch, Rows(4, 4), [2], config)["pixel_values"].unique().tolist() == [2]


def test_tiles_without_a_grid() -> None:
    config = images([1])[1]
    ids = torch.tensor([[99] * 5 * n + [0] * (15 - 5 * n) for n in (1, 3, 0, 2)])
    batch = {"input_ids": ids, "pixel_values": torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 4, 4)}
    assert take(batch, Rows(4, 4), [1], config)["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert "pixel_values" not in take(batch, Rows(4, 4), [2], config)


def packed(lengths: list[int], padding: int = 0) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(padding, dtype=torch.long)])[None]
    return {"input_ids": torch.arange(positions.shape[1])[None], "position_ids": positions}


def test_packed_rows_are_told_by_their_positions() -> None:
    assert find_layout(packed([3, 1, 4])) == Packed((3, 1, 4))
    assert find_layout(packed([3, 4], padding=3)) == Packed((3, 7))
    assert find_layout(packed([5])) == Packed((5,))
    assert find_layout({k: v.expand(2, -1) for k, v in packed([5]).items()}) == Rows(2, 2)
    padded = torch.tensor([[0, 0, 0, 1, 2, 3]])  # positions that start over after padding on the left
    mask = {"attention_mask": (padded > 0).long()}
    assert find_layout({"input_ids": padded, "position_ids": padded, **mask}) == Rows(1, 1)
    batch = {
        **packed([3, 1, 4]),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        "max_length_q": 4,
    }
    taken = take(batch, Packed((3, 1, 4)), [0, 2])
    assert taken["input_ids"].tolist() == [[0, 1, 2, 4, 5, 6, 7]]
    assert taken["cu_seq_lens_q"].tolist() == [0, 3, 7] and taken["max_length_q"] == 4
    with pytest.raises(NotSeparable, match=r"inputs\['x'\] is \[8\], which hides the packed sequences"):
        take({**batch, "x": torch.zeros(8)}, Packed((3, 1, 4)), [0])


def assert_same_sums(window: Any, alone: Any, scale: float = 1.0) -> None:
    """Of eight examples; G as it is, and Q, which goes with the square of the scale."""
    assert window[0] == alone[0] == 8
    for name, pair in alone[1].items():
        for power, ours, theirs in zip((1, 2), window[1][name], pair, strict=True):
            assert (ours / scale**power - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_packed_sequences_are_examples(
    kind: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of the same sequences, one in a row each."""
    model, record = str(save_tiny_model(tmp_path / "model", kind)), Record(monkeypatch)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
    for options in (
        {"gradient_accumulation_steps": 8},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 8},
        {"packing": True, "max_length": 1024},
    ):
        torch.manual_seed(0)
        trainer = trl_trainer_of("SFT", model, tmp_path, max_steps=1, peft_config=adapter, **options)
        trainer.train()
        assert "gradient_accumulation_steps" in options or trainer._layers is not None
    alone, *together = record.windows
    for window in together:
        scale = 1.0
        if kind == "gpt2":  # TRL counts the first token of a sequence only where it stands alone in its row
            pairs = ((window[1][name][0], g) for name, (g, _) in alone[1].items())
            scale = max(float(ours.norm() / g.norm()) for ours, g in pairs if g.any())
        assert_same_sums(window, alone, scale)


def test_a_collator_that_flattens_is_a_packed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own, in the plain trainer."""
    record = Record(monkeypatch)
    data = [{"input_ids": torch.arange(3, 3 + n).tolist()} for n in (4, 7, 2, 5, 6, 3, 9, 4)]
    for size in (1, 4):
        options = {"data_collator": DataCollatorWithFlattening(), "max_steps": 1, **layout(size)}
        trainer_of(tmp_path, data, **options).train()
    alone, together = record.windows
    assert_same_sums(together, alone)


class Encoder(nn.Module):
    def __init__(self, conv: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.conv = nn.ConvTranspose1d(8, 8, 1) if conv else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        if self.conv is not None:
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out(x.tanh().mean(1))


class Two(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        a, b = inputs.values() if isinstance(inputs, dict) else inputs
        a, b = (model(**x) if isinstance(x, dict) else model(x) for x in (a, b))
        return (1 - nn.functional.cosine_similarity(a, b)).mean()


class Gated(PopRiskMixin, Two):
    pass


def stacked(features: list[Any], name: str) -> torch.Tensor:
    return torch.stack([f[name] for f in features])


COLLATORS = {
    "nested": lambda fs: {k: {"input_ids": stacked(fs, k)} for k in "ab"},
    "tuple": lambda fs: (stacked(fs, "a"), stacked(fs, "b")),
    "list": lambda fs: [stacked(fs, "a"), stacked(fs, "b")],
    "tuple of mappings": lambda fs: tuple({"input_ids": stacked(fs, k)} for k in "ab"),
}


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("name", COLLATORS)
def test_batches_that_are_nested_or_tuples(name: str, conv: bool, tmp_path: Path) -> None:
    data = [{k: torch.randint(0, 50, (7,)) for k in "ab"} for _ in range(8)]
    more = {"data_collator": COLLATORS[name]}
    kind = Kind(lambda: Encoder(conv), data, Gated, {"remove_unused_columns": False}, more)
    stock, _ = first_step(kind, tmp_path, 8, 1, "adamw_torch")
    ours, together = first_step(kind, tmp_path, 8, 1)
    _, alone = first_step(kind, tmp_path, 1, 8)
    assert gap(ours, stock) < 5e-5
    opened, expected = (t.state.log_history[0]["poprisk/fraction_open"] for t in (together, alone))
    assert opened == pytest.approx(expected, abs=2e-3)
