"""Convolutions, norms over channels, class tokens, rows of positions and layer scales in one backward."""

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from test_layers import assert_follows_the_loop, batched
from torch import Tensor, nn

from hf_poprisk.per_example import Packed, Rows, products
from hf_poprisk.per_example import capture as capturing

N = 3
follows_the_loop = partial(assert_follows_the_loop, n=N)
CONVOLUTIONS = {
    "patches": lambda: (nn.Conv2d(4, 6, 2, stride=2), (8, 6)),
    "audio": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (11,)),
    "depthwise": lambda: (nn.Conv1d(4, 8, 4, padding=3, groups=4), (9,)),
    "same, of even size": lambda: (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1)), (7, 6)),
    "groups, dilated": lambda: (nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=2, groups=2), (7, 9)),
    "circular": lambda: (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (7,)),
    "video": lambda: (nn.Conv3d(4, 6, (1, 2, 3), padding="valid"), (3, 5, 4)),
}


@pytest.mark.parametrize("size_of_small", [0, 1 << 17])
@pytest.mark.parametrize("rows", [N, 2 * N])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str, rows: int, size_of_small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "_SMALL", size_of_small)
    monkeypatch.setattr(products, "_BLOCK", 20)
    torch.manual_seed(0)
    layer, size = CONVOLUTIONS[kind]()
    before = type(layer)(4, 4, 1)  # whose gradient comes through the layer
    model = nn.Sequential(before, nn.GroupNorm(2, 4), nn.Tanh(), layer).double()
    x = torch.randn(rows, 4, *size, dtype=torch.float64)
    follows_the_loop(model, lambda x: model(x).sin().sum(), x)
    model.zero_grad()
    layer.weight.requires_grad_(False)
    follows_the_loop(model, lambda x: model(x).sin().sum(), x)


VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": 8, "patch_size": 4}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "patch_size": 2}
MODELS = {
    "ViT": VISION,
    "Dinov2": VISION,
    "CLIPVision": VISION,
    "Beit": VISION | {"layer_scale_init_value": 0.1},
    "ConvNext": STAGES | {"layer_scale_init_value": 0.1},
}


@pytest.mark.parametrize("kind", MODELS)
def test_vision_models(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # at their start many are zero or one
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(N, 3, 8, 8, dtype=torch.float64)
    follows_the_loop(model, lambda x: model(x).last_hidden_state.sin().sum(), x)


SEQ2SEQ = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1, "vocab_size": 20}
SEQ2SEQ |= {"dropout_rate": 0.0}
RELATIVE = {
    "T5": SEQ2SEQ,
    "UMT5": SEQ2SEQ,  # a table in each layer
    "LongT5": SEQ2SEQ | {"local_radius": 3},
    "MPNet": VISION | {"vocab_size": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [*((kind, False) for kind in RELATIVE), ("T5", True), ("UMT5", True)]
)
def test_relative_positions(kind: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**RELATIVE[kind]))
    model = model.double().eval()

    def loss(ids: Tensor) -> Tensor:
        more = {"decoder_input_ids": ids[:, :5]} if "T5" in kind else {}
        return model(input_ids=ids, **more).last_hidden_state.sin().sum()

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    follows_the_loop(model, loss, torch.randint(2, 20, (2 * N, 7)))


class Tokens(nn.Module):
    """Rows of positions before a layer, taken as they are or cut to length."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.last, self.positions, self.cut = nn.Linear(6, 2), nn.Parameter(torch.randn(1, 5, 6)), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + (self.positions[:, : x.shape[1]] if self.cut else self.positions)).tanh().sum()


@pytest.mark.parametrize(
    ("model", "shape", "layout", "sentence"),
    [
        (Tokens(cut=True), (N, 5, 6), Rows(N, N), "of positions cannot be formed: it was used outside"),
        (Tokens(), (1, 5, 6), Packed((2, 3)), "of positions cannot be formed: it was used outside"),
        (
            nn.Conv1d(4, 6, 3),
            (N, 4, 5),
            Rows(2, 2),
            "of weight cannot be formed: a layer does not see the ex",
        ),
        (nn.Conv1d(4, 6, 3), (4, 5), Rows(4, 4), "cannot be formed: it was used outside"),
        (
            nn.Conv1d(4, 6, 3),
            (1, 4, 5),
            Packed((2, 2)),
            "cannot be formed: a layer does not see the examples",
        ),
    ],
    ids=["cut", "packed rows", "other rows", "no rows", "packed convolution"],
)
def test_a_use_that_hides_the_examples_is_refused(
    model: nn.Module, shape: tuple[int, ...], layout: Any, sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        batched(model, lambda: model(torch.randn(shape)).sum(), layout)
