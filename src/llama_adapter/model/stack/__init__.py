"""Many adapters on one base, in one batch (ours): each row of a pass names its adapter and images.

Biases, scales and norms are rows of stacked tensors, gathered by adapter; prompts are entries of a
bank, an adapter's static prompts or one image's. Adapter 0 is the base and entry 0 reads nothing.
"""

from llama_adapter.model.stack.reads import RowReads
from llama_adapter.model.stack.stack import AdapterStack, StackedAdapter

__all__ = ["AdapterStack", "RowReads", "StackedAdapter"]
