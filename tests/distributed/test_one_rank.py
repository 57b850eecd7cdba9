"""What one rank alone refuses ends the run on all of them, with the same sentence; nobody waits for it."""

import re
from typing import Any

import pytest
import torch
from one_rank import main
from per_example.test_factors import random_factors, run_of
from test_sharded import launch

from hf_poprisk.per_example.basis import complete_bases, measure_bases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw; a rank that waits for the other ends all of them."""
    folder = tmp_path_factory.mktemp("one_rank")
    launch(main, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("collator", "the data collator made 1 examples of 4: .*per_device_train_batch_size=1"),
        ("inputs", "inputs.'more'. has 5 entries for 4 examples, .*: set per_device_train_batch_size=1"),
        ("loss", "not be the stock trainer's .*the loss would be .*: set per_device_train_batch_size=1"),
        ("model", "not be the stock trainer's .*the loss would be .*: set per_device_train_batch_size=1"),
        ("no gradient, wrong", "not be the stock trainer's .* would be 50% off"),
        ("sharded, collator", "the data collator made 1 examples of 2: .*per_device_train_batch_size=1"),
        (
            "sharded, loss",
            "not be the stock trainer's .*the loss would be .*: set per_device_train_batch_size=1",
        ),
    ],
)
def test_a_refusal_of_one_rank_is_that_of_all(name: str, sentence: str, found: Any) -> None:
    one, other = (rank[name] for rank in found)
    assert re.search(sentence, str(one)) and one == other


@pytest.mark.parametrize(
    ("name", "together"), [("rows", False), ("no gradient", True), ("no gradient, one by one", False)]
)
def test_the_path_is_that_of_all_ranks(name: str, together: bool, found: Any) -> None:
    assert [rank[name] for rank in found] == [together, together]


def test_layers_that_one_rank_alone_reaches_have_a_basis(found: Any) -> None:
    """Experts to which the tokens of one rank are routed."""
    one, other = (rank["bases"] for rank in found)
    whole = run_of(random_factors())
    complete = complete_bases(whole)
    for name, basis in measure_bases(whole).items():
        for seen in (one, other):
            leading = seen["leading"][name]
            torch.testing.assert_close(leading.second_moment, basis.second_moment, rtol=1e-3, atol=1e-4)
            sides = ((leading.left, leading.right), seen["complete"][name])
            for pair, expected in zip(sides, ((basis.left, basis.right), complete[name]), strict=True):
                for u, v in zip(pair, expected, strict=True):
                    assert (u * v).sum(0).abs().min() > 0.999
    assert {one[f"refused, {name}"] for name in ("complete", "leading")} == {"rank 1 does not see the rows."}
