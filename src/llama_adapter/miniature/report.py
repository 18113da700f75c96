"""The demonstration's report: one self-contained HTML page with scores, curves and images."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from llama_adapter.files import write_atomically
from llama_adapter.miniature.questions import ask
from llama_adapter.miniature.task import METRICS, SEEN_TYPES, HeldOutScenes, write_answers
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.photos.gallery import Gallery
from llama_adapter.processing.processor import LlamaAdapterProcessor

SHOWN_IMAGES = 8
QUESTIONS_EACH = 3


def write_report(
    path: Path,
    *,
    photographs: Gallery,
    results: Mapping[str, Any] | None = None,
    curve: Path | None = None,
    gallery: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page: photographs, then the miniature world where it has `results`.

    Nothing in the page is fetched from anywhere.
    """
    environment = Environment(
        loader=PackageLoader("llama_adapter.miniature", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
    )
    page = environment.get_template("report.html.j2").render(
        texts=METRICS,
        results=results,
        measured=[] if results is None else [results["bundled"], results["trained"]],
        photographs=photographs,
        pixels={
            card.photograph.path: _data_url(card.photograph.path.read_bytes(), kind="jpeg")
            for card in photographs.cards
        },
        questions=sorted(SEEN_TYPES),
        curve=None if curve is None else _data_url(curve.read_bytes()),
        gallery=gallery,
    )
    write_atomically(path, page)


def gallery(
    model: LlamaAdapterForConditionalGeneration,
    processor: LlamaAdapterProcessor,
    test: HeldOutScenes,
    *,
    captions: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """The first test images with captions, and answers of a model next to the references."""
    rng = random.Random("gallery")
    cards = []
    for index, image in enumerate(test.images[:SHOWN_IMAGES]):
        scene = test.scenes[index]
        drawn = [a for kind in rng.sample(SEEN_TYPES, 5) if (a := ask(scene, rng, kind))]
        asked = drawn[:QUESTIONS_EACH]
        answers = write_answers(model, processor, [(a.question, image) for a in asked])
        cards.append(
            {
                "image": _data_url(_png(test.draw_large(index))),
                "captions": {name: said[index] for name, said in captions.items()},
                "answers": [
                    (a.question, answer, a.answer) for a, answer in zip(asked, answers, strict=True)
                ],
            }
        )
    return cards


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _data_url(data: bytes, *, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
