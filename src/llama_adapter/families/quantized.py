"""What bases need so that everything learned in them computes: in 4 bits, and of state spaces."""

from __future__ import annotations

from torch import nn


def keep_unfused(language_model: nn.Module) -> None:
    """Let state-space mixers call their linears in training too, where what is learned is.

    In training mode they would hand the bare weights of a linear to one fused kernel. They have
    no dropout: nothing else depends on their mode.
    """
    for module in language_model.modules():
        if hasattr(module, "A_log") and hasattr(module, "conv1d"):
            module.training = False


def keep_unpacked(language_model: nn.Module) -> None:
    """Keep 4-bit linears able to pass gradients, in evaluation too.

    On a CPU bitsandbytes repacks their weights for good in the first pass in evaluation mode, and
    from then on their inputs silently get no gradient.
    """
    for module in language_model.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
