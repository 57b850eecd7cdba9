"""Sample weights against the textbook: the examples' own gradients, times their weights, summed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from datasets import Dataset
from losses import KINDS as LOSSES
from losses import FirstGradient, gap
from models import (
    SILENT,
    layout,
    preferences,
    sequences,
    tiny_model,
    tiny_tokenizer,
    trainer_of,
    trl_trainer_of,
)
from models import rows as token_rows
from peft import LoraConfig
from test_trainer import Record, textbook
from torch import Tensor

from hf_poprisk import PopRiskMixin, PopRiskTrainer, PopRiskTrainingArguments

WEIGHTS = [0.5, 2.0, 0.0, 1.0, 0.25, 3.0, 0.125, 1.5]
COLUMN = {"poprisk_weight_column": "w"}
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
TOLERANCE = 2e-5


def data_of(kind: str) -> Dataset:
    if kind == "Trainer":
        return Dataset.from_list(token_rows(8))
    return sequences(8) if kind == "SFT" else preferences(8)


def make(kind: str, folder: Path, model: Any = None, **options: Any) -> Any:
    """A trainer of any kind, with weights unless told otherwise."""
    data = options.pop("data", None)
    if data is None:
        data = data_of(kind).add_column("w", WEIGHTS) if "poprisk_weight_column" in options else data_of(kind)
    options = {"max_steps": 1, "max_grad_norm": 0.0, **options}
    if kind == "Trainer":
        return trainer_of(folder, data, model, **options)
    return trl_trainer_of(kind, model, folder, data, **options)


def first_gradient(make: Callable[..., Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    grab = FirstGradient()
    trainer = make(callbacks=[grab], **options)
    trainer.train()
    return grab.gradient, trainer


def weighted(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: sum(w * h[n] for w, h in zip(WEIGHTS, gradients, strict=True)) for n in gradients[0]}


@pytest.fixture(scope="module")
def expected(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The examples' own gradients, as the stock trainer's loss gives them one at a time."""
    found: dict[str, Any] = {}

    def of(kind: str, **options: Any) -> list[dict[str, Tensor]]:
        name = f"{kind} {options}"
        if name not in found:
            folder = tmp_path_factory.mktemp("textbook")
            model = tiny_model() if kind == "Trainer" else str(llama_dir)
            torch.manual_seed(0)
            trainer = make(kind, folder, model, **layout(1), optim="adamw_torch", **options)
            found[name] = textbook(trainer, [8], per_token=kind in ("Trainer", "SFT"))[0]
        return found[name]

    return of


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Trainer": ("Trainer", {}),
    "DPO": ("DPO", {}),
    "SFT": ("SFT", {}),
    "Reward": ("Reward", {}),
    "DPO, adapters": ("DPO", {"peft_config": LORA}),
    "DPO, checkpointed": ("DPO", {"gradient_checkpointing": True}),
    "DPO, ipo": ("DPO", {"loss_type": "ipo"}),
    "DPO, hinge": ("DPO", {"loss_type": "hinge"}),
    "DPO, robust": ("DPO", {"loss_type": "robust", "label_smoothing": 0.1}),
    "DPO, use_weighting": ("DPO", {"use_weighting": True}),
    "SFT, dft": ("SFT", {"loss_type": "dft"}),
    "SFT, logits and no fused head": ("SFT", {"label_smoothing_factor": 0.1}),
    "SFT, adapters": ("SFT", {"peft_config": LORA}),
    "Reward, centred": ("Reward", {"center_rewards_coefficient": 0.1}),
}
WAYS: dict[str, dict[str, Any]] = {
    "gate": {},
    "gate, one by one": {},
    "no gate": {"poprisk_gate": "none"},
    "groups": {"poprisk_estimator": "group"},
    "adamw": {"optim": "adamw_torch"},
    "sgd": {"optim": "sgd"},
}
LAYOUTS = [
    *((case, way, 4) for case in CASES for way in ("gate", "adamw")),
    *((case, way, 2) for case in ("Trainer", "DPO", "SFT", "Reward") for way in WAYS),
    *((case, way, 1) for case in ("Trainer", "DPO", "SFT", "Reward") for way in ("gate", "adamw")),
    *((case, "adamw", 8) for case in ("Trainer", "DPO", "SFT", "Reward")),  # without accumulation
]


