"""The evaluation task `miniature`: what an adapter can do on scenes it could not have memorized.

Every test scene holds a combination of shape and color that no training stage ever saw. An
answer is right if greedy decoding gives exactly the reference; that is decided by one forward
pass over the reference, since greedy decoding follows it exactly when every one of its tokens is
the likeliest. A `_key` metric asks less: every content word is the likeliest of its category,
given the reference up to it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import EvaluationError
from llama_adapter.generation import GenerationSettings
from llama_adapter.generation.answer import Likelihood, answer, log_likelihoods
from llama_adapter.miniature.bundled import load_bundled
from llama_adapter.miniature.captions import CAPTION_TASK, parse_caption, passage
from llama_adapter.miniature.questions import QUESTION_TYPES, QuestionAnswer, ask
from llama_adapter.miniature.rendering import SceneImage
from llama_adapter.miniature.scenes import Scene, Split, scene_stream
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor

TEST_SEED = 20_000
"""Seed of the test scenes; a recipe's training scenes come from its sources' seeds."""

METRICS: dict[str, str] = {
    "text_qa": "questions about a text",
    "caption": "captions: objects with every attribute right",
    "caption_expert": "captions by the caption expert",
    "vqa_zero_shot": "questions about an image, zero-shot, exact",
    "vqa_zero_shot_key": "the same, right word among its category",
    "vqa_with_expert": "questions about an image with the expert's caption",
    "vqa_blind": "questions about an image, blind",
    "vqa_blind_key": "blind, right word among its category",
    "vqa_shuffled": "questions with another scene's image",
    "vqa_shuffled_key": "another scene's image, right word among its category",
    "text_qa_with_image": "questions about a text next to an unrelated image",
}
"""What each metric measures."""

SEEN_TYPES = tuple(kind for kind in QUESTION_TYPES if kind != "sign")
"""Types of the test's questions: the vision encoder cannot read signs, the OCR expert can."""

BATCH_SIZE = 64
"""Questions or images at once."""
ANSWER_TOKENS = 72
"""Longest caption."""

