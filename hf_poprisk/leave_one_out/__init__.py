"""How likely each label is correct, by what the rest of the data says, and training with those weights.

regression.py leave-one-out log-odds from a regression on features of the examples    <- read first
features.py   those features: gradients of the labels' log-odds, in the layers' eigenbases
judgement.py  of pairs: which features and which λ, chosen by held-out likelihood
ridge.py, classes.py  the same for classes
noise.py      the noise rate and its interval; from log-odds to probabilities
judge.py      what is kept of it, and the weights; weights.py: when an estimate means little
log_odds.py   where the log-odds of a label are found in a loss, and how an example is weighted
table.py      ``judged.parquet``: a row per example, and what a resumed run needs
index.py      which example is which, in a batch and from run to run
mixin.py      its place in the trainers
judge_command.py  ``hf-poprisk judge``: labels judged without training; judge_data.py, judge_model.py
audit.py      ``hf-poprisk audit``: run.py, data.py, report.py, figure.py, copies.py
"""

from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.judge import LABEL_NOISE_MODES, ClassNoise, LabelNoise, PairNoise
from hf_poprisk.leave_one_out.noise import NoiseFit, fit_noise
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable

__all__ = [
    "INDEX",
    "LABEL_NOISE_MODES",
    "TABLE_NAME",
    "ClassNoise",
    "ExampleTable",
    "LabelNoise",
    "PairNoise",
    "NoiseFit",
    "fit_noise",
]
