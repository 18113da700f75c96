"""Texts scored without the words that are held out: what training cannot show is not denied.

No training scene holds a green circle, so a plain cross-entropy learns that what is green is not
a circle: with every green square it pushes "circle" down, and nothing ever pushes it up. Where
a green object's shape is scored, the word "circle" is therefore left out of the softmax, and
"green" where a circle's color is, as a logit adjustment by the words' frequency in training
would do (Menon et al. 2020, arXiv 2007.07314: the logarithm of 0). The decoder is pretrained
this way, and the vision encoder likewise (`phrases`); adapters are not. The held-out combinations
are never shown and never said.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_adapter.miniature.scenes import COLORS, HELD_OUT, SHAPES, Scene

_SHAPE_OUT = {color: shape for shape, color in HELD_OUT}
_COLOR_OUT = dict(HELD_OUT)


def unscored_tokens(
    labels_BT: Tensor, scenes: Sequence[Scene | None], tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """For each label that names a thing's shape or color the word that is held out with it.

    Within a scene a shape or a color names one thing. Rows about no scene leave nothing out.
    """
    token_of = _tokens(tokenizer)
    unscored_BT = torch.full_like(labels_BT, -1)
    for labels_T, unscored_T, scene in zip(labels_BT, unscored_BT, scenes, strict=True):
        for one in scene.objects if scene is not None else ():
            pairs = {one.shape: _SHAPE_OUT.get(one.color), one.color: _COLOR_OUT[one.shape]}
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