Progress = Callable[[int], None]
"""Called with the number of answers just given."""


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
        # at 0 and at 1 the ends are the value, which rounding may miss
        return min(max(0.0, middle - half), p), max(min(1.0, middle + half), p)

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
class Question:
    """A question about a scene, with a text that answers it."""

    scene: int
    asked: QuestionAnswer
    passage: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutScenes:
    """Held-out scenes with their images, and questions about them."""

    scenes: tuple[Scene, ...]
    images: tuple[ImageRef, ...]
    questions: tuple[Question, ...]
    seed: int

    @classmethod
    def draw(
        cls,
        *,
        images: int = 400,
        questions: int = 660,
        limit: int | None = None,
        seed: int = TEST_SEED,
        question_seed: int = 0,
    ) -> HeldOutScenes:
        """The same set for the same numbers; the types of questions take turns.

        `limit` is the most of both, but for the second image, which `unrelated` needs.
        """
        if limit is not None:
            images, questions = min(images, max(limit, 2)), min(questions, limit)
        if not (images >= 2 and questions >= 1):
            raise EvaluationError(
                f"miniature needs 2 images and a question at least, got {images} and {questions}"
            )
        scenes = tuple(islice(scene_stream(seed, split=Split.TEST), images))
        drawn = [SceneImage(scene=s, seed=seed, index=i) for i, s in enumerate(scenes)]
        rng = random.Random(f"exam/{question_seed}")
        chosen: list[Question] = []
        while len(chosen) < questions:
            kind = SEEN_TYPES[len(chosen) % len(SEEN_TYPES)]
            index = rng.randrange(images)
            asked = ask(scenes[index], rng, kind)
            if asked is not None:
                text = passage(scenes[index], rng)
                chosen.append(Question(scene=index, asked=asked, passage=text))
        return cls(
            scenes=scenes,
            images=tuple(ImageRef(source=p(), name=f"test image {p.index}") for p in drawn),
            questions=tuple(chosen),
            seed=seed,
        )

    def draw_large(self, index: int, *, size: int = 192) -> Image.Image:
        """One of the images in more pixels, for people to look at."""
        return SceneImage(scene=self.scenes[index], seed=self.seed, index=index, size=size)()

    def unrelated(self, scene: int) -> int:
        """Another scene, always the same one."""
        return (scene + len(self.scenes) // 2 + 1) % len(self.scenes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How one question was answered."""

    question: Question
    num_objects: int
    exact: bool
    key: bool


@dataclass(kw_only=True, slots=True)
class Results:
    """Scores by metric, and splits of some of them."""

    metrics: dict[str, Score] = field(default_factory=dict)
    by_objects: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By how many objects the scene holds."""
    by_question: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By type of question."""
    captions: list[str] = field(default_factory=list)
    """What the model says of each test image."""

    def to_dict(self) -> dict[str, Any]:
        """The scores, JSON-ready."""

        def plain(scores: Mapping[str, Score]) -> dict[str, Any]:
            return {name: score.to_dict() for name, score in scores.items()}

        return {
            "metrics": plain(self.metrics),
            "by_objects": {name: plain(split) for name, split in self.by_objects.items()},
            "by_question": {name: plain(split) for name, split in self.by_question.items()},
        }

    def take(self, name: str, marks: Sequence[Mark], *, with_key: bool = False) -> None:
        """Count marks as a metric with its splits, with `_key` as a second one."""
        for metric, is_right in (
            (name, lambda mark: mark.exact),
            *([(f"{name}_key", lambda mark: mark.key)] if with_key else []),
        ):
            right = [(mark, is_right(mark)) for mark in marks]
            self.metrics[metric] = _score(right)
            self.by_objects[metric] = _split(right, lambda mark: str(mark.num_objects))
            self.by_question[metric] = _split(right, lambda mark: mark.question.asked.kind)

    def take_captions(self, name: str, captions: Sequence[str], scenes: Sequence[Scene]) -> None:
        """Count the objects whose every attribute a caption has right."""
        by_objects: dict[int, list[bool]] = {}
        for caption, scene in zip(captions, scenes, strict=True):
            said = parse_caption(caption)
            right = by_objects.setdefault(len(scene.objects), [])
            right += [one in said for one in scene.objects]
        split = {str(n): Score(right=sum(r), total=len(r)) for n, r in sorted(by_objects.items())}
        self.by_objects[name] = split
        self.metrics[name] = Score(
            right=sum(s.right for s in split.values()), total=sum(s.total for s in split.values())
        )


def _score(right: Sequence[tuple[Mark, bool]]) -> Score:
    return Score(right=sum(is_right for _, is_right in right), total=len(right))


def _split(right: Sequence[tuple[Mark, bool]], part: Callable[[Mark], str]) -> dict[str, Score]:
    names = sorted({part(mark) for mark, _ in right})
    return {name: _score([r for r in right if part(r[0]) == name]) for name in names}


def evaluate(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    test: HeldOutScenes,
    *,
    expert_captions: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = lambda _: None,
) -> Results:
    """All metrics of one adapter; those with an expert need its captions of the test images."""
    model.eval()
    sees = model.adapter_config.is_multimodal
    out = Results()

    how: Any = {"batch_size": batch_size, "progress": progress}

    def marks(**given: Any) -> list[Mark]:
        return answer_questions(model, processor, test, **given, **how)

    def own(question: Question) -> int:
        return question.scene

    def other(question: Question) -> int:
        return test.unrelated(question.scene)

    def text(question: Question) -> str:
        return question.passage

    out.take("text_qa", marks(context=text))
    if sees:
        out.captions = write_captions(model, processor, test.images, **how)
        out.take_captions("caption", out.captions, test.scenes)
        out.take("vqa_zero_shot", marks(image=own), with_key=True)
        out.take("vqa_blind", marks(), with_key=True)
        out.take("vqa_shuffled", marks(image=other), with_key=True)
        out.take("text_qa_with_image", marks(context=text, image=other))
    if expert_captions is not None:
        out.take_captions("caption_expert", expert_captions, test.scenes)
        said = [*expert_captions]
        helped = marks(context=lambda q: said[q.scene], image=own if sees else None)
        out.take("vqa_with_expert", helped)
    out.metrics = {name: out.metrics[name] for name in METRICS if name in out.metrics}
    return out


def num_answers(test: HeldOutScenes, *, is_multimodal: bool = True) -> int:
    """How many answers `evaluate` reports to `progress`, the expert's metrics included."""
    if not is_multimodal:
        return 2 * len(test.questions)
    return 6 * len(test.questions) + len(test.images)


def answer_questions(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    test: HeldOutScenes,
    *,
    context: Callable[[Question], str] | None = None,
    image: Callable[[Question], int] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = lambda _: None,
) -> list[Mark]:
    """Mark the answers to every question, with a text, one of the test's images, or neither."""
    marks: list[Mark] = []
    for start in range(0, len(test.questions), batch_size):
        questions = test.questions[start : start + batch_size]
        conversations = [
            Conversation.ask(
                question.asked.question,
                images=[test.images[image(question)]] if image else [],
                context=context(question) if context else None,
                answer=question.asked.answer,
            )
            for question in questions
        ]
        found = log_likelihoods(model, processor, conversations)
        marks += [
            Mark(
                question=question,
                num_objects=len(test.scenes[question.scene].objects),
                exact=likelihood.is_greedy,
                key=_key_is_right(question.asked, likelihood, processor),
            )
            for question, likelihood in zip(questions, found, strict=True)
        ]
        progress(len(questions))
    return marks


def _key_is_right(
    asked: QuestionAnswer, likelihood: Likelihood, processor: LlamaAdapterProcessor
) -> bool:
    def token(word: str) -> int:
        return int(processor.tokenizer(word, add_special_tokens=False)["input_ids"][0])

    for keyword in asked.keywords:
        reference = token(keyword.word)
        positions = (likelihood.tokens_A == reference).nonzero().flatten()
        alternatives = [token(word) for word in keyword.alternatives]
        if len(positions):
            likeliest = likelihood.logits_AV[positions[0], alternatives].argmax()
            if alternatives[int(likeliest)] != reference:
                return False
    return True


def write_captions(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    images: Sequence[ImageRef],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress = lambda _: None,
) -> list[str]:
    """The model's own captions of images, greedily."""
    captions: list[str] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        asked = [(CAPTION_TASK.instructions[0], image) for image in batch]
        captions += write_answers(model, processor, asked)
        progress(len(batch))
    return captions


def write_answers(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    asked: Sequence[tuple[str, ImageRef]],
) -> list[str]:
    """Greedy answers to questions about an image each, as one batch."""
    conversations = [Conversation.ask(question, images=[image]) for question, image in asked]
    settings = GenerationSettings(max_new_tokens=ANSWER_TOKENS)
    return [one.text for one in answer(model, processor, conversations, settings)]


def bundled_expert_captions(
    test: HeldOutScenes, *, batch_size: int = BATCH_SIZE, progress: Progress = lambda _: None
) -> list[str]:
    """What the bundled caption expert says of each test image."""
    loaded = load_bundled("caption")
    return write_captions(*loaded, test.images, batch_size=batch_size, progress=progress)
