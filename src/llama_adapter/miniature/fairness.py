"""Texts scored fairly: what training cannot show is not scored as false.

No training scene holds a green circle, so a plain cross-entropy learns that what is green is
no circle: with every green square it pushes "circle" down, and nothing ever pushes it up. Where
a green thing's shape is scored, the word "circle" is therefore left out of the softmax, and
"green" where a circle's colour is, as a logit adjustment by the words' frequency in training
would do (Menon et al. 2020, arXiv 2007.07314: the logarithm of 0). It is so in captions, in
instructions and in the decoder's pretraining; the tower is pretrained in the same way
(`phrases`). The held-out combinations are still never shown and never said.

It also takes the gain out of a rule that fails on just the test scenes: where a circle and
something green occur together, "the circle is not green, so the other thing is".

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from llama_adapter.miniature.scenes import COLORS, HELD_OUT, SHAPES, Scene
from llama_adapter.model import (
    LlamaAdapterForConditionalGeneration,
    answer_loss,
    answer_mask,
)

UNSCORED = "unscored"
"""Name of the batch's tensor [B, T]: the token left out where a label is predicted, -1: none."""

_SHAPE_OUT = {color: shape for shape, color in HELD_OUT}
_COLOR_OUT = dict(HELD_OUT)


def unscored_tokens(
    labels_BT: Tensor, scenes: Sequence[Scene | None], tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """For each label that names a thing's shape or colour the word that is held out with it.

    Within a scene a shape or a colour names one thing. Rows about no scene leave nothing out.
    """
    token_of = _tokens(tokenizer)
    unscored_BT = torch.full_like(labels_BT, -1)
    for labels_T, unscored_T, scene in zip(labels_BT, unscored_BT, scenes, strict=True):
        for thing in scene.things if scene is not None else ():
            pairs = {thing.shape: _SHAPE_OUT.get(thing.color), thing.color: _COLOR_OUT[thing.shape]}
            for said, left_out in pairs.items():
                if left_out is not None:
                    unscored_T[labels_T == token_of[said]] = token_of[left_out]
    return unscored_BT


def without_unscored(logits_BTV: Tensor, unscored_BT: Tensor) -> Tensor:
    """The logits with those that are not to be scored at minus infinity."""
    rows, places = (unscored_BT >= 0).nonzero(as_tuple=True)
    logits_BTV = logits_BTV.clone()
    logits_BTV[rows, places, unscored_BT[rows, places]] = -torch.inf
    return logits_BTV


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    words = [*SHAPES, *COLORS]
    rows = tokenizer(words, add_special_tokens=False)["input_ids"]
    return {word: int(ids[0]) for word, ids in zip(words, rows, strict=True)}


class FairlyScored(nn.Module):
    """The model with a loss that leaves `unscored` tokens out of the softmax."""

    def __init__(self, model: LlamaAdapterForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """What the model returns; a batch without `unscored` is passed through."""
        unscored_BT = inputs.pop(UNSCORED, None)
        if unscored_BT is None:
            return self.model(**inputs)
        labels_BT, num_tokens = inputs.pop("labels"), inputs.pop("num_answer_tokens", None)
        mask_BT = answer_mask(labels_BT)
        output = self.model(**{**inputs, "logits_to_keep": mask_BT})
        next_BT = F.pad(unscored_BT[:, 1:], (0, 1), value=-1)
        logits_1NV = without_unscored(output.logits, next_BT[mask_BT].unsqueeze(0))
        output.loss = answer_loss(logits_1NV, labels_BT, num_answer_tokens=num_tokens, kept=mask_BT)
        return output
