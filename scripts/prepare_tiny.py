"""Make the embedded model and its data from text that ships with Python; nothing is downloaded.

Docstrings of the standard library train a tokenizer and a small Llama-like model. The language reference
(``pydoc_data.topics``), which the model has not seen, gives passages; a preference pair is the beginning of
a passage with its true continuation (chosen) and a sample of the model (rejected). Docstrings that share
eight consecutive words with the reference are left out.

    OUTPUT_DIR/model         tokenizer and model, for from_pretrained
    OUTPUT_DIR/preferences   {train,validation,test}.parquet: prompt, chosen, rejected, topic; clean labels
    OUTPUT_DIR/detection     the same texts as text, label (1: real, 0: sampled)
    OUTPUT_DIR/text          the passages as text
    OUTPUT_DIR/metadata.json what made it; a second run with the same settings reuses the folder

Splits are by topic, and a paragraph that several topics repeat belongs to the smallest of them, so no text
is in two splits.
"""

import ast
import hashlib
import json
import logging
import math
import os
import platform
import random
import shutil
import sys
import sysconfig
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics as reference
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging as transformers_logging

logger = logging.getLogger("prepare_tiny")

PROMPT_WORDS, COMPLETION_WORDS = 14, 12
BATCH, CONTEXT = 32, 64  # sequences and tokens per pretraining step
SPLITS = ("train", "validation", "test")
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '' }}{% endif %}"
)


def paragraphs(text: str) -> Iterator[str]:
    """Prose paragraphs with their white space folded; code, tables and headings left out."""
    for block in text.replace("\r", "").split("\n\n"):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if not lines or lines[-1][:3] in ("***", "===", "---", "^^^", '"""', "~~~"):
            continue
        if any(mark in block for mark in (">>>", "::=", "+--", "==>", "    |")):
            continue
        words = " ".join(lines).split()
        letters = sum(ch.isalpha() for word in words for ch in word)
        if len(words) >= 5 and letters > 3.2 * len(words):
            yield " ".join(words)


def phrases(text: str) -> set[tuple[str, ...]]:
    """Every run of eight consecutive words."""
    words = text.split()
    return set(zip(*(words[i:] for i in range(8)), strict=False))


def docstrings(unseen: dict[str, list[str]]) -> list[str]:
    """Paragraphs of the standard library's docstrings in file order; none that has a phrase of ``unseen``."""
    root, seen = Path(sysconfig.get_path("stdlib")), {}
    reserved = {phrase for texts in unseen.values() for text in texts for phrase in phrases(text)}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files kept for older grammars
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                seen.update(dict.fromkeys(paragraphs(ast.get_docstring(node) or "")))
    return [paragraph for paragraph in seen if reserved.isdisjoint(phrases(paragraph))]


def topics() -> dict[str, list[str]]:
    """Topic → its paragraphs; one that several topics repeat goes to the smallest of them."""
    owner: dict[str, str] = {}
    kept: dict[str, list[str]] = {}
    cleaned = {name: list(paragraphs(text)) for name, text in sorted(reference.items())}
    for name in sorted(cleaned, key=lambda n: (sum(map(len, cleaned[n])), n)):
        for paragraph in cleaned[name]:
            owner.setdefault(paragraph, name)
    for paragraph, name in owner.items():
        kept.setdefault(name, []).append(paragraph)
    return kept


def passages(paragraphs_: list[str]) -> list[tuple[str, str]]:
    """(prompt, continuation) from consecutive windows of a topic; the continuation starts with its space."""
    words, size = " ".join(paragraphs_).split(), PROMPT_WORDS + COMPLETION_WORDS
    windows = [words[start : start + size] for start in range(0, len(words) - size + 1, size)]
    return [(" ".join(w[:PROMPT_WORDS]), " " + " ".join(w[PROMPT_WORDS:])) for w in windows]


def split_topics(found: dict[str, list[str]], wanted: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Split → topics: test and validation take shuffled topics until they have enough, train the rest."""
    names = sorted(found)
    random.Random(seed).shuffle(names)
    assigned: dict[str, list[str]] = {split: [] for split in SPLITS}
    # more passages than pairs: for some no sample of the model is usable
    missing = {split: 1.1 * wanted[split] for split in ("test", "validation")}
    for name in names:
        split = next((s for s in missing if missing[s] > 0), "train")
        assigned[split].append(name)
        if split in missing:
            missing[split] -= len(passages(found[name]))
    return assigned


def new_model(texts: list[str], vocab_size: int) -> tuple[Any, Any]:
    """A tokenizer that fits the texts, and 1.1 M parameters in float32."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<|pad|>", "<|end|>"], pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.model_max_length = 256
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 256}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**sizes, **ids, bos_token_id=None, tie_word_embeddings=True)
    return tokenizer, LlamaForCausalLM(config)


def token_stream(texts: list[str], tokenizer: Any) -> Any:
    """All texts, each ended by the end token, as one row of ids, [tokens] int64."""
    ids = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
    return torch.tensor([token for row in ids for token in row])


