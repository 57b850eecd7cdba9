"""How likely each label is correct, by what the rest of the data says, and training with those weights.

log_odds.py   where the log-odds of a label are found in a loss, and how an example is weighted
judge.py      the rule during training: leave-one-out log-odds    <- read first
noise.py      the noise rate and its interval; from log-odds to probabilities
weights.py    which estimate counts, when weights are given, when the estimate means little
table.py      ``judged.parquet``: a row per example, and what a resumed run needs
index.py      which example is which, in a batch and from run to run
mixin.py      its place in the trainers
audit.py      ``hf-poprisk audit``: run.py, data.py, report.py, figure.py, copies.py
"""

from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.judge import LABEL_NOISE_MODES, LabelNoise
from hf_poprisk.leave_one_out.noise import NoiseFit, fit_noise
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable

__all__ = [
    "INDEX",
    "LABEL_NOISE_MODES",
    "TABLE_NAME",
    "ExampleTable",
    "LabelNoise",
    "NoiseFit",
    "fit_noise",
]
