"""What a base in 4 or 8 bits needs in addition to what a plain one needs."""

from __future__ import annotations

from torch import nn


def keep_unpacked(language_model: nn.Module) -> None:
    """Keep 4-bit linears able to pass gradients, in evaluation too.

    On a CPU bitsandbytes repacks their weights for good in the first pass in evaluation mode, and
    from then on their inputs silently get no gradient.
    """
    for module in language_model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
