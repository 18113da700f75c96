"""What an adapter can do on held-out scenes: the claims C1 to C6, with 95% intervals.

    C1         questions, the scene given as text, no picture
    C2         captions of pictures: share of things with every attribute right
    C3         questions about a picture, zero-shot; C3key: the right word among its category
    C4         questions with a caption expert's text as context and the picture present
    C5         the questions blind; C5key; C5shuffled, C5shuffledkey with another scene's picture
    C6         C1 with an unrelated picture present

Every test scene holds a combination of shape and colour that no training stage ever saw.
An answer is right if greedy decoding gives exactly the expected words; that is decided by one
forward pass over the expected answer, since greedy decoding follows it exactly when every one
of its tokens is the likeliest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.miniature.captions import describe_tasks, parse_caption, passage
from llama_adapter.miniature.lessons import PICTURE, collate
from llama_adapter.miniature.pictures import PicturePool
from llama_adapter.miniature.questions import QUESTION_TYPES, QuestionAnswer, ask
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor

UNSEEN = frozenset({"sign"})
"""Question types about what the vision encoder cannot read; the OCR expert's business."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A share of right answers with its 95% Wilson interval."""

    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.total:
            return math.nan, math.nan
        z, n, p = 1.959964, self.total, self.value
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, float | int]:
        """Value, count and interval, as shares from 0 to 1."""
        low, high = self.interval()
        return {
            "value": round(self.value, 4),
            "n": self.total,
            "low": round(low, 4),
            "high": round(high, 4),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question of the exam, about one of the pool's scenes."""

    scene: int
    asked: QuestionAnswer
    passage: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How one question was answered."""

    item: Item
    exact: bool
    key: bool
    """Every content word is the likeliest of its category, given the answer up to it."""


class Exam:
    """Questions about the scenes of a test pool, the same ones for the same seed."""

    def __init__(self, pool: PicturePool, *, count: int = 660, seed: int = 0) -> None:
        self.pool = pool
        rng = random.Random(f"exam/{seed}")
        kinds = [kind for kind in QUESTION_TYPES if kind not in UNSEEN]
        self.items: list[Item] = []
        while len(self.items) < count:
            kind = kinds[len(self.items) % len(kinds)]
            index = rng.randrange(len(pool))
            asked = ask(pool.scenes[index], rng, kind)
            if asked is not None:
                text = passage(pool.scenes[index], rng)
                self.items.append(Item(scene=index, asked=asked, passage=text))

    @torch.no_grad()
    def take(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        context: Callable[[Item], str | None] | None = None,
        picture: Callable[[Item], int] | None = None,
        batch_size: int = 60,
    ) -> list[Mark]:
        """Answer every question, with a text, a picture (an index into the pool), or neither."""
        model.eval()
        marks: list[Mark] = []
        for start in range(0, len(self.items), batch_size):
            items = self.items[start : start + batch_size]
            images: list[ImageRef] = [] if picture is None else [PICTURE]
            conversations = [
                Conversation.ask(
                    item.asked.question,
                    images=images,
                    context=context(item) if context else None,
                    answer=item.asked.answer,
                )
                for item in items
            ]
            features = None
            if picture is not None:
                features = self.pool.features([picture(item) for item in items])
            batch = collate(processor, conversations, features=features)
            labels_BT = batch.pop("labels")[:, 1:]
            logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
            for item, logits_TV, labels_T in zip(items, logits_BTV, labels_BT, strict=True):
                scored = labels_T != IGNORE_INDEX
                marks.append(_mark(item, logits_TV[scored], labels_T[scored], processor))
        return marks

    def unrelated(self, item: Item) -> int:
        """Another scene's picture, always the same one for a question."""
        return (item.scene + len(self.pool) // 2 + 1) % len(self.pool)


def _mark(
    item: Item, logits_AV: Tensor, answer_A: Tensor, processor: LlamaAdapterProcessor
) -> Mark:
    exact = bool((logits_AV.argmax(-1) == answer_A).all())
    tokenizer = processor.tokenizer
    key = True
    for keyword in item.asked.keywords:
        alternatives = [_token(tokenizer, word) for word in keyword.alternatives]
        gold = _token(tokenizer, keyword.word)
        position = (answer_A == gold).nonzero().flatten()
        if not len(position):
            continue
        likeliest = alternatives[int(logits_AV[position[0], alternatives].argmax())]
        key &= likeliest == gold
    return Mark(item=item, exact=exact, key=key)


def _token(tokenizer: object, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return int(ids[0])


def score(marks: Sequence[Mark], *, key: bool = False) -> Score:
    """Share of exact answers, or of answers whose content words are right."""
    right = sum(mark.key if key else mark.exact for mark in marks)
    return Score(right=right, total=len(marks))


@torch.no_grad()
def write_captions(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    features_NPC: Tensor,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 72,
) -> list[str]:
    """The model's own captions of pictures, greedily."""
    model.eval()
    instruction = describe_tasks()[0].instructions[0]
    prompt = processor.encode(Conversation.ask(instruction, images=[PICTURE]))
    captions: list[str] = []
    for start in range(0, len(features_NPC), batch_size):
        features = features_NPC[start : start + batch_size].float()
        ids_BT = torch.tensor([prompt.input_ids] * len(features))
        placeholders_BT = torch.tensor([prompt.placeholders] * len(features)) >= 0
        tokens = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            visual_features=features,
            visual_mask=placeholders_BT if processor.visual_scope == "placeholders" else None,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        captions += processor.batch_decode(tokens[:, ids_BT.shape[1] :], skip_special_tokens=True)
    return captions


def score_captions(captions: Sequence[str], pool: PicturePool) -> tuple[Score, dict[int, Score]]:
    """Share of things whose every attribute a caption has right, in all and by scene size."""
    by_size: dict[int, list[int]] = {}
    for caption, scene in zip(captions, pool.scenes, strict=True):
        said = parse_caption(caption)
        right = sum(thing in said for thing in scene.things)
        tally = by_size.setdefault(len(scene.things), [0, 0])
        tally[0] += right
        tally[1] += len(scene.things)
    split = {size: Score(right=r, total=t) for size, (r, t) in sorted(by_size.items())}
    return (
        Score(
            right=sum(s.right for s in split.values()), total=sum(s.total for s in split.values())
        ),
        split,
    )
