"""A network in output space: kernel, signal channel, reservoir, and what of training reaches test examples.

    recorder = OutputSpaceCallback(ClassLogits(), probe, test, steps=20)
    Trainer(..., callbacks=[recorder]).train()
    hf-poprisk output-space OUTPUT_DIR

Source: E. Litman and G. Guo, "A Theory of Generalization in Deep Learning", arXiv:2605.01172.
"""

from hf_poprisk.output_space.dynamics import Split, split
from hf_poprisk.output_space.kernel import empirical_ntk, kernels
from hf_poprisk.output_space.recorder import OutputSpaceCallback
from hf_poprisk.output_space.recording import Recording, RecordingError, load_recording
from hf_poprisk.output_space.tasks import ClassLogits, DPOMargin, SequenceLogProb, SquaredError, Task

__all__ = ["ClassLogits", "DPOMargin", "SequenceLogProb", "SquaredError", "Task", "OutputSpaceCallback"]
__all__ += ["Recording", "RecordingError", "load_recording", "Split", "split", "empirical_ntk", "kernels"]
