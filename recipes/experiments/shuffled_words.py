"""Preference pairs that are easily told apart: the rejected completion is the chosen one, out of order.

Mislabeled ones may be drawn at random, be pairs that are nearly a tie (two neighbouring words changed
places, of half of the pairs), or the coherent preference of a minority: those of whole topics.
"""

import numpy as np
from datasets import Dataset

EXCHANGED = 6  # words of a completion that change places


def out_of_order(text: str, rng: np.random.Generator, tie: bool) -> str:
    """``text`` with some words in each other's places; of a tie with two neighbours."""
    words = text.split(" ")
    start = int(words[0] == "")  # the space before a completion stays
    if tie:
        first = rng.integers(start, len(words) - 1)
        places = np.array([first, first + 1])
    else:
        places = rng.permutation(np.arange(start, len(words)))[:EXCHANGED]
    moved = np.array(words, dtype=object)
    moved[places] = moved[np.roll(places, 1)]
    return " ".join(moved)


def easier(data: Dataset, ties: float, seed: int) -> Dataset:
    """The pairs of ``data`` with a rejected completion of that kind.

    Returns:
        With a bool column ``tie``, true for a share ``ties`` of the rows. Completions of which nothing else
        can be made, such as one word twice, are left out.
    """
    rng = np.random.default_rng([seed, 4])
    tie = rng.permutation(len(data)) < round(ties * len(data))
    data = data.map(
        lambda row, index: {
            "rejected": out_of_order(row["chosen"], rng, bool(tie[index])),
            "tie": bool(tie[index]),
        },
        with_indices=True,
        load_from_cache_file=False,  # of the state of rng
    )
    return data.filter(lambda row: row["rejected"] != row["chosen"])


def mislabeled_of(data: Dataset, kind: str, noise: float, seed: int) -> np.ndarray:
    """Which pairs are mislabeled, [n] bool, ``round(noise · n)`` of them; kind: ``ties`` or ``group``."""
    order, count = np.random.default_rng(seed).permutation(len(data)), round(noise * len(data))
    if kind == "ties":
        order = order[np.argsort(~np.array(data["tie"])[order], kind="stable")]
    else:  # whole topics, the largest first
        names, topic, sizes = np.unique(data["topic"], return_inverse=True, return_counts=True)
        order = order[np.lexsort((topic[order], -sizes[topic[order]]))]
    mislabeled = np.zeros(len(data), dtype=bool)
    mislabeled[order[:count]] = True
    return mislabeled
