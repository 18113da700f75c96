"""Cross-entropy over answer tokens only, normalised by how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.model.fast.cross_entropy import IGNORE_INDEX, summed_cross_entropy


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
    total = summed_cross_entropy(logits.flatten(0, 1), targets.flatten())
    if num_answer_tokens is None:
        num_answer_tokens = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_answer_tokens


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
