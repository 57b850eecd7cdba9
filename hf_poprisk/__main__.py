"""The command line: ``hf-poprisk COMMAND …``, or ``python -m hf_poprisk COMMAND …``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_poprisk import __version__, train_command
from hf_poprisk.leave_one_out import audit, judge_command
from hf_poprisk.output_space import report as output_space
from hf_poprisk.user_errors import UserError, one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Carry out a command line; what a user can put right is one sentence and exit code 2."""
    parser = argparse.ArgumentParser("hf-poprisk", description="Training on population risk.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train_command.add_commands(commands)
    judge_command.add_command(commands)
    audit.add_command(commands)
    output_space.add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.execute(args)
    except UserError as error:
        parser.exit(2, f"hf-poprisk {args.command}: error: {error}\n")
    except OSError as error:
        if args.execute is train_command.train:  # during training
            raise
        parser.exit(2, f"hf-poprisk {args.command}: error: {one_line(error)}.\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: nothing was left half-written.\n")


if __name__ == "__main__":
    main()
