"""Where the examples of a micro-batch are, in whatever it is nested, and how they are taken out."""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from losses import gap
from models import save_tiny_model, sequences
from peft import LoraConfig
from test_trainer import QUIET, Record
from torch import nn
from transformers import BatchEncoding, DataCollatorWithFlattening, Trainer, TrainerCallback

from hf_poprisk import PopRiskMixin, PopRiskSFTConfig, PopRiskSFTTrainer, PopRiskTrainingArguments
from hf_poprisk.per_example import Packed, Rows
from hf_poprisk.per_example.examples import NotSeparable, find_layout, take


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
    with pytest.raises(
        NotSeparable, match="'pixel_values' holds 6 images for 4 rows, and nothing says whose"
    ):
        take(batch, Rows(4, 4), [0], config)
    batch, config = images([1, 1, 1, 1], known=False)
    assert take(batch, Rows(4, 4), [2], config)["pixel_values"].unique().tolist() == [2]


def test_tiles_without_a_grid() -> None:
    batch, config = images([1, 3, 0, 2])
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


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_packed_sequences_are_examples(
    kind: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of the same sequences, one in a row each."""
    save_tiny_model(tmp_path / "model", kind)
    found = {}
    for name, options in {
        "alone": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "padding-free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 8},
        "packed": {"packing": True, "max_length": 1024, "gradient_accumulation_steps": 1},
    }.items():
        with monkeypatch.context() as patch:
            record = Record(patch)
            torch.manual_seed(0)
            adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
            args = PopRiskSFTConfig(str(tmp_path), bf16=False, max_steps=1, **{**QUIET, **options})
            trainer = PopRiskSFTTrainer(
                str(tmp_path / "model"), args=args, train_dataset=sequences(8), peft_config=adapter
            )
            trainer.train()
            assert name == "alone" or trainer._layers is not None
            found[name] = record.windows[0]
    alone = found["alone"][1]
    for name in ("padding-free", "packed"):
        assert found[name][0] == found["alone"][0] == 8
        # of some models TRL counts the first token of a sequence only where it stands alone in its row
        scale = 1.0
        if kind == "gpt2":
            scale = max(
                float(found[name][1][p][0].norm() / g.norm()) for p, (g, _) in alone.items() if g.any()
            )
        for parameter, pair in alone.items():
            for power, ours, theirs in zip((1, 2), found[name][1][parameter], pair, strict=True):
                allowed = 1e-5 * theirs.abs().max()
                assert (ours / scale**power - theirs).abs().max() <= allowed, (name, parameter)


def test_a_collator_that_flattens_is_a_packed_row(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own, in the plain trainer."""
    from models import tiny_model

    from hf_poprisk import PopRiskTrainer

    data = [{"input_ids": torch.arange(3, 3 + n).tolist()} for n in (4, 7, 2, 5, 6, 3, 9, 4)]
    sums = []
    for size in (1, 4):
        with monkeypatch.context() as patch:
            record = Record(patch)
            options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
            args = PopRiskTrainingArguments(str(tmp_path), max_steps=1, **{**QUIET, **options})
            PopRiskTrainer(
                tiny_model(), args=args, train_dataset=data, data_collator=DataCollatorWithFlattening()
            ).train()
            sums.append(record.windows[0])
    assert sums[0][0] == sums[1][0] == 8
    for name, pair in sums[0][1].items():
        for ours, theirs in zip(sums[1][1][name], pair, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


class Encoder(nn.Module):
    def __init__(self, conv: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 1) if conv else None

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


class Grab(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradient = {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("name", COLLATORS)
def test_batches_that_are_nested_or_tuples(name: str, conv: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [{k: torch.randint(0, 50, (7,), generator=generator) for k in "ab"} for _ in range(8)]
    found = {}
    for optim, size in (("adamw_torch", 8), ("poprisk_adamw", 8), ("poprisk_adamw", 1)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        args = PopRiskTrainingArguments(
            str(tmp_path), max_steps=1, max_grad_norm=0.0, optim=optim, remove_unused_columns=False,
            **{**QUIET, **options},
        )  # fmt: skip
        grab = Grab()
        trainer = Gated(
            Encoder(conv), args=args, train_dataset=data, data_collator=COLLATORS[name], callbacks=[grab]
        )
        trainer.train()
        found[optim, size] = grab.gradient, trainer.state.log_history[0].get("poprisk/fraction_open")
    assert gap(found["poprisk_adamw", 8][0], found["adamw_torch", 8][0]) < 5e-5
    assert found["poprisk_adamw", 8][1] == pytest.approx(found["poprisk_adamw", 1][1], abs=2e-3)
