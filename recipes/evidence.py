"""Does training on population risk keep its promises? Runs the experiments and writes the results page.

    python recipes/evidence.py run recipes/claims/grokking-add.yaml --processes 2
    python recipes/evidence.py page

``run`` appends one line of JSON per training run to ``recipes/results/NAME.jsonl``, skips the runs that are
there, and prints the tables; an experiment of your own, a YAML file elsewhere, has its script and its results
beside it. ``page`` draws ``recipes/results/NAME.png`` and writes the generated parts of
``recipes/RESULTS.md`` and README.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import common
import experiment
from experiment import Experiment, work
from pages import write_pages
from report import missing, table
from sweep import ends_in_a_sentence, run_cells


def run(args: argparse.Namespace) -> int:
    """Train what was asked for and print the tables; the exit code.

    Raises:
        RecipeError: a bad experiment, or arms or seeds that are not its own.
    """
    asked = Experiment.load(args.experiment)
    arms, seeds = args.arms or list(asked.arms), args.seeds or asked.seeds
    for name, wrong in (
        ("--arms", set(arms) - set(asked.arms)),
        ("--seeds", set(seeds) - set(asked.seeds)),
    ):
        if wrong:
            raise common.RecipeError(f"{name} {' '.join(map(str, wrong))}: not in {args.experiment}.")
    cells = [cell for cell in asked.cells() if cell["arm"] in arms and cell["seed"] in seeds]
    code = run_cells(cells, partial(work, asked.script_path.resolve()), asked.results, args.processes)
    rows = asked.rows()
    if rows:
        print("", missing(asked, rows), sep="\n")
        print(*(table(asked, rows, report) for report in asked.reports), sep="\n\n")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{experiment.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train, and append to the results")
    training.add_argument("experiment", type=Path, help="a YAML file of recipes/claims")
    training.add_argument("--seeds", nargs="+", type=int, help="default: those of the experiment")
    training.add_argument("--arms", nargs="+", help="default: all")
    training.add_argument("--processes", type=int, default=1, choices=(1, 2))
    commands.add_parser("page", help="write the results page")
    args = parser.parse_args()
    with ends_in_a_sentence(parser):
        if args.command == "page":
            write_pages()
        else:
            sys.exit(run(args))


if __name__ == "__main__":
    main()
