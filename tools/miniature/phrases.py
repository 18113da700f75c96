"""Phrases about scenes, and how they score the patches of an image.

A phrase ("small red star") names up to four attributes. Its embedding is the sum of its
words' embeddings, so a patch must hold each attribute in a direction of its own; that
is what carries over to combinations of shape and color that no training image shows.
Phrases with such a combination are never scored in training, not even as false ones:
the encoder would learn to deny them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llama_adapter.miniature.rendering import PALETTE, RADIUS, center_of, render, unnamed_palette
from llama_adapter.miniature.scenes import (
    COLORS,
    HELD_OUT,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    sample_scene,
)

if TYPE_CHECKING:
    from PIL import Image
    from transformers import SiglipVisionModel

# Shapes: B images, P patches, T things of a scene, W words, N phrases, D width.

IMAGE_SIZE = 64
PATCH_SIZE = 8
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE

ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "place": PLACES}
WORDS = tuple(word for words in ATTRIBUTES.values() for word in words)

_WORD_IS = {
    name: torch.tensor([word in words for word in WORDS]) for name, words in ATTRIBUTES.items()
}
_HELD_OUT_WW = torch.tensor(
    [[float((v, w) in HELD_OUT or (w, v) in HELD_OUT) for v in WORDS] for w in WORDS]
)

STRANGE_SHARE = 0.5
"""Share of the images of a fair batch that are in colors without a name."""

Phrase = dict[str, str]
"""Attribute to word: {"shape": "star", "color": "red"}. True of a thing that has them all."""

_NO_OBJECT, _UNCLEAR = -1, -2


class PhraseScorer(nn.Module):
    """Scores phrases against patches; thrown away after pretraining."""

    def __init__(self, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.words_WD = nn.Parameter(
            torch.randn(len(WORDS), width, generator=generator) / math.sqrt(width)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(8.0)))
        # An all-of-n phrase needs its own threshold for each n.
        self.bias_by_length = nn.Parameter(torch.tensor([-3.0, -4.0, -5.0, -6.0]))

    def forward(self, patches_BPD: Tensor, phrases_NW: Tensor) -> Tensor:
        """The logit of each phrase at each patch, (B, N, P)."""
        words_WD = nn.functional.normalize(self.words_WD, dim=-1) * self.log_scale.exp()
        scores_BPW = nn.functional.normalize(patches_BPD, dim=-1) @ words_WD.T
        lengths_N = phrases_NW.sum(-1).long()
        scores_BNP = phrases_NW @ scores_BPW.transpose(1, 2)
        return scores_BNP + self.bias_by_length[lengths_N - 1][:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images, what stands on each patch, and phrases about them."""

    pixels_BCHW: Tensor
    objects_BTW: Tensor
    """Which words are true of each thing; rows of absent things are zero."""
    owner_BP: Tensor
    """Which thing covers a patch, _NO_OBJECT, or _UNCLEAR for the edges of things."""
    phrases_NW: Tensor
    strange_B: Tensor
    """Images in colors without a name: phrases with a color are not scored there."""
    fair: bool
    """Do not score a phrase as false where a held-out combination would make it true."""


def sample_batch(rng: random.Random, *, size: int, fair: bool) -> Batch:
    """Draw training scenes, their images, and true and nearly true phrases.

    No training image shows a green circle, so what is green can safely be denied to be
    a circle: the encoder would learn that, and then not see one. A fair batch takes the
    gain out of it. It does not score "circle" as false of green things (nor "green" of
    circles, and so on for all held-out combinations), and it draws some images in
    colors without a name, in which only the outline tells the shape.
    """
    scenes = [sample_scene(rng, split=Split.TRAIN) for _ in range(size)]
    phrases = [phrase for scene in scenes for phrase in _sample_phrases(scene, rng)]
    phrases += [{name: word} for name, words in ATTRIBUTES.items() for word in words]
    objects_BTW = torch.zeros(size, MAX_OBJECTS, len(WORDS))
    for row, scene in enumerate(scenes):
        for column, one in enumerate(scene.objects):
            objects_BTW[row, column] = multi_hot(_all_words(one))
    strange_B = torch.zeros(size, dtype=torch.bool)
    images = []
    for row, scene in enumerate(scenes):
        palette = PALETTE
        if fair and rng.random() < STRANGE_SHARE:
            strange_B[row] = True
            objects_BTW[row, :, _WORD_IS["color"]] = 0
            palette = unnamed_palette(scene, rng)
        images.append(render(scene, rng, size=IMAGE_SIZE, palette=palette))
    return Batch(
        pixels_BCHW=to_pixels(images),
        objects_BTW=objects_BTW,
        owner_BP=torch.stack([_patch_owners(scene) for scene in scenes]),
        phrases_NW=torch.stack([multi_hot(phrase) for phrase in phrases]),
        strange_B=strange_B,
        fair=fair,
    )


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of the encoder's size as its input, exactly as `image_processor` does it."""
    pixels_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels_BHWC.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def vision_loss(encoder: SiglipVisionModel, scorer: PhraseScorer, batch: Batch) -> Tensor:
    """How wrong the phrases' scores are, for whole images and for their patches."""
    patches_BPD = encoder(pixel_values=batch.pixels_BCHW).last_hidden_state
    logits_BNP = scorer(patches_BPD, batch.phrases_NW)
    true_BNT, scored_BNT = judge(batch)
    # What an image shows counts even where a false phrase would not be scored.
    true_BN = true_BNT.any(-1)
    scored_BN = true_BN | scored_BNT.all(-1)
    image_loss = _balanced_loss(logits_BNP.amax(-1)[scored_BN], true_BN[scored_BN].float())

    owner_BP = batch.owner_BP
    # One column more than things: of a patch with no thing every phrase is false, and scored.
    column_BNP = torch.where(owner_BP < 0, MAX_OBJECTS, owner_BP)[:, None, :].expand_as(logits_BNP)
    true_BNP = nn.functional.pad(true_BNT, (0, 1)).gather(2, column_BNP)
    scored_BNP = nn.functional.pad(scored_BNT, (0, 1), value=True).gather(2, column_BNP)
    scored_BNP = scored_BNP & (owner_BP != _UNCLEAR)[:, None, :]
    return image_loss + _balanced_loss(logits_BNP[scored_BNP], true_BNP[scored_BNP].float())


