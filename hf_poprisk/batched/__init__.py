"""Where Q comes from when several examples share a backward: per-example weight gradients, layer by layer.

A layer's weight gradient is ``G = Σ_i D_iᵀ A_i`` over the examples of the micro-batch, with A the layer's
input and D the gradient of its output. Computing it one example at a time costs the same arithmetic, and
every term is the example's ``h_i``, to be squared into Q while it is in the cache. Nothing of the size
[examples, out, in] exists for a large layer.

While a ``capture`` lasts, the layers that own a gated parameter run through autograd functions of this
package. Small parameters (norms, biases, adapter factors) keep their ``h_i`` until the backward is through
with them, because they may be used more than once; so does an embedding that is tied to the head.

    layers.py      which layers can be told apart, how each is run    <- read first
    layout.py      which part of a tensor belongs to which example
    functions.py   the autograd functions they run through
    capture.py     what becomes of the examples' gradients
"""

from hf_poprisk.batched.capture import Capture, Uncovered
from hf_poprisk.batched.layers import BatchedGradients
from hf_poprisk.batched.layout import Layout, Packed, Rows

__all__ = ["BatchedGradients", "Capture", "Layout", "Packed", "Rows", "Uncovered"]
