"""What judging preference pairs costs: beside a plain epoch, with fewer features, and of many pairs.

    python scripts/benchmark_judge.py --data dpo --rounds 5
    python scripts/benchmark_judge.py --data dpo --features 1024 4096 32768 131072
    python scripts/benchmark_judge.py --examples 500 1000 2000 5000 --features 256 1024 4096 8192

The first is of a recipe (``recipes/experiments/labels_pairs.py`` has the names): process CPU time of judging
and of an epoch of training with plain AdamW, in turns; then where the last judging spent its time. The second
adds up buckets of the features of that recipe until there are so many, and is a mean over four draws of the
flipped pairs. The third is of made-up features, a planted direction in noise with a decaying spectrum and 30
% of the labels flipped, each size in a process of its own, whose peak memory holds the features too. All on
one thread.
"""

import argparse
import itertools
import logging
import pstats
import statistics
import sys
import tempfile
import time
from cProfile import Profile
from pathlib import Path

import numpy as np
import torch
from benchmark_step import alone, peak_resident
from sklearn.metrics import roc_auc_score

from hf_poprisk.leave_one_out.judgement import judge_pairs

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "experiments")]


def beside_an_epoch(data: str, rounds: int) -> None:
    import labels_pairs

    cell = {"data": data, "noise": 0.3, "learning_rate": 1e-4, "seed": 0, "epochs": 1, "arm": "adamw"}
    logging.getLogger("hf_poprisk").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        plain, judge = (
            labels_pairs.prepare(cell | {"poprisk_gate": "none", "poprisk_label_noise": mode}, folder).trainer
            for mode in ("off", "audit")
        )
        plain.log = lambda *args, **kwargs: None
        taken: dict[str, list[float]] = {"epoch": [], "judging": []}
        for i in range(rounds + 1):  # the first warms up
            for name, run in (("epoch", plain.train), ("judging", judge.judge_labels)):
                start = time.process_time()
                run()
                taken[name] += [time.process_time() - start] * (i > 0)
        with Profile() as profile:
            judge.judge_labels()
    taken["judging / epoch"] = [j / e for j, e in zip(taken["judging"], taken["epoch"], strict=True)]
    print(f"{data}, {len(judge.train_dataset)} pairs, {rounds} rounds")
    print("| | median | least | most |\n|---|---|---|---|")
    for name, times in taken.items():
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} |")
    pstats.Stats(profile).sort_stats("cumulative").print_stats(40)


def with_fewer(data: str, counts: list[int]) -> None:
    import labels_judged

    parts = labels_judged.features({"data": data, "seed": 0, "features": "gradients", "arm": "gradients"})
    n = len(parts[0])
    print(f"| {data}, features of a part | AUROC, 30 % flipped | 40 % | seconds |\n|---|---|---|---|")
    for k in counts:
        few = [x if x.shape[1] <= k else x.reshape(n, -1, k).sum(1) for x in parts]  # powers of two
        start, areas = time.process_time(), []
        for noise in (0.3, 0.4):
            for draw in range(4):
                flipped = np.random.default_rng([0, 6, draw]).permutation(n) < round(noise * n)
                sign = np.where(flipped, -1, 1).astype(np.float32)[:, None]
                areas.append(roc_auc_score(flipped, -judge_pairs([x * sign for x in few]).log_odds))
        seconds = (time.process_time() - start) / len(areas)
        print(f"| {k:,} | {np.mean(areas[:4]):.3f} | {np.mean(areas[4:]):.3f} | {seconds:.1f} |", flush=True)


def made_up(n: int, k: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Two parts, [n, k] float32, and which labels are flipped."""
    rng = np.random.default_rng(0)
    flipped = rng.permutation(n) < round(0.3 * n)
    sign = np.where(flipped, -1, 1).astype(np.float32)[:, None]
    scale = (np.arange(1, k + 1) ** -0.5).astype(np.float32)
    parts = []
    for _ in range(2):
        x = rng.standard_normal((n, k), np.float32)
        x *= scale
        x += 0.35 * scale * rng.choice([-1, 1], k).astype(np.float32) / np.sqrt(np.log(k))
        parts.append(x * sign)
    return parts, flipped


def regressions(n: int, k: int) -> tuple[float, float, float, float]:
    """Seconds, peak gigabytes, AUROC and the estimated rate of one size."""
    torch.set_num_threads(1)
    before = peak_resident()
    parts, flipped = made_up(n, k)
    start = time.process_time()
    found = judge_pairs(parts)
    seconds, memory = time.process_time() - start, (peak_resident() - before) / 2**20
    return seconds, memory, float(roc_auc_score(flipped, -found.log_odds)), found.fit.rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", nargs="*", type=int, default=[])
    parser.add_argument("--features", nargs="+", type=int, default=[], help="of each of two parts")
    args = parser.parse_args()
    for data in args.data:
        if args.features:
            with_fewer(data, args.features)
        else:
            beside_an_epoch(data, args.rounds)
    if args.examples:
        print("| pairs | features | seconds | peak GB | AUROC | estimated rate |\n|---|---|---|---|---|---|")
    for n, k in itertools.product(args.examples, args.features):
        seconds, memory, auroc, rate = alone(regressions, n, k)
        print(f"| {n:,} | {k:,} | {seconds:.1f} | {memory:.2f} | {auroc:.3f} | {rate:.3f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
