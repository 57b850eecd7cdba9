"""The report on a run that judged its labels: ``python -m hf_poprisk.audit OUTPUT_DIR``.

run.py      what the run left, checked                       <- read first
scores.py   how good the scores are
data.py     the training data
report.py   what is printed
figure.py   what is drawn
write.py    corrected copies of the data
cli.py      the command line
"""

from hf_poprisk.audit.cli import main
from hf_poprisk.audit.common import AuditError, shorten
from hf_poprisk.audit.data import example_text, find_rows, known_flips, load_data
from hf_poprisk.audit.figure import plot
from hf_poprisk.audit.report import report
from hf_poprisk.audit.run import Run, load_run
from hf_poprisk.audit.scores import (
    Bin,
    auroc,
    calibration,
    chance_error,
    compare_with_truth,
    expected_error,
    most_contradicted,
    reliability,
)
from hf_poprisk.audit.write import WRITES, row_weights, write_data

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
