"""Cross-entropy whose backward pass needs one tensor of the logits' size.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.model.fast.switch import records_gradients


def plain_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """`Σ -log softmax(logits)[target]` in float32, over targets other than -100."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE_INDEX, reduction="sum")


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The same, keeping its gradient in place of log-probabilities."""
    if records_gradients(logits_NV):
        return cast(Tensor, _SummedCrossEntropy.apply(logits_NV, targets_N))
    return plain_cross_entropy(logits_NV, targets_N)


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps its gradient, in the dtype of the logits, in place of log-probabilities.

    With a large vocabulary nothing else in a step is as large: two float32 copies of the logits
    fewer at the peak.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        log_probs_NV = logits_NV.log_softmax(-1, dtype=torch.float32)
        total = F.nll_loss(log_probs_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
        is_scored_N = targets_N != IGNORE_INDEX
        target_N1 = targets_N.where(is_scored_N, 0).unsqueeze(1)
        grad_NV = log_probs_NV.exp_()
        grad_NV.scatter_add_(1, target_N1, grad_NV.new_full((), -1.0).expand_as(target_N1))
        ctx.save_for_backward(grad_NV.to(logits_NV.dtype), is_scored_N)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad_NV, is_scored_N = ctx.saved_tensors
        factor_N1 = (grad * is_scored_N).unsqueeze(1)
        return torch.mul(grad_NV, factor_N1, out=torch.empty_like(grad_NV)), None
