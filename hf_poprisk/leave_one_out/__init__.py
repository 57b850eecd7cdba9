"""How likely each label is correct, by what the rest of the data says, and training with those weights.

regression.py leave-one-out log-odds from a regression on features of the examples    <- read first
features.py   those features: gradients of the labels' log-odds, in the layers' eigenbases
judgement.py  which features and which λ, chosen by held-out likelihood
noise.py      the noise rate and its interval; from log-odds to probabilities
leap.py       one step of the weights to where that regression is
weights.py    what is kept of it, the weights, and when an estimate means little
table.py      ``judged.parquet``: a row per example, and what a resumed run needs
index.py      which example is which, in a batch and from run to run
mixin.py      its place in the trainers
judge_command.py  ``hf-poprisk judge``: labels judged without training; judge_inputs.py, publish.py, and
              chunks.py, by which a killed one goes on
audit.py      ``hf-poprisk audit``: the report and copies of the data; data.py, report.py, page.py
"""

from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.noise import NoiseFit, fit_noise
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable
from hf_poprisk.leave_one_out.weights import LabelNoise

__all__ = ["INDEX", "TABLE_NAME", "ExampleTable", "LabelNoise", "NoiseFit", "fit_noise"]
