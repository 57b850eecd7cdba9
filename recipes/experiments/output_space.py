"""What the theory says of five kinds of training, looked at in output space.

    python recipes/experiments/output_space.py                  # all of them, some minutes on one core
    python recipes/experiments/output_space.py benign dpo       # some
    python recipes/experiments/output_space.py page             # print hf_poprisk/output_space/README.md

Every run goes through a stock ``Trainer`` (``dpo``: ours) with an ``OutputSpaceCallback`` and leaves its
recording in ``outputs/output_space/NAME``, to be looked at with ``python -m hf_poprisk.output_space``. The
numbers go to ``recipes/experiments/results/output_space.json``, three plots beside it. ``dpo`` needs
``outputs/tiny``, which ``python scripts/prepare_tiny.py`` makes.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes

import common
import transformers
from matplotlib.figure import Figure
from output_space_linear import benign, descent
from output_space_networks import bias, grokking
from output_space_pairs import dpo

RESULTS = Path(__file__).parent / "results" / "output_space.json"
TEMPLATE = Path(__file__).with_name("output_space_template.md")


def page(results: dict[str, Any]) -> str:
    """OUTPUT_SPACE.md: the template, filled with the numbers of the results file."""
    kinds = {
        "descent": (
            {
                "width": ("width", "d"),
                "train_loss": ("training loss", ".2g"),
                "test_loss": ("test loss", ".3g"),
                "channel": ("channel of W", "d"),
                "noise_in_reservoir": ("noise in the reservoir", ".0%"),
                "noise_seen_from_reservoir": ("seen of it from there", ".0%"),
                "noise_seen_at_test": ("noise seen at test", ".2f"),
            },
            results["descent"]["widths"],
        ),
        "grokking": (
            {
                "steps": ("step", "d"),
                "train_accuracy": ("training accuracy", ".2f"),
                "test_accuracy": ("test accuracy", ".2f"),
                "kernel_test_accuracy": ("kernel regression", ".2f"),
                "kernel_channel": ("channel of the kernel", "d"),
                "signal_in_kernel_channel": ("signal in it", ".0%"),
                "signal_in_reservoir": ("signal in the reservoir of W", ".0%"),
            },
            _columns(results["grokking"]),
        ),
        "dpo": (
            {
                "arm": ("", "s"),
                "test_accuracy": ("held-out accuracy", ".3f"),
                "clean_fitted": ("clean fitted", ".0%"),
                "flipped_fitted": ("flipped fitted", ".0%"),
                "clean_margin": ("clean margin", ".3f"),
                "flipped_margin": ("flipped margin", ".3f"),
                "clean_share_in_leading": ("clean, leading tenth", ".0%"),
                "flipped_share_in_leading": ("flipped, leading tenth", ".0%"),
                "channel": ("channel of W", "d"),
                "flips_in_reservoir": ("flips in the reservoir", ".0%"),
                "flips_seen_from_reservoir": ("seen of them from there", ".0%"),
                "transfer_error": ("error of the prediction", ".0%"),
            },
            [
                {"arm": title, **results["dpo"][arm]}
                for arm, title in (("adamw", "AdamW"), ("gated", "hard gate"))
            ],
        ),
    }
    rows_of = _columns(results["grokking"])
    moments = {
        "fitted": next(row for row in rows_of if row["train_accuracy"] == 1),
        "inside": next(row for row in rows_of if row["signal_in_kernel_channel"] > 0.9),
        "empty": next(row for row in rows_of if row["signal_in_reservoir"] < 0.01),
        "last": rows_of[-1],
    }
    tables = {f"{kind}_table": _table(*content) for kind, content in kinds.items()}
    return TEMPLATE.read_text(encoding="utf-8").format(**results, **tables, **moments)


def _columns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists of one length, as rows."""
    lists = {name: values for name, values in row.items() if isinstance(values, list)}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _table(columns: dict[str, tuple[str, str]], entries: list[dict[str, Any]]) -> str:
    """Markdown; name → title and format."""
    head = [title for title, _ in columns.values()]
    body = [[format(entry[name], form) for name, (_, form) in columns.items()] for entry in entries]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


KINDS: tuple[Callable[[], tuple[dict[str, Any], Figure | None]], ...] = (benign, descent, bias, grokking, dpo)


def main(argv: Sequence[str]) -> None:
    known = {kind.__name__: kind for kind in KINDS}
    wrong = [name for name in argv if name not in (*known, "page")]
    if wrong or "page" in argv and len(argv) > 1:
        raise common.RecipeError(
            f"unknown: {' '.join(wrong or argv)}; give some of {', '.join(known)}, or page, or nothing."
        )
    if argv == ["page"]:
        print(page(json.loads(RESULTS.read_text())), end="")
        return
    chosen = list(argv) or list(known)
    if "dpo" in chosen:
        common.require_path("outputs/tiny/model", "the model")
    transformers.utils.logging.set_verbosity_error()
    for name in chosen:
        print(f"{name}: {known[name].__doc__}", flush=True)
        row, figure = known[name]()
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        common.write_json(RESULTS, {**results, name: _rounded(row)})
        if figure is not None:
            figure.savefig(RESULTS.with_name(f"output_space_{name}.png"), dpi=80)
        print(json.dumps(_rounded(row), indent=2))


def _rounded(value: Any) -> Any:
    """Six digits, so that the file does not depend on the last bits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


if __name__ == "__main__":
    common.run(lambda: main(sys.argv[1:]))
