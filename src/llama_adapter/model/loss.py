"""Cross-entropy over answer tokens only, normalized by how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.model.fast.cross_entropy import summed_cross_entropy


def answer_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_answer_tokens: Tensor | int | None = None,
    kept: int | Tensor = 0,
) -> Tensor:
    """Cross-entropy over answer tokens, divided by their number (of the whole global step).

    logits [B, T, V] predict the next position's label; `kept` says which they are, as
    `logits_to_keep` of the model's forward. A batch without answer tokens has loss 0, with a
    gradient.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    index = kept.to(targets.device) if isinstance(kept, Tensor) else slice(-kept, None)
    targets = targets[index].unsqueeze(0) if _is_mask(kept) else targets[:, index]
    targets = targets.to(logits.device)
    total = summed_cross_entropy(logits.flatten(0, 1), targets.flatten())
    if num_answer_tokens is None:
        num_answer_tokens = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_answer_tokens


def answer_mask(labels: Tensor) -> Tensor:
    """[B, T], true where the loss needs a logit: pass it as `logits_to_keep`."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def _is_mask(kept: int | Tensor) -> TypeGuard[Tensor]:
    return isinstance(kept, Tensor) and kept.dtype == torch.bool and kept.ndim == 2


@contextmanager
def masked_head(head: nn.Module, kept: int | Tensor) -> Iterator[int | Tensor]:
    """What a base takes as `logits_to_keep`; inside, a mask [B, T] has effect at the head.

    The head reads the N hidden states where the mask is true, as [1, N, d]. What a model does to
    its logits behind the head acts on each by itself, so it stays right.
    """
    if not _is_mask(kept):
        yield kept
        return
    hook = head.register_forward_pre_hook(
        lambda _head, inputs: (inputs[0][kept.to(inputs[0].device)].unsqueeze(0), *inputs[1:])
    )
    try:
        yield 0
    finally:
        hook.remove()
