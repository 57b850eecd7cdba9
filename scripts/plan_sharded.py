"""Memory and traffic of each GPU under FSDP2, with the gate and without, before anything is started.

    python scripts/plan_sharded.py --parameters 7.62e9 --gpus 8 --backwards 1 8
    python scripts/plan_sharded.py --model Qwen/Qwen2.5-7B-Instruct --gpus 64 --replicas 8
    python scripts/plan_sharded.py --model FOLDER       # with a config.json; no weights, no network
    python scripts/plan_sharded.py --parameters 7.62e9 --trainable 4e7 --gpus 8     # an adapter

On paper, from the sizes of what is kept and sent; nothing is measured. Weights and moments are float32 and
computed with in bfloat16, as accelerate does with ``bf16: true``. Activations, which FSDP2 leaves whole, come
on top, and so do the parts of the group that is being computed, gathered in bfloat16. Traffic is what a GPU
sends within its shard group: two gatherings of 2 bytes in every backward, and each reduction. Replicas add,
once a step, what they send to each other. How much of it hides behind computation has not been measured.
"""

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

GATHERED = 2  # bytes of a gathered weight: bfloat16
SQUARE = 4  # bytes of an element of Q: float32


@dataclass(frozen=True)
class Plan:
    """A model on a cluster; all results are bytes of one GPU.

    Args:
        parameters: P.
        trainable: those with a gradient.
        largest_group: trainable parameters of the largest group that FSDP2 reduces at once.
        shards: GPUs that share a copy of the model.
        replicas: copies of the model.
        gradient_bytes: of a reduced gradient; the gate wants 4.
    """

    parameters: float
    trainable: float
    largest_group: float
    shards: int
    replicas: int = 1
    gradient_bytes: int = 4

    def traffic(self, backwards: int, held: bool, gated: bool) -> float:
        """Sent in a step of so many backwards, reduced at the last one (held) or each time."""
        others = (self.shards - 1) / self.shards
        reduced = (1 if held else backwards) * (self.gradient_bytes + SQUARE * gated)
        sent = others * (2 * GATHERED * backwards * self.parameters + reduced * self.trainable)
        between = 2 * (self.replicas - 1) / self.replicas * self.trainable / self.shards
        return sent + between * (self.gradient_bytes + SQUARE * gated)

    def memory(self, held: bool, gated: bool) -> float:
        """Weights, moments, gradients, Q, and what lives as long as a group's reduction."""
        kept = 4 * self.parameters + (8 + 4 + SQUARE * gated) * self.trainable
        whole = (4 + SQUARE * gated) * self.trainable if held else 0.0
        reduction = (self.gradient_bytes + 2 * SQUARE * gated) * self.largest_group
        return kept / self.shards + whole + reduction


def count(model: str) -> tuple[int, int]:
    """The parameters of a model, and of the largest of its groups; its configuration is read, no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    ends = {loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight}
    blocks = [m for m in loaded.modules() if type(m).__name__ in (loaded._no_split_modules or ())]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return sum(p.numel() for p in loaded.parameters()), max(*sizes, *(p.numel() for p in ends))


def table(plan: Plan, backwards: list[int]) -> Table:
    shown = Table("backwards per step", "gradients are", "", "GB sent per step", "GB kept", box=None)
    for m in backwards:
        for held in (False, True)[: 1 + (m > 1)]:
            for gated in (False, True):
                way = "held, reduced once" if held else "reduced each time"
                sent, kept = plan.traffic(m, held, gated) / 1e9, plan.memory(held and m > 1, gated) / 1e9
                shown.add_row(str(m), way, "gate" if gated else "AdamW", f"{sent:.0f}", f"{kept:.1f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--parameters", type=float, help="of the model, such as 7.62e9")
    size.add_argument("--model", help="a causal language model, a folder or a name on the Hub, to count them")
    parser.add_argument("--trainable", type=float, help="those that are trained; default: all")
    parser.add_argument("--largest_group", type=float, help="default: counted, or a tenth of the trainable")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model (HSDP)")
    parser.add_argument("--backwards", type=int, nargs="+", default=[1, 8], help="of each GPU in a step")
    wanted = "of a reduced gradient; the gate wants 4"
    parser.add_argument("--gradient_bytes", type=int, choices=(2, 4), default=4, help=wanted)
    args = parser.parse_args()
    if args.replicas < 1 or args.gpus < 1 or args.gpus % args.replicas:
        parser.error(f"--replicas {args.replicas} does not divide --gpus {args.gpus}.")
    if min(args.backwards) < 1:
        parser.error("--backwards must be at least 1.")
    try:
        parameters, largest = (args.parameters, None) if args.model is None else count(args.model)
    except (OSError, ValueError):  # no such folder, no network, or no causal language model
        parser.error(
            f"the configuration of --model {args.model} is in no folder and not to be had from the Hub: give "
            "a folder with its config.json, or the sizes as --parameters and --largest_group."
        )
    trainable = parameters if args.trainable is None else args.trainable
    if not 0 < trainable <= parameters:
        parser.error(f"--trainable must be above 0 and at most the {parameters:g} parameters.")
    largest = args.largest_group or (largest if trainable == parameters else None) or trainable / 10
    shards = args.gpus // args.replicas
    plan = Plan(parameters, trainable, largest, shards, args.replicas, args.gradient_bytes)
    trained = f"{parameters / 1e9:.2f} billion parameters, {trainable / 1e9:.2f} trained"
    Console().print(f"{trained}, on {args.gpus} GPUs ({args.replicas} × {shards}); per GPU:")
    Console().print(table(plan, args.backwards))


if __name__ == "__main__":
    main()