def build(case: str, way: str, size: int, folder: Path, llama: Path, **more: Any) -> Any:
    kind, options = CASES[case]
    torch.manual_seed(0)
    model = tiny_model() if kind == "Trainer" else str(llama)
    trainer = make(kind, folder, model, **{**layout(size), **options, **WAYS[way], **more})
    if way.endswith("one by one"):
        trainer._prepare_layers = lambda optimizer: trainer._say_one_by_one("the test that wants it")
    return trainer


@pytest.mark.parametrize(("case", "way", "size"), LAYOUTS)
def test_the_gradient_is_the_weighted_sum(
    case: str, way: str, size: int, llama_dir: Path, tmp_path: Path, expected: Any
) -> None:
    kind, options = CASES[case]
    got, trainer = first_gradient(partial(build, case, way, size, tmp_path, llama_dir), **COLUMN)
    assert (trainer._layers is not None) == (way == "gate" and size > 1)
    own = expected(kind, **options)
    assert gap(got, weighted(own)) < TOLERANCE
    assert gap(got, {name: sum(h[name] for h in own) for name in own[0]}) > 0.1  # that without weights


def test_terms_with_different_denominators(llama_dir: Path, tmp_path: Path, expected: Any) -> None:
    """DPO's preference loss is a mean over pairs, its sft one over the micro-batch's chosen tokens."""
    options: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], **layout(8)}
    got, _ = first_gradient(partial(make, "DPO", tmp_path, str(llama_dir)), **options, **COLUMN)
    tokenizer, chosen = tiny_tokenizer(), preferences(8)["chosen"]
    tokens = torch.tensor([len(tokenizer(text)["input_ids"]) + 1.0 for text in chosen])  # and the end
    share = 8 * tokens / tokens.sum()
    pairs, texts = expected("DPO"), expected("DPO", loss_type="sft")
    both = [{name: pairs[i][name] + 0.5 * share[i] * texts[i][name] for name in pairs[i]} for i in range(8)]
    assert gap(got, weighted(both)) < TOLERANCE


