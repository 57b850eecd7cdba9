"""Which example is which."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_poprisk.leave_one_out import INDEX
from hf_poprisk.leave_one_out.index import IndexCollator, first_difference, take_sample, with_index
from leave_one_out.helpers import Classifier, classify, examples


def test_an_index_of_the_users_is_kept() -> None:
    data = Dataset.from_dict({"a": list(range(8)), INDEX: list(range(100, 108))}).shuffle(0).select(range(5))
    same_data, ids = with_index(data)
    assert same_data is data and ids.tolist() == data[INDEX]
    added, ids = with_index(Dataset.from_dict({"a": [1, 2, 3]}))
    assert added[INDEX] == ids.tolist() == [0, 1, 2]
    listed, ids = with_index([{"a": 1}, {"a": 2}])
    assert listed[1] == {"a": 2, INDEX: 1} and len(listed) == 2
    with pytest.raises(ValueError, match="must hold integers"):
        with_index(Dataset.from_dict({INDEX: ["a", "b"]}))


def test_a_stream_is_refused() -> None:
    stream = Dataset.from_dict({INDEX: [1]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="and a stream has none: train on a data set that is no stream"):
        with_index(stream)
    with pytest.raises(ValueError, match="finds no example_index in the training examples"):
        IndexCollator(list)([{"a": 1}])


def test_a_sample_knows_rows_in_another_order() -> None:
    data = Dataset.from_dict({INDEX: list(range(5, 5005)), "labels": [i % 2 for i in range(5000)]})
    shuffled = data.shuffle(seed=0)
    one, other = (take_sample(d, np.array(d[INDEX])) for d in (data, shuffled))
    assert one.keys() == other.keys() and len(one) == 64 and first_difference(one, other) is None
    spoiled = shuffled.map(lambda row: {"labels": 1 - row["labels"]})
    assert first_difference(one, take_sample(spoiled, np.array(spoiled[INDEX])))[1] == "labels"


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_evaluation_sees_no_index(remove_unused_columns: bool, tmp_path: Path) -> None:
    data = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    options = {"poprisk_label_noise": "audit", "num_train_epochs": 1}
    data = data.add_column(INDEX, list(range(60))).shuffle(1)
    trainer = classify(tmp_path, data, remove_unused_columns=remove_unused_columns, **options)
    trainer.train()
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert trainer._label_noise.table.visits.sum() == 60


def test_an_index_of_the_models_own_is_left_to_it_without_label_noise(tmp_path: Path) -> None:
    class Indexed(Classifier):
        def forward(self, x: Tensor, labels: Tensor, example_index: Tensor) -> dict[str, Tensor]:
            assert example_index.shape == labels.shape
            return super().forward(x, labels)

    data = [{**e, INDEX: torch.tensor(i)} for i, e in enumerate(examples())]
    trainer = classify(tmp_path, data, Indexed(), max_steps=2, optim="poprisk_adamw", poprisk_gate="hard")
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_index_hidden_by_a_format_is_read() -> None:
    data = Dataset.from_dict({"a": [1, 2], INDEX: [4, 9]}).with_format("torch", columns=["a"])
    assert with_index(data)[1].tolist() == [4, 9]