def pretrain(model: Any, stream: Any, steps: int, seed: int) -> None:
    """AdamW with warm-up and a cosine, on random windows of the stream."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in tqdm(range(steps), desc="Pretraining", unit="step", disable=None):  # only on a terminal
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        ids = stream[starts + torch.arange(CONTEXT)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def sample(model: Any, tokenizer: Any, prompts: list[str]) -> list[str | None]:
    """For each prompt a continuation at temperature 1, cut to its words; None where it cannot be used."""
    sampled: list[str | None] = []
    # a fixed length: the end token would come before the last word too often
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"min_new_tokens": 40, "max_new_tokens": 40}
    for start in range(0, len(prompts), 64):
        batch = tokenizer(prompts[start : start + 64], return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, **options)[:, batch["input_ids"].shape[1] :]
        for text in tokenizer.batch_decode(out, skip_special_tokens=True):
            words = text.split()[:COMPLETION_WORDS]
            continuation = " " + " ".join(words)
            # not one that goes on in the middle of the prompt's last word, stops early or breaks a character
            usable = text[:1] == " " and len(words) == COMPLETION_WORDS and "\ufffd" not in continuation
            sampled.append(continuation if usable else None)
    return sampled


def reject(model: Any, tokenizer: Any, pool: list[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
    """Give rows a rejected completion, the first usable sample: as many as wanted, if there are as many."""
    queue = list(pool)
    for _ in range(20):  # rounds; passages without a usable sample come again, at the end
        batch, queue = queue[:wanted], queue[wanted:]
        if not batch:
            break
        texts = sample(model, tokenizer, [row["prompt"] for row in batch])
        for row, text in zip(batch, texts, strict=True):
            row["rejected"] = text if text != row["chosen"] else None
        queue += [row for row in batch if row["rejected"] is None]
        wanted -= sum(row["rejected"] is not None for row in batch)
    return [row for row in pool if row["rejected"]]


def write_data(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    sides = (("chosen", 1), ("rejected", 0))
    detection = [{"text": row["prompt"] + row[s], "label": label} for row in rows for s, label in sides]
    text = [{"text": row["prompt"] + row["chosen"]} for row in rows]
    for name, content in {"preferences": rows, "detection": detection, "text": text}.items():
        (folder / name).mkdir(exist_ok=True)
        Dataset.from_list(content).to_parquet(folder / name / f"{split}.parquet")


def build(folder: Path, args: Namespace, docs: list[str], found: dict[str, list[str]]) -> dict[str, Any]:
    """Everything but metadata.json; returns what it should say of the outcome."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # the stream is longer than the context, on purpose
    disable_progress_bars()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second one
    set_seed(args.seed)
    sizes = (args.num_train_pairs, args.num_eval_pairs, 2 * args.num_eval_pairs)
    wanted = dict(zip(SPLITS, sizes, strict=True))
    tokenizer, model = new_model(docs, args.vocab_size)
    logger.info("pretraining %s parameters: %d steps, a few minutes", model.num_parameters(), args.steps)
    pretrain(model, token_stream(docs, tokenizer), args.steps, args.seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    assigned = split_topics(found, wanted, args.seed)
    counts: dict[str, int] = {}
    for split, names in assigned.items():
        pairs = [(name, *pair) for name in names for pair in passages(found[name])]
        pool = [{"prompt": p, "chosen": c, "rejected": None, "topic": name} for name, p, c in pairs]
        random.Random(args.seed).shuffle(pool)
        rows = reject(model, tokenizer, pool, wanted[split])
        counts[split] = len(rows)
        if len(rows) < 2:
            sys.exit(f"prepare_tiny.py: error: only {len(rows)} pairs for the {split} split.")
        if len(rows) < wanted[split]:
            logger.warning("%s: %d pairs of the %d wanted", split, len(rows), wanted[split])
        write_data(folder, split, rows)
    assigned_topics = {split: len(names) for split, names in assigned.items()}
    return {"parameters": model.num_parameters(), "topics": assigned_topics, "pairs": counts}


def file_sizes(folder: Path) -> dict[str, int]:
    """Path inside the folder → bytes, for every file but metadata.json."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "metadata.json"]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def is_current(target: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder was made by this script, on this text, with these settings, and is whole."""
    try:
        metadata = dict(json.loads((target / "metadata.json").read_text()))
    except (ValueError, TypeError):
        logger.warning("%s/metadata.json is damaged; making the folder again", target)
        return False
    return metadata | made_from | {"files": file_sizes(target)} == metadata


def parse(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tiny"))
    options = {  # default, least, help
        "steps": (400, 1, "pretraining steps of 32 × 64 tokens"),
        "vocab_size": (2048, 300, "of the tokenizer, at least 300"),
        "num_train_pairs": (512, 2, ""),
        "num_eval_pairs": (200, 2, "validation pairs; twice as many test"),
        "seed": (0, 0, ""),
    }
    for name, (default, _, text) in options.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, _) in options.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}; got {getattr(args, name)}.")
    if args.output_dir.exists() and not (args.output_dir / "metadata.json").is_file():
        parser.error(f"--output_dir {args.output_dir} exists and was not made here: choose another folder.")
    return args


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    args = parse(argv)
    found = topics()
    docs = docstrings(found)
    made_from = {
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "text_sha256": hashlib.sha256(json.dumps([docs, found], sort_keys=True).encode()).hexdigest(),
        "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets")},
    }
    target: Path = args.output_dir
    if target.exists() and is_current(target, made_from):
        logger.info("%s is up to date", target)
        return
    temporary, old = (target.with_name(f".{target.name}-{age}-{os.getpid()}") for age in ("new", "old"))
    temporary.mkdir(parents=True)
    try:
        outcome = build(temporary, args, docs, found)
        metadata = made_from | outcome
        metadata |= {"files": file_sizes(temporary), "python": platform.python_version()}
        (temporary / "metadata.json").write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
        if target.exists():
            target.replace(old)  # which goes only when the new one is there
        temporary.replace(target)
        shutil.rmtree(old, ignore_errors=True)
        logger.info("%s: %s", target, ", ".join(f"{n} {s} pairs" for s, n in outcome["pairs"].items()))
    except KeyboardInterrupt:
        logger.error("interrupted: nothing was changed.")
        sys.exit(130)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
