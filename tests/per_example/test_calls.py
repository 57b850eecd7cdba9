"""Convolutions, norms over channels, class tokens, rows of positions and layer scales in one backward."""

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import transformers
from torch import Tensor, nn

from hf_poprisk.per_example import BatchedGradients, Packed, Rows, products
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example.window import ExampleWindow

N = 3
CONVOLUTIONS = {
    "patches": lambda: (nn.Conv2d(4, 6, 2, stride=2), (8, 6)),
    "audio": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (11,)),
    "depthwise": lambda: (nn.Conv1d(4, 8, 4, padding=3, groups=4), (9,)),
    "same, of even size": lambda: (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1)), (7, 6)),
    "groups, dilated": lambda: (nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=2, groups=2), (7, 9)),
    "circular": lambda: (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (7,)),
    "video": lambda: (nn.Conv3d(4, 6, (1, 2, 3), padding="valid"), (3, 5, 4)),
}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def together(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, layout: Any) -> dict[str, Any]:
    params = trainable(model)
    layers = BatchedGradients(model, params.values())
    assert not layers.uncovered
    window = ExampleWindow(params.values(), {p: name for name, p in params.items()})
    with window.batch(layers, layout):
        loss(x).backward()
    sq_sums = window.reduce()[1]
    return {name: (p.grad, sq_sums[p]) for name, p in params.items() if p.grad is not None}


def assert_follows_the_loop(
    model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, n: int = N
) -> None:
    """G, Q and the gate's decisions; row j of ``x`` is of example j mod n."""
    gradients = reference.per_example_gradients(trainable(model), loss, [x[i::n] for i in range(n)])
    got, seen = together(model, loss, x, Rows(n, len(x))), 0
    largest = max(p.abs().max() for h in gradients for p in h.values())
    for name in trainable(model):
        g, q = reference.grad_and_square_sums(gradients, name)
        if g.abs().max() < 1e-10 * largest:  # zero but for rounding: key biases
            continue
        torch.testing.assert_close(got[name], (g, q), rtol=1e-9, atol=1e-12 * largest.item())
        assert torch.equal(got[name][0].square() > got[name][1], g.square() > q), name
        seen += q.count_nonzero().item()
    assert seen > 20


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
    assert_follows_the_loop(model, lambda x: model(x).sin().sum(), x)
    model.zero_grad()
    layer.weight.requires_grad_(False)
    assert_follows_the_loop(model, lambda x: model(x).sin().sum(), x)


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
    assert_follows_the_loop(model, lambda x: model(x).last_hidden_state.sin().sum(), x)


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
    assert_follows_the_loop(model, loss, torch.randint(2, 20, (2 * N, 7)))


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
        together(model, lambda x: model(x).sum(), torch.randn(shape), layout)
