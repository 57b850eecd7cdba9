"""Per-example gradients as a service: the sum of a loss's gradients always, and the sum of their squares.

A layer's weight gradient is ``G = Σ_i D_iᵀ A_i`` over the examples of a micro-batch, with A the layer's
input and D the gradient of its output. Computing it one example at a time costs the same arithmetic, and
every term is the example's ``h_i``, squared while it is in the cache. Nothing of the size
[examples, out, in] exists for a large layer. Where a layer is not known, the examples go back one by one.

    window.py       one accumulation window of micro-steps                             <- read first
    squares.py      Q, the sum of the squares; ranks.py: reduced over ranks
    sharded.py      the window of a model that FSDP2 shards; fsdp2.py: its groups, looked into
    layout.py       which part of a tensor belongs to which example
    layers.py       which layers form their per-example gradients, how each is run
    capture.py      the h_i of one forward and backward, and the autograd functions that form them
    products.py     the h_i of a large weight, piece by piece, and of an embedding, token by token
    fused_head.py   TRL's fused language-model head
    examples.py     where the examples of a collated micro-batch are, and how some are taken out
    one_by_one.py   the examples backpropagated alone, whatever the loss
    self_check.py   are these sums the stock gradient? undisturbed.py: asked without a trace
    weighted.py     a weight on each example's gradient, at the model's outputs
    factors.py      D_i and A_i of every linear layer, without a gradient of any parameter
    basis.py        the Kronecker eigenbasis of a layer's per-example gradients, features in it
    kernels_cpu.py kernels_gpu.py   the inner loops

Nothing here knows of an optimizer, a gate or a trainer.
"""

from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.layers import BatchedGradients
from hf_poprisk.per_example.layout import Layout, Packed, Rows
from hf_poprisk.per_example.squares import SquareSum
from hf_poprisk.per_example.window import ExampleWindow

__all__ = [
    "BatchedGradients",
    "Capture",
    "ExampleWindow",
    "Layout",
    "Packed",
    "Rows",
    "SquareSum",
]
