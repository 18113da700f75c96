"""Text-only instructions in many wordings: what the language adapter learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from llama_adapter.miniature.captions import (
    DescribeTask,
    describe_tasks,
    passage,
    sign_sentence,
)
from llama_adapter.miniature.questions import QUESTION_TYPES, QuestionAnswer, ask
from llama_adapter.miniature.scenes import (
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    sample_scene,
)

KNOWLEDGE: tuple[tuple[str, str], ...] = (
    *((f"what is {color}?", f"{color} is a color.") for color in COLORS),
    *((f"what is a {shape}?", f"a {shape} is a shape.") for shape in SHAPES),
    *((f"what is {size}?", f"{size} is a size.") for size in SIZES),
    ("how many corners does a triangle have?", "a triangle has three corners."),
    ("how many corners does a square have?", "a square has four corners."),
    ("how many corners does a circle have?", "a circle has no corners."),
    ("how many points does a star have?", "a star has five points."),
    ("what is the opposite of small?", "the opposite of small is large."),
    ("what is the opposite of large?", "the opposite of large is small."),
    ("what is the opposite of left?", "the opposite of left is right."),
    ("what is the opposite of right?", "the opposite of right is left."),
    ("what is the opposite of above?", "the opposite of above is below."),
    ("what is the opposite of below?", "the opposite of below is above."),
    ("what is the opposite of north?", "the opposite of north is south."),
    ("what is the opposite of east?", "the opposite of east is west."),
    ("name the shapes.", f"the shapes are {', '.join(SHAPES[:-1])} and {SHAPES[-1]}."),
    ("hello.", "hello."),
    ("thank you.", "you are welcome."),
)
"""Questions that need no scene."""

SIGN_ALONE = 0.4
"""Share of questions about a sign whose text is of nothing else, as what OCR reads is."""

DESCRIBED = 0.4
"""Share of instructions that ask for a description."""

CAPTION_WEIGHT = 4.0
"""How often the full caption is asked for, against 1 for every other way to describe."""

TYPE_WEIGHTS: dict[str, float] = {
    "color": 2, "shape": 2, "size": 2, "where": 2, "where_color": 3, "count": 3,
    "exist": 4, "at": 4, "colors": 4, "relation": 3, "compare": 3, "sign": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One instruction, the text it is about, if any, and the right answer."""

    instruction: str
    context: str | None
    answer: str
    kind: str
    """A question type, "describe" or "knowledge"."""
    scene: Scene | None = None
    """What the text is about."""


def sample_question(
    scene: Scene,
    rng: random.Random,
    *,
    one_word: float = 0.1,
    kinds: Sequence[str] = QUESTION_TYPES,
) -> QuestionAnswer:
    """A question of one of the kinds that the scene allows, harder kinds more often."""
    weights = [TYPE_WEIGHTS[k] for k in kinds]
    while True:
        kind = rng.choices(kinds, weights)[0]
        asked = ask(scene, rng, kind, one_word=one_word)
        if asked is not None:
            return asked


def sample_task(
    rng: random.Random, *, caption_weight: float = CAPTION_WEIGHT, names_colors: bool = True
) -> DescribeTask:
    """A way to describe, the first of them more often: it says most.

    Without `names_colors` only of those that leave colors out.
    """
    tasks = [task for task in describe_tasks() if names_colors or not task.names_colors]
    return rng.choices(tasks, [caption_weight] + [1.0] * (len(tasks) - 1))[0]


def sample_instruction(
    rng: random.Random, *, split: Split = Split.TRAIN, one_word: float = 0.1
) -> Instruction:
    """A question or a description with a passage, now and then one without."""
    u = rng.random()
    if u < 0.05:
        question, answer = rng.choice(KNOWLEDGE)
        return Instruction(instruction=question, context=None, answer=answer, kind="knowledge")
    scene = sample_scene(rng, split=split)
    context = passage(scene, rng)
    if u < 0.05 + DESCRIBED:
        task = sample_task(rng)
        return Instruction(
            instruction=rng.choice(task.instructions),
            context=context,
            answer=task.write(scene, rng),
            kind="describe",
            scene=scene,
        )
    asked = sample_question(scene, rng, one_word=one_word)
    if asked.kind == "sign" and rng.random() < SIGN_ALONE:
        context = sign_sentence(scene)
    return Instruction(
        instruction=asked.question,
        context=context,
        answer=asked.answer,
        kind=asked.kind,
        scene=scene,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """Several turns about one passage."""

    context: str
    turns: tuple[tuple[str, str], ...]
    """What the user says and what is answered."""
    scene: Scene


def sample_talk(rng: random.Random, *, split: Split = Split.TRAIN) -> Talk:
    """Two to four turns: questions, perhaps a description, perhaps thanks."""
    scene = sample_scene(rng, split=split)
    turns = []
    for _ in range(rng.randint(2, 4)):
        if rng.random() < 0.2:
            task = sample_task(rng)
            turns.append((rng.choice(task.instructions), task.write(scene, rng)))
        elif rng.random() < 0.05:
            turns.append(rng.choice(KNOWLEDGE))
        else:
            asked = sample_question(scene, rng)
            turns.append((asked.question, asked.answer))
    return Talk(context=passage(scene, rng), turns=tuple(turns), scene=scene)
