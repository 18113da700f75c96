"""Batches to learn from: captions of pictures, and instructions about texts. Nothing else.

No lesson holds a question about a picture, or a question beside one. What a step sees depends
on seed and step alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.miniature.captions import NEXT_TEXT, passage
from llama_adapter.miniature.fairness import UNSCORED, unscored_tokens
from llama_adapter.miniature.instructions import sample_instruction, sample_talk, sample_task
from llama_adapter.miniature.pictures import PicturePool
from llama_adapter.miniature.scenes import Scene, sample_scene
from llama_adapter.processing.encoding import pad
from llama_adapter.processing.processor import LlamaAdapterProcessor

PASS_IN_TOKENS = 200
"""About so many tokens could be computed in the time that one more pass takes on a CPU."""

PICTURE = ImageRef(source=None, name="picture")
"""Stands for a picture whose features are at hand."""


def collate(
    processor: LlamaAdapterProcessor,
    conversations: Sequence[Conversation],
    *,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    """Model inputs with labels; with `features` [B, P, C] each row reads its own picture."""
    rows = [processor.encode(conversation) for conversation in conversations]
    nothing: list[tuple[ImageRef, ...]] = [()] * len(rows)
    batch = dict(processor.collate(rows, nothing, labels=True, side="right"))
    if features is not None:
        batch["visual_features"] = features
        if processor.visual_scope == "placeholders":
            length = batch["input_ids"].shape[1]
            placeholders_BT = pad(
                [r.placeholders for r in rows], value=-1, side="right", length=length
            )
            batch["visual_mask"] = placeholders_BT >= 0
    return batch


def by_length(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows that `collate` made in two parts, short and long, or in one if that saves no time.

    Their losses and gradients add up to the whole batch's: what is left out is padding. A batch of
    captions was half padding.
    """
    lengths_B, order_B = batch["attention_mask"].sum(1).sort(stable=True)
    lengths = lengths_B.tolist()
    size, longest = len(lengths), lengths[-1]
    tokens = {cut: cut * lengths[cut - 1] + (size - cut) * longest for cut in range(1, size)}
    cut = min(tokens, key=tokens.__getitem__, default=size)
    if cut == size or tokens[cut] + PASS_IN_TOKENS > size * longest:
        return [dict(batch)]
    return [_rows(batch, order_B[:cut], lengths[cut - 1]), _rows(batch, order_B[cut:], longest)]


def _rows(batch: Mapping[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
    return {
        name: x[rows] if name == "visual_features" else x[rows, :length]
        for name, x in batch.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LessonPlan:
    """What the two kinds of lessons are made of."""

    batch_size: int = 32
    """Pictures with captions a step."""
    instruction_batch_size: int = 16
    """Instructions a step."""
    caption_weight: float = 4.0
    """How often the full caption is asked for, against 1 for every other way to describe."""
    strange_share: float = 0.2
    """Share of the pictures in colours without a name, described by all but their colours."""
    feature_dropout: float = 0.1
    """Share of each picture's feature channels set to zero in training. What is read off single
    channels then counts less, and what adds up more: combinations never seen are read better."""
    fair: bool = True
    """Whether words that are held out with what is described are not scored as false."""
    beside_share: float = 0.15
    """Share of the pictures that stand beside a text about another scene, which is described
    instead: what a picture says must not drown what is read beside it."""
    distractor_share: float = 0.45
    """Share of passages that follow another scene's passage: the last one counts."""
    talk_share: float = 0.1
    """Share of multi-turn talks among instructions."""


class Lessons:
    """Draws the batches of any step."""

    def __init__(
        self,
        processor: LlamaAdapterProcessor,
        pool: PicturePool,
        *,
        plan: LessonPlan,
        seed: int,
    ) -> None:
        self.processor = processor
        self.pool = pool
        self.plan = plan
        self.seed = seed

    def captions(self, step: int) -> dict[str, Tensor]:
        """Pictures, instructions to describe them, and descriptions."""
        rng = random.Random(f"captions/{self.seed}/{step}")
        drawn = [self._caption(rng) for _ in range(self.plan.batch_size)]
        indices, scenes, conversations = zip(*drawn, strict=True)
        features_BPC = self.pool.features(indices)
        if self.plan.feature_dropout:
            features_BPC = _without_some_channels(features_BPC, self.plan.feature_dropout, rng)
        return self._scored(collate(self.processor, conversations, features=features_BPC), scenes)

    def _caption(self, rng: random.Random) -> tuple[int, Scene, Conversation]:
        """A picture's number, the scene that is described, and how."""
        index = rng.randrange(len(self.pool))
        if rng.random() < self.plan.beside_share:
            return index, *_beside_a_picture(rng)
        task = sample_task(
            rng,
            caption_weight=self.plan.caption_weight,
            names_colors=not self.pool.strange[index],
        )
        scene = self.pool.scenes[index]
        instruction = rng.choice(task.instructions)
        return (
            index,
            scene,
            Conversation.ask(instruction, images=[PICTURE], answer=task.write(scene, rng)),
        )

    def instructions(self, step: int) -> dict[str, Tensor]:
        """Instructions with and without a passage, and talks; of similar length in a batch."""
        rng = random.Random(f"instructions/{self.seed}/{step}")
        size, bands = self.plan.instruction_batch_size, 4
        drawn = [self._instruction(rng) for _ in range(size * bands)]
        drawn.sort(key=lambda d: len(d[0].context or "") + sum(len(m.text) for m in d[0].messages))
        band = rng.randrange(bands)
        conversations, scenes = zip(*drawn[band * size : (band + 1) * size], strict=True)
        return self._scored(collate(self.processor, conversations), scenes)

    def _scored(
        self, batch: dict[str, Tensor], scenes: Sequence[Scene | None]
    ) -> dict[str, Tensor]:
        if self.plan.fair:
            batch[UNSCORED] = unscored_tokens(batch["labels"], scenes, self.processor.tokenizer)
        return batch

    def _instruction(self, rng: random.Random) -> tuple[Conversation, Scene | None]:
        if rng.random() < self.plan.talk_share:
            talk = sample_talk(rng)
            (question, answer), *later = talk.turns
            conversation = Conversation.ask(question, context=talk.context, answer=answer)
            for question, answer in later:
                conversation = conversation.user(question).assistant(answer)
            return conversation, talk.scene
        drawn = sample_instruction(rng)
        context = drawn.context
        if context is not None and rng.random() < self.plan.distractor_share:
            other = sample_scene(rng)
            context = f"{passage(other, rng)} {NEXT_TEXT} {context}"
        asked = Conversation.ask(drawn.instruction, context=context, answer=drawn.answer)
        return asked, drawn.scene


def _beside_a_picture(rng: random.Random) -> tuple[Scene, Conversation]:
    """A text to describe, in words that do not ask for the picture beside it."""
    scene, task = sample_scene(rng), sample_task(rng)
    wordings = [w for w in task.instructions if "picture" not in w and "see" not in w]
    return scene, Conversation.ask(
        rng.choice(wordings),
        images=[PICTURE],
        context=passage(scene, rng),
        answer=task.write(scene, rng),
    )


def _without_some_channels(features_BPC: Tensor, share: float, rng: random.Random) -> Tensor:
    """Dropout of whole channels, the same ones for all patches of a picture."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    shape = (len(features_BPC), 1, features_BPC.shape[-1])
    kept_B1C = torch.rand(shape, generator=generator) >= share
    return features_BPC * kept_B1C / (1 - share)
