"""The report on a run that judged its labels: ``python -m hf_poprisk.audit OUTPUT_DIR``.

run.py      what the run left, checked                       <- read first
scores.py   how good the scores are
data.py     the training data
report.py   what is printed
figure.py   what is drawn
write.py    corrected copies of the data
cli.py      the command line
"""

from hf_poprisk.leave_one_out.command import main
from hf_poprisk.leave_one_out.common import AuditError, shorten
from hf_poprisk.leave_one_out.copies import WRITES, row_weights, write_data
from hf_poprisk.leave_one_out.data import example_text, find_rows, known_flips, load_data
from hf_poprisk.leave_one_out.figure import plot
from hf_poprisk.leave_one_out.report import report
from hf_poprisk.leave_one_out.run import Run, load_run
from hf_poprisk.leave_one_out.scores import (
    Bin,
    auroc,
    calibration,
    chance_error,
    compare_with_truth,
    expected_error,
    most_contradicted,
    reliability,
)

__all__ = [
    "WRITES",
    "AuditError",
    "Bin",
    "Run",
    "auroc",
    "calibration",
    "chance_error",
    "compare_with_truth",
    "example_text",
    "expected_error",
    "find_rows",
    "known_flips",
    "load_data",
    "load_run",
    "main",
    "most_contradicted",
    "plot",
    "reliability",
    "report",
    "row_weights",
    "shorten",
    "write_data",
]
