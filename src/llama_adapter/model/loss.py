"""Cross-entropy over answer tokens only, normalised by how many there are."""

from __future__ import annotations

from torch import Tensor
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

    logits [B, T, V] predict the next position's label; `kept` are the positions [T'] that the
    logits stand for, if not all. A batch without answer tokens has loss 0, with a gradient.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if isinstance(kept, Tensor):
        targets = targets[:, kept.to(targets.device)]
    elif kept:
        targets = targets[:, -kept:]
    targets = targets.to(logits.device)
    total = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    if num_answer_tokens is None:
        num_answer_tokens = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_answer_tokens


def scored_positions(labels: Tensor) -> Tensor:
    """Positions [T'] whose logits some row's loss needs: pass them as `logits_to_keep`."""
    return (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().flatten()
