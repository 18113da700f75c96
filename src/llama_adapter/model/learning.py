"""When a backward pass of our own pays."""

from __future__ import annotations

import torch
from torch import Tensor


def learns(tensor: Tensor) -> bool:
    """Whether gradients of this tensor are being recorded, and not by a compiler.

    A compiler fuses what autograd derives, so it needs no backward pass of our own.
    """
    return tensor.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