@pytest.mark.parametrize("way", ["gate", "gate, one by one", "groups"])
@pytest.mark.parametrize("case", ["DPO", "SFT", "Reward", "Trainer"])
def test_the_gate_sees_the_weighted_gradients(
    case: str, way: str, llama_dir: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(monkeypatch)
    build(case, way, 4, tmp_path, llama_dir, **COLUMN).train()
    own = [{n: w * x for n, x in h.items()} for w, h in zip(WEIGHTS, expected(case), strict=True)]
    ((b, sums),) = record.windows
    if way == "groups":
        own = [{n: sum(h[n] for h in own[i : i + 4]) for n in own[0]} for i in (0, 4)]
    assert b == len(own)
    for name, pair in sums.items():
        for got, wanted in zip(pair, reference.grad_and_square_sums(own, name), strict=True):
            assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max() + 1e-30, name


class Counts(torch.nn.Module):
    """Draws a random number at each call, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = torch.nn.Linear(4, 3)
        self.drawn: list[float] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.drawn.append(torch.rand(()).item())
        logits = self.last(torch.nn.functional.dropout(x, 0.3, self.training))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("way", ["gate", "no gate", "adamw"])
@pytest.mark.parametrize("case", ["Trainer", "DPO", "SFT", "Reward", "random"])
def test_weights_of_one_are_no_weights_bit_for_bit(
    case: str, way: str, llama_dir: Path, tmp_path: Path
) -> None:
    """Random numbers included, how often the model is asked, and what is logged."""
    ends: list[Any] = []
    for column in ({}, COLUMN):
        if case == "random":
            data, run = features().remove_columns("w"), partial(make, "Trainer", tmp_path, Counts())
            run = partial(run, **layout(4), **WAYS[way])
        else:
            data, run = data_of(case), partial(build, case, way, 4, tmp_path, llama_dir)
        trainer = run(data=data.add_column("w", [1.0] * 8) if column else data, max_steps=3, **column)
        trainer.train()
        timed = ("per_second", "runtime")
        logs = [
            {k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history
        ]
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        ends.append((weights, [logs, getattr(trainer.model, "drawn", None), torch.rand(()).item()]))
    (plain, *before), (ones, *after) = ends
    assert before == after
    for name, value in plain.items():
        assert torch.equal(value, ones[name]), name
    assert case != "random" or way == "gate" or len(trainer.model.drawn) == 6


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("way", ["gate", "adamw"])
@pytest.mark.parametrize("case", ["Trainer", "SFT"])
def test_autocast(case: str, way: str, bf16: bool, llama_dir: Path, tmp_path: Path, expected: Any) -> None:
    """The loss of a model's own is of its outputs before accelerate copies them to float32."""
    run = partial(build, case, way, 4, tmp_path, llama_dir, bf16=bf16)
    got, _ = first_gradient(run, **COLUMN)
    assert gap(got, weighted(expected(case))) < (0.05 if bf16 else TOLERANCE)


def test_weights_stay_with_their_rows(llama_dir: Path, tmp_path: Path) -> None:
    """Through a shuffle of the user's, rows that are dropped, and random sampling."""
    lengths = [4, 60, 7, 9, 5, 11, 13, 8, 6]
    ids = [[(7 * i + k) % 200 + 3 for k in range(n)] for i, n in enumerate(lengths)]
    labels = [[-100] * (n - 1) + [row[-1]] for n, row in zip(lengths, ids, strict=True)]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels, "w": lengths}).shuffle(3)
    options = {**layout(2, 4), "max_length": 20, "train_sampling_strategy": "random", "max_steps": 6}
    trainer, seen = make("SFT", tmp_path, str(llama_dir), data=data, **options, **COLUMN), []
    stock = trainer._weights_of

    def look(rows: Tensor) -> Tensor:
        seen.append(stock(rows).tolist())
        return stock(rows)

    step = trainer._gated_step
    batches: list[list[int]] = []

    def gated_step(model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append(inputs["attention_mask"].sum(1).tolist())
        return step(model, inputs, *rest)

    trainer._weights_of, trainer._gated_step = look, gated_step
    trainer.train()
    assert seen == batches and len(seen) == 12
    assert {w for weights in seen for w in weights} == set(lengths) - {60}


def test_an_evaluation_is_not_weighted(llama_dir: Path, tmp_path: Path) -> None:
    for kind in ("Trainer", "DPO"):
        model = tiny_model() if kind == "Trainer" else str(llama_dir)
        losses = []
        for column in ({}, COLUMN):
            data = data_of(kind)
            data = data.add_column("w", WEIGHTS) if column else data
            torch.manual_seed(0)
            trainer = make(
                kind, tmp_path, model, data=data, eval_dataset=data, learning_rate=0.0, **layout(4), **column
            )
            trainer.train()
            for found in (trainer.evaluate(), trainer.evaluate(trainer.train_dataset)):
                losses.append({k: v for k, v in found.items() if "second" not in k and "runtime" not in k})
        assert losses == [losses[0]] * 4 and "eval_loss" in losses[0]


def test_a_run_says_what_its_weights_are(
    llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("DPO", tmp_path, str(llama_dir), **layout(4), **COLUMN).train()
    said = (
        "poprisk_weight_column=w: 8 weights from 0 to 3, 1.05 on average; what a step is divided by stays as"
    )
    assert [said in record.message for record in caplog.records].count(True) == 1


# Refusals


def column(values: Any, name: str = "w") -> Dataset:
    return preferences(len(values)).add_column(name, values)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (preferences(8), "is no column of the training set: take one of prompt, chosen, rejected"),
        (column([1.0, -0.5]), "holds -0.5 in row 1, which is no weight: give finite numbers of zero or more"),
        (column([1.0, 2.0, float("nan")]), "holds nan in row 2, which is no weight"),
        (column([float("inf"), 2.0]), "holds inf in row 0, which is no weight"),
        (column([1e300, 2.0]), r"holds 1e\+300 in row 0, which is no weight"),
        (column([1.0, None]), "holds object and not one number per example: convert it, and fill what is"),
        (column(["1", "2"]), "holds .* and not one number per example: convert it"),
        (column([True, False]), "holds bool and not one number per example"),
        (column([[1.0], [2.0]]), "holds float64 and not one number per example"),
        (column([0.0, 0.0]), "is zero in every row: nothing would be trained, so give positive weights"),
        (
            column([1.0]).to_iterable_dataset(),
            "needs every weight beforehand: train on a data set that is no",
        ),
        ([{"w": 1.0}], "needs a data set with columns, and list has none: make one with datasets.Dataset"),
    ],
)
@pytest.mark.parametrize("way", ["gate", "adamw"])
def test_a_column_of_no_weights_is_refused(data: Any, sentence: str, way: str, tmp_path: Path) -> None:
    """Before the model, which is not there, is loaded."""
    with pytest.raises(ValueError, match=f"^poprisk_weight_column=w ({sentence}).*\\.$") as caught:
        make("DPO", tmp_path, str(tmp_path / "absent"), data=data, **layout(4), **WAYS[way], **COLUMN)
    assert "\n" not in str(caught.value)


