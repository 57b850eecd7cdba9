"""Preference pairs with swapped labels: DPO as ``recipes/dpo.py`` does it.

``data`` is one of ``DATA``, by a YAML file of ``recipes``, or the path of such a file of your own, which
says all that a cell and its arm do not: model, adapter, data, batch, schedule. Its test split is the test
set. Where it names no validation split, 10 % of the training pairs, drawn by the seed, become one, with
their labels as they are.
"""

from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
import transformers
from datasets import Dataset
from experiment import Cell, Experiment, Report
from labels_arms import ARMS, PAIR_ARMS
from labels_run import HELD_OUT, Setup, hold_out, run_cell, trainer_class, training_arguments


@dataclass(frozen=True)
class Pairs:
    recipe: str = "tiny/dpo.yaml"
    easier: bool = False  # with the chosen completion out of order in place of the rejected one
    options: dict[str, Any] = field(default_factory=dict)  # in place of the recipe's
    count: int | None = None  # training pairs


LORA = "tiny/dpo-lora.yaml"
REAL = "smollm2-135m/dpo-lora.yaml"  # needs python scripts/prepare_real.py
SENTIMENT = {"dataset_name": "outputs/real/sentiment", "num_train_epochs": 1}
DATA = {
    "dpo": Pairs(),
    "dpo-lora": Pairs(LORA),
    "dpo-words": Pairs(easier=True),
    "dpo-words-lora": Pairs(LORA, easier=True),
    "sentiment": Pairs(REAL, options=SENTIMENT, count=600),
    "writing": Pairs(REAL, options={"num_train_epochs": 1}, count=600),
    # for weight-later, which judges after the first of two epochs
    "sentiment-2": Pairs(REAL, options=SENTIMENT | {"num_train_epochs": 2}, count=600),
    "writing-2": Pairs(REAL, options={"num_train_epochs": 2}, count=600),
}

TITLES = {
    "dpo": "DPO, text against samples of a model",
    "dpo-words": "DPO, text against the same words out of order",
    "dpo-words-lora": "the same with LoRA",
}

EPOCHS = 4
EXCHANGED = 6  # words of a completion that change places


def out_of_order(text: str, rng: np.random.Generator) -> str:
    """``text`` with some words in each other's places."""
    words = np.array(text.split(" "), dtype=object)
    start = int(words[0] == "")  # the space before a completion stays
    places = rng.permutation(np.arange(start, len(words)))[:EXCHANGED]
    words[places] = words[np.roll(places, 1)]
    return " ".join(words)


def easier(data: Dataset, seed: int) -> Dataset:
    """Pairs that are easily told apart: the rejected completion is the chosen one, out of order.

    Completions of which nothing else can be made, such as one word twice, are left out.
    """
    rng = np.random.default_rng([seed, 4])
    rng.permutation(len(data))  # an earlier version drew something here: the pairs stay those of the results
    data = data.map(
        lambda row: {"rejected": out_of_order(row["chosen"], rng)},
        load_from_cache_file=False,  # of the state of rng
    )
    return data.filter(lambda row: row["rejected"] != row["chosen"])


def conservative(noise: float) -> dict[str, float]:
    """-(1-ε) log σ(z) - ε log σ(-z) out of TRL's losses: its ``sigmoid`` takes no label_smoothing."""
    return {"sigmoid": 2 * (1 - noise), "robust": -(1 - 2 * noise)}


def arguments(cell: Cell, folder: str) -> tuple[Any, ...]:
    """The settings of one run: those of its cell and its arm take the place of the recipe's."""
    import dpo  # here, because TRL is slow to import

    known = cell["data"] in DATA
    path = common.ROOT / DATA[cell["data"]].recipe if known else cell["data"]
    losses = cell.get("losses", lambda noise: {"sigmoid": 1.0})(cell["noise"])
    options = training_arguments(cell, folder) | {
        "optim": "poprisk_adamw",
        "flip_fraction": cell["noise"],
        "flip_seed": cell["seed"],
        "label_smoothing": cell["noise"] if "robust" in losses else 0,
        "push_to_hub": False,
        **({"num_train_epochs": cell["epochs"], **DATA[cell["data"]].options} if known else {}),
        **({} if cell["epochs"] else {"num_train_epochs": 0}),  # whatever the data say
    }
    argv = [str(item) for name, value in options.items() for item in (f"--{name}", value)]
    argv += ["--loss_type", *losses, "--loss_weights", *map(str, losses.values())]
    script_args, args, model_args = common.parse(dpo.ARGUMENTS, ["--config", str(path), *argv])
    if args.max_steps > 0:
        raise common.RecipeError(f"max_steps of {path} has no place here: give num_train_epochs instead.")
    common.require_path(model_args.model_name_or_path, "model_name_or_path")
    common.require_path(script_args.dataset_name, "dataset_name")
    return script_args, args, model_args


def prepare(cell: Cell, folder: str) -> Setup:
    """The trainer of a cell."""
    import dpo

    from hf_poprisk import PopRiskDPOTrainer

    class Trainer(PopRiskDPOTrainer):
        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            # dpo.score runs the reference model itself, on what is held out
            return super()._precompute_ref_logps(dataset, name, batch_size) if name == "train" else dataset

    noise, seed = cell["noise"], cell["seed"]
    script_args, args, model_args = arguments(cell, folder)
    train, held_out = dpo.load(script_args)
    if "validation" not in held_out:
        parts = train.train_test_split(HELD_OUT, seed=seed)
        train, held_out["validation"] = parts["train"], parts["test"]
    data = DATA.get(cell["data"], Pairs())
    train = train.select(range(data.count or len(train)))
    if data.easier:
        train = easier(train, seed)
        held_out = {name: easier(part, seed) for name, part in held_out.items()}
    train = common.flip_preferences(train, noise, seed)
    mislabeled = np.array(train["is_flipped"])
    kept, held = hold_out(len(train), cell)
    sets = {name: held_out[name] for name in ("validation", "test")}
    for name, rows in (("mislabeled", kept[mislabeled[kept]][: dpo.MAX_FLIPPED_EVAL]), ("held", held)):
        sets |= {name: train.select(rows)} if len(rows) else {}
    transformers.set_seed(seed)
    trainer_kind = trainer_class(Trainer, cell, mislabeled[kept])
    trainer = dpo.make_trainer(trainer_kind, args, model_args, train.select(kept), sets)
    reference = dpo.reference_of(trainer, model_args)
    every_epoch = list(sets) if cell.get("early") else ["test"]

    def score(name: str) -> dict[str, float]:
        return dpo.score(trainer, reference, name)

    return Setup(trainer, score, mislabeled[kept], list(sets), every_epoch)


EXPERIMENT = Experiment(
    title="Mislabeled examples: preference pairs, DPO",
    verdict="supported only at equal learning rate, and a mask does the same",
    run=lambda cell: run_cell(cell, prepare, epochs=EPOCHS),
    settings={"epochs": EPOCHS},
    arms={
        **ARMS,
        **PAIR_ARMS,
        "robust": {"poprisk_gate": "none", "losses": lambda noise: {"robust": 1.0}},
        "conservative": {"poprisk_gate": "none", "losses": conservative},
        "ipo": {"poprisk_gate": "none", "losses": lambda noise: {"ipo": 1.0}},
    },
    facets={"data": list(DATA), "noise": [0.0, 0.1, 0.2, 0.3, 0.4]},
    grid={"learning_rate": [3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]},
    reports=[Report("validation_accuracy", "test_accuracy", "higher")],
)
