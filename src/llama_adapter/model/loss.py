"""Cross-entropy over answer tokens only, normalised by how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100
"""Label of a position that is not scored."""


def answer_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_answer_tokens: Tensor | int | None = None,
    kept: int | Tensor = 0,
) -> Tensor:
    """Cross-entropy over answer tokens, divided by their number (of the whole global step).

    logits [B, T, V] predict the next position's label; `kept` are the positions [T'] or the
    places [B, T] that the logits stand for, if not all. A batch without answer tokens has loss 0,
    with a gradient.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if is_places(kept):
        targets = targets[kept.to(targets.device)].unsqueeze(0)
    elif isinstance(kept, Tensor):
        targets = targets[:, kept.to(targets.device)]
    elif kept:
        targets = targets[:, -kept:]
    targets = targets.to(logits.device)
    total = _summed_cross_entropy(logits.flatten(0, 1), targets.flatten())
    if num_answer_tokens is None:
        num_answer_tokens = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_answer_tokens


def _summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    if logits_NV.requires_grad and not torch.compiler.is_compiling():
        return cast(Tensor, _SummedCrossEntropy.apply(logits_NV, targets_N))
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE_INDEX, reduction="sum")


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


def scored_positions(labels: Tensor) -> Tensor:
    """Positions [T'] whose logits some row's loss needs: pass them as `logits_to_keep`."""
    return (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().flatten()


def scored_places(labels: Tensor) -> Tensor:
    """Places [B, T], true where a logit is needed for the loss: pass them as `logits_to_keep`."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def is_places(kept: int | Tensor) -> TypeGuard[Tensor]:
    """Whether logits are wanted at places [B, T] rather than at positions of every row."""
    return isinstance(kept, Tensor) and kept.dtype == torch.bool and kept.ndim == 2


@contextmanager
def logits_at(head: nn.Module, kept: int | Tensor) -> Iterator[None]:
    """Inside, the head reads hidden states [B, T, d] at these places alone, as [1, N, d].

    What a model does to its logits behind the head acts on each by itself, so it stays right.
    """
    if not is_places(kept):
        yield
        return
    hook = head.register_forward_pre_hook(
        lambda _head, inputs: (inputs[0][kept.to(inputs[0].device)].unsqueeze(0), *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()