def test_a_training_set_and_unique_indices_are_asked_for(tmp_path: Path, llama_dir: Path) -> None:
    options = {**SILENT, **layout(1), **COLUMN}
    trainer = PopRiskTrainer(tiny_model(), PopRiskTrainingArguments(str(tmp_path), **options))
    with pytest.raises(ValueError, match="=w was set without a training set: give train_dataset when"):
        trainer.train()
    data = column([1.0, 2.0]).add_column("example_index", [4, 4])
    with pytest.raises(ValueError, match="example_index must be unique, and 4 is there more than once"):
        make("DPO", tmp_path, str(llama_dir), data=data, **layout(4), **COLUMN)


class OwnStep(PopRiskTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + self.model.lm_head.weight.square().sum()


class NoComputeLoss:
    """A trainer whose step has a loss of its own."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


class Behind(PopRiskMixin, NoComputeLoss, transformers.Trainer):
    pass


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("way", ["gate", "adamw"])
@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        (
            OwnStep,
            r"of this loss \(the loss reaches lm_head.weight by another way .*: let the loss be a sum over",
        ),
        (Behind, "weights the loss of compute_loss, which the training_step of Behind does not call: let it"),
    ],
)
def test_a_loss_that_weights_do_not_reach_is_refused(
    trainer: Any, sentence: str, way: str, size: int, tmp_path: Path
) -> None:
    data = data_of("Trainer").add_column("w", WEIGHTS)
    kinds = trainer, PopRiskTrainingArguments
    options = {**layout(size), **WAYS[way], **COLUMN}
    with pytest.raises(ValueError, match=f"{sentence}.*, or remove poprisk_weight_column"):
        trainer_of(tmp_path, data, tiny_model(), kinds, **options).train()


def listed(data: Any) -> Dataset:
    return Dataset.from_list([{k: torch.as_tensor(v).tolist() for k, v in data[i].items()} for i in range(8)])


@pytest.mark.parametrize(
    "name", ["batch term: bert", "contrastive: bert", "penalty: bert", "adapter: adalora"]
)
def test_losses_that_are_no_sums_are_refused(name: str, tmp_path: Path) -> None:
    kind = LOSSES[name]
    data = listed(kind.data).add_column("w", WEIGHTS)
    args = PopRiskTrainingArguments(
        str(tmp_path), **{**SILENT, **layout(4), **COLUMN, **kind.options, "optim": "adamw_torch"}
    )
    with pytest.raises(ValueError, match="cannot weight the examples of this loss .*: let the loss be a sum"):
        kind.trainer(kind.model(), args=args, train_dataset=data, **kind.more).train()


class Normed(torch.nn.Module):
    """Batch norm before a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.norm(x))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def features(count: int = 8) -> Dataset:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"x": x, "labels": [i % 3 for i in range(count)], "w": WEIGHTS[:count]})


