"""Training on labels that may be wrong, without being told how many are.

Every visit of a training example yields the log-odds of its label, z. Part of z the example has taught the
model itself; what is left is held out, ``ζ_i = z_i − C_i``, with C_i a share κ of the effect of the example's
own earlier steps (the steps of the others undo the rest; 0.5 for classes, 0.7 for pairs):

    o_i = q̄ · lr/B · ω_i (1 − p_i) · Σ_k (∂z_i/∂θ_k)² / (√v̂_k + ε)          C_i ← C_i + κ o_i

(ω_i the weight it was given, B the examples per step, q̄ the share of coordinates that the gate opens; each
term of the sum is bounded by what one step of Adam can be, and of large matrices a part stands for the
whole, see ``Influence``). Four times per epoch, from the end of the first on, a two-part model of all ζ
estimates the share ε of wrong labels. Pairs are judged from then on, and by no lower share than these first
visits gave; others once the held-out likelihood of the labels no longer rises from one epoch to the next. An
example weighs the probability w that its label is right (``weight``), or a pair is trained by 2w − 1, swapped
where that is negative (``swap``, if the first visits were predicted well). ``audit`` scores only. The gate's
derivation (arXiv:2605.01172) holds out gradients; this holds out log-odds.

    noise_fit.py   the two-part model                       <- read first
    log_odds.py    where z is found, and how an example is weighted
    table.py       the rows of ``label_noise.parquet``
    estimates.py   what labels are judged by, and when the estimates mean little
    judge.py       what happens at a visit, at a step, four times per epoch (of a stream: per pass)
    mixin.py       its place in the trainers
"""

from hf_poprisk.leave_one_out.judge import LABEL_NOISE_MODES, LabelNoise
from hf_poprisk.leave_one_out.noise import NoiseFit, fit_noise
from hf_poprisk.leave_one_out.table import INDEX, TABLE_NAME, ExampleTable

__all__ = [
    "INDEX",
    "LABEL_NOISE_MODES",
    "TABLE_NAME",
    "ExampleTable",
    "LabelNoise",
    "NoiseFit",
    "fit_noise",
]
