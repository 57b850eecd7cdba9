"""The source's experiment at its own size: 30 % of UltraFeedback's labels swapped, three ways to train.

    python recipes/qwen2.5-0.5b/arms.py [--key value ...]

AdamW, the gate, and AdamW with judged labels, one after the other on one GPU by ``recipes/dpo.py`` and
``dpo.yaml`` here, to which the options are added; then a table and a plot of the three. Run again, it reuses
what is finished and takes up what was interrupted: change an option, and change ``--output_dir`` with it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARMS = {
    "adamw": ["--optim", "adamw_torch"],
    "gate": ["--optim", "poprisk_adamw", "--poprisk_gate", "hard"],
    "weights": ["--optim", "poprisk_adamw", "--poprisk_gate", "none", "--poprisk_label_noise", "weight"],
}


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/qwen2.5-0.5b-arms"))
    args, options = parser.parse_known_args()
    env = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}  # several would be nn.DataParallel
    folders = [args.output_dir / arm for arm in ARMS]
    for folder, arm in zip(folders, ARMS.values(), strict=True):
        if (folder / "results.json").is_file():
            continue
        command = [ROOT / "recipes/dpo.py", "--config", Path(__file__).with_name("dpo.yaml"), *arm]
        command += ["--output_dir", folder, *options]
        if any(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "last"]
        run(command, env)
    run([ROOT / "scripts/compare.py", *folders, "--plot", args.output_dir / "comparison.png"], env)


def run(command: list[str | Path], env: dict[str, str]) -> None:
    if code := subprocess.run([sys.executable, *map(str, command)], env=env).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