@pytest.mark.parametrize("way", ["gate", "adamw"])
def test_what_the_built_trainer_knows_is_refused(way: str, tmp_path: Path) -> None:
    def trainer(model: Any, data: Dataset | None = None, **options: Any) -> Any:
        options = {**layout(4), **WAYS[way], **COLUMN, **options}
        return make("Trainer", tmp_path, model, data=data, **options)

    with pytest.raises(
        ValueError, match="^norm normalises over the examples .* or remove poprisk_weight_col"
    ):
        trainer(Normed(), features(), optim="adamw_torch").train()
    model = tiny_model()
    run = trainer(model, poprisk_gate="none") if way == "gate" else trainer(model)
    run.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="^deepspeed is not supported by poprisk_weight_column=w: train wi"):
        run.train()
    model.compile()
    with pytest.raises(ValueError, match=r"which model.compile\(\) hides: leave it uncompiled, or remove"):
        trainer(model, poprisk_gate="none").train() if way == "gate" else trainer(model).train()
    kind = LOSSES["experts: mixtral"]
    model = kind.model()
    model.config.output_router_logits = True
    data = listed(kind.data).add_column("w", WEIGHTS)
    for size in (4, 1):
        with pytest.raises(ValueError, match="^router_aux_loss_coef adds a term .* is of no example"):
            trainer(model, data, **layout(size)).train()


class Joins:
    """A collator that puts its examples into one row."""

    def __call__(self, features: list[Any]) -> dict[str, Tensor]:
        return {
            k: torch.cat([torch.as_tensor(f[k]) for f in features])[None] for k in ("input_ids", "labels")
        }


def test_a_collator_that_joins_examples_is_refused(tmp_path: Path) -> None:
    trainer = make(
        "Trainer", tmp_path, tiny_model(), **layout(4), **COLUMN, optim="sgd", data_collator=Joins()
    )
    with pytest.raises(
        ValueError, match=r"\(the batch has 1 rows for 4 examples\): set per_device_train_batch"
    ):
        trainer.train()


# Resuming


@pytest.mark.parametrize("way", ["gate", "adamw"])
def test_a_resumed_run_notices_other_weights(way: str, llama_dir: Path, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, **layout(4)}
    run = partial(build, "Reward", way, 4, tmp_path, llama_dir, **options)
    torch.manual_seed(0)
    whole = run(max_steps=2, **COLUMN)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-1")
    again = run(max_steps=2, **COLUMN)
    again.train(checkpoint)
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    others = preferences(8).add_column("w", WEIGHTS[::-1])
    with pytest.raises(
        ValueError, match="would change the weights of the examples .poprisk_weight_column.: set"
    ):
        run(max_steps=2, data=others, **COLUMN).train(checkpoint)
    run(max_steps=2, data=others, poprisk_allow_change=True, **COLUMN).train(checkpoint)
    if way == "gate":
        with pytest.raises(ValueError, match="would change the weights of the examples"):
            run(max_steps=2).train(checkpoint)