def judge(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which phrases are true of which things, and which of these verdicts are scored."""
    objects_BWT = batch.objects_BTW.transpose(1, 2)
    true_BNT = batch.phrases_NW @ objects_BWT == batch.phrases_NW.sum(-1)[:, None]
    scored_BNT = torch.ones_like(true_BNT)
    if batch.fair:
        held_out_BNT = (batch.phrases_NW @ _HELD_OUT_WW) @ objects_BWT > 0
        names_color_N = batch.phrases_NW[:, _WORD_IS["color"]].any(-1)
        scored_BNT = true_BNT | ~held_out_BNT
        scored_BNT &= ~(batch.strange_B[:, None] & names_color_N)[:, :, None]
    return true_BNT, scored_BNT


def _all_words(one: SceneObject) -> Phrase:
    return {name: getattr(one, name) for name in ATTRIBUTES}


def _sample_phrases(scene: Scene, rng: random.Random) -> list[Phrase]:
    """One true phrase about a thing of the scene, and some that differ by one word."""
    one = rng.choice(scene.objects)
    names = rng.sample(list(ATTRIBUTES), rng.choice((1, 2, 2, 3, 4)))
    phrase = {name: getattr(one, name) for name in names}
    phrases = [phrase]
    if len(names) > 1:
        changed = rng.choice(names)
        phrases.append({**phrase, changed: rng.choice(ATTRIBUTES[changed])})
        if len(scene.objects) > 1:
            phrases.append({**phrase, changed: getattr(rng.choice(scene.objects), changed)})
    return [p for p in phrases if (p.get("shape"), p.get("color")) not in HELD_OUT]


def multi_hot(phrase: Phrase) -> Tensor:
    row_W = torch.zeros(len(WORDS))
    row_W[[WORDS.index(word) for word in phrase.values()]] = 1
    return row_W


def _patch_owners(scene: Scene) -> Tensor:
    """Which thing covers each patch, judged by where the thing stands before jitter."""
    owner_YX = torch.full((PATCHES_PER_SIDE, PATCHES_PER_SIDE), _NO_OBJECT)
    edges = torch.arange(PATCHES_PER_SIDE) * float(PATCH_SIZE)
    for index, one in enumerate(scene.objects):
        (x, y), radius = center_of(one), RADIUS[one.size]
        reach = 3.0  # jitter of place and size
        near_Y, near_X = (_overlap(edges, c, radius + reach) > 0 for c in (y, x))
        owner_YX[near_Y[:, None] & near_X] = _UNCLEAR
        covered_YX = _overlap(edges, y, radius)[:, None] * _overlap(edges, x, radius)
        covered_YX[int(y) // PATCH_SIZE, int(x) // PATCH_SIZE] = PATCH_SIZE**2
        owner_YX[covered_YX >= 0.3 * PATCH_SIZE**2] = index
    return owner_YX.flatten()


def _overlap(edges: Tensor, center: float, radius: float) -> Tensor:
    """How much of each patch's side lies within the radius of the center."""
    return (
        (edges + PATCH_SIZE).clamp(max=center + radius) - edges.clamp(min=center - radius)
    ).clamp(min=0)


def _balanced_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Sigmoid loss where the true, the false and the wrongly believed weigh alike."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    false = 1 - truth
    believed = torch.sigmoid(logits.detach()) * false
    weights = (
        truth / truth.sum().clamp(min=1)
        + 3 * false / false.sum().clamp(min=1)
        + believed / (believed.sum() + 1)
    )
    return (losses * weights).sum()
