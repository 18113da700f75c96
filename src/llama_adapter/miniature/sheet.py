"""Test pictures with what a model says of them, as one PNG to look at."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llama_adapter.chat import ChatSession
from llama_adapter.files import atomic_file
from llama_adapter.generation import GenerationSettings
from llama_adapter.miniature.captions import CAPTION_TASK
from llama_adapter.miniature.exam import UNSEEN
from llama_adapter.miniature.pictures import PicturePool, picture
from llama_adapter.miniature.questions import QUESTION_TYPES, ask
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor

PICTURE_SIZE = 192
QUESTIONS_EACH = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A picture, and questions about it with the model's answers and the right ones."""

    image: Image.Image
    caption: tuple[str, str]
    """What the model says, and what is right."""
    answers: tuple[tuple[str, str, str], ...]


def show(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    pool: PicturePool,
    *,
    count: int,
    seed: int,
) -> Iterator[Shown]:
    """The first pictures of a pool drawn from `seed`; the same questions for every model."""
    session = ChatSession(model, processor, settings=GenerationSettings(max_new_tokens=72))
    rng = random.Random("gallery")
    kinds = [kind for kind in QUESTION_TYPES if kind not in UNSEEN]
    for index in range(min(count, len(pool))):
        scene = pool.scenes[index]
        seen = picture(scene, seed=seed, index=index)
        drawn = [a for kind in rng.sample(kinds, 5) if (a := ask(scene, rng, kind)) is not None]

        def answer(question: str, seen: Image.Image = seen) -> str:
            session.reset()
            return session.ask(question, images=[seen]).text

        yield Shown(
            image=picture(scene, seed=seed, index=index, size=PICTURE_SIZE),
            caption=(answer(CAPTION_TASK.instructions[0]), CAPTION_TASK.write(scene, rng)),
            answers=tuple(
                (a.question, answer(a.question), a.answer) for a in drawn[:QUESTIONS_EACH]
            ),
        )


def lines_of(shown: Shown) -> list[tuple[str, bool]]:
    """What stands below a picture, and whether it is right."""
    said, true = shown.caption
    lines = [(f"“{said}”", said == true)]
    for question, given, right in shown.answers:
        lines += [(question, True), (f"→ {given}", given == right)]
    return lines


def write_sheet(shown: Sequence[Shown], path: Path) -> None:
    """Pictures side by side, caption and answers below; what is wrong is red."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(shown), 5.6))
    for column, one in enumerate(shown):
        axes = figure.add_axes((column / len(shown) + 0.01, 0.45, 1 / len(shown) - 0.02, 0.54))
        axes.imshow(one.image)
        axes.set_axis_off()
        height = 0.42
        for text, is_right in lines_of(one):
            lines = textwrap.wrap(text, 36)
            color = "black" if is_right else "#b42318"
            x = column / len(shown) + 0.012
            figure.text(x, height, "\n".join(lines), fontsize=9, va="top", color=color)
            height -= 0.036 * len(lines) + (0.02 if text[0] in "“→" else 0.0)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=100, format="png")
