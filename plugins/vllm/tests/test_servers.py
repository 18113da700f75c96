"""vLLM's own API server answers as `llama-adapter chat` does, for adapters of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapters import (
    all_tokens,
    lora_alone,
    merged_chat,
    own_placeholders_with_lora,
    randomized_v1,
    released,
    scene,
)
from llama_adapter.checkpoints.vllm_export import export_vllm
from llama_adapter.miniature.bundled import bundled_adapter
from llama_adapter.photos import bundled as photos
from PIL import Image
from servers import Question, Server, chat_answers, served

QUESTIONS = (
    "What is in the image?",
    "How many objects are there?",
    "What color is the circle?",
    "Describe the image.",
)
LONG = " ".join(QUESTIONS * 2)
"""Longer than a block of the prefix cache."""

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Kind:
    make: Make
    """Gives an adapter directory; it may write one at the path it is given."""
    images: Callable[[int], Image.Image] | None = scene
    mode: str = "placeholders"
    options: tuple[str, ...] = ("--enforce-eager",)


@dataclass(frozen=True)
class Case:
    kind: Kind
    server: Server
    adapter: Path

    def question(self, text: str, number: int | None) -> Question:
        shown = self.kind.images is not None and number is not None
        return Question(text, (self.kind.images(number),) if shown else ())


def _bundled(name: str) -> Make:
    return lambda _: bundled_adapter(name)


def _photos(_: Path) -> Path:
    if (reason := photos.why_missing()) is not None:
        pytest.skip(reason)
    return photos.bundled_adapter()


def _photograph(number: int) -> Image.Image:
    found = sorted((Path(photos.__file__).parent / "examples").glob("*.jpg"))
    return Image.open(found[number % len(found)]).convert("RGB")


def _released(kind: str) -> Make:
    return lambda out: released(kind, out)


KINDS = {
    "own placeholders": Kind(_bundled("v2")),
    "own placeholders, compiled": Kind(_bundled("v2"), options=()),
    "late fusion": Kind(_bundled("caption"), mode="cross_attention"),
    "all tokens": Kind(all_tokens, mode="cross_attention"),
    "static prompts": Kind(randomized_v1, images=None, mode="text"),
    "static prompts, compiled": Kind(randomized_v1, images=None, mode="text", options=()),
    "own placeholders with LoRA": Kind(own_placeholders_with_lora),
    "LoRA alone": Kind(lora_alone, images=None, mode="text"),
    "merged chat": Kind(merged_chat, images=None, mode="text"),
    "photos": Kind(_photos, images=_photograph),
    "v1-text": Kind(_released("v1-text"), images=None, mode="text"),
    "v2-chat": Kind(_released("v2-chat"), images=None, mode="text"),
    "v2-chat-adapter": Kind(_released("v2-chat-adapter"), images=None, mode="text"),
    "v2-multimodal-bias": Kind(_released("v2-multimodal-bias"), mode="cross_attention"),
    "v2-multimodal-lora-bias": Kind(_released("v2-multimodal-lora-bias"), mode="cross_attention"),
    "tensor parallel": Kind(
        _released("v2-multimodal-lora-bias"),
        mode="cross_attention",
        options=("--tensor-parallel-size", "2"),
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    kind, root = KINDS[request.param], tmp_path_factory.mktemp("server")
    adapter = kind.make(root / "adapter")
    report = export_vllm(adapter, out=root / "export")
    assert report.mode == kind.mode
    with served(
        root / "export", *kind.options, log=root / "server.log", stop=report.stop
    ) as server:
        yield Case(kind, server, adapter)


def test_eight_requests_at_once(case: Case) -> None:
    """Seven with images, if the adapter reads any, and one of text alone."""
    questions = [case.question(QUESTIONS[i % 4], i) for i in range(7)]
    questions.append(Question("What color is the sky?"))
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(case.server.ask, questions))
    assert [answer.text for answer in found] == chat_answers(str(case.adapter), questions)


def test_three_images_and_none_with_one_text_twice(case: Case) -> None:
    """No image is mixed up with another or with none, also where a prefix is in the cache."""
    questions = [case.question(LONG, number) for number in (0, 1, 2, None)]
    first, second = ([case.server.ask(q) for q in questions] for _ in range(2))
    expected = chat_answers(str(case.adapter), questions)
    assert [answer.text for answer in first] == expected
    assert [answer.text for answer in second] == expected
    pairs = [(a.cached_tokens, b.cached_tokens) for a, b in zip(first, second, strict=True)]
    if case.kind.mode == "cross_attention":  # vLLM shares no prefixes of such models
        assert pairs == [(0, 0)] * 4
    elif case.kind.mode == "placeholders":  # at first at most what precedes the image
        assert all(before < after for before, after in pairs)
    else:
        assert all(after > 0 for _, after in pairs)
