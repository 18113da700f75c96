"""Experts of a server: all by default, those that a request names, none; each one at a time."""

from __future__ import annotations

import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from PIL import Image

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.errors import ExpertError
from llama_adapter.experts import ExpertContext, ExpertInfo, ExpertPool, Finding, Report, make_pool
from llama_adapter.experts.base import Request
from llama_adapter.experts.caption import CaptionOptions
from llama_adapter.generation.requests import Generation, Increment
from llama_adapter.miniature.bundled import bundled_adapter
from llama_adapter.serving.experts import EngineCaptions, ServedExperts


class Slow:
    """Counts questions; two at once are one too many."""

    info = ExpertInfo()

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = 0
        self._lock = threading.Lock()

    def consult(self, request: Any) -> Report:
        assert self._lock.acquire(blocking=False), "asked while it is busy"
        self.asked += 1
        time.sleep(0.02)
        self._lock.release()
        return Report(expert=self.name, findings=(Finding(text="a sign", kind="line"),))


def asked(client: openai.OpenAI, image: str, **options: Any) -> str:
    question = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": "What colour is the star?"},
    ]
    done = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": question}], **options
    )
    return str(done.choices[0].message.content)


def test_a_request_chooses_among_the_experts(serving: Any, red_star: str) -> None:
    first, second = Slow("first"), Slow("second")
    served = ServedExperts(ExpertPool([first, second]))
    with serving(service={"experts": served}) as running:
        client = running.client()
        assert running.get("/v1/models/toy").json()["experts"] == ["first", "second"]
        threads = [
            threading.Thread(target=asked, args=(running.client(), red_star)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (first.asked, second.asked) == (4, 4)
        asked(client, red_star, extra_body={"experts": ["second"]})
        asked(client, red_star, extra_body={"experts": []})
        assert (first.asked, second.asked) == (4, 5)
        with pytest.raises(openai.BadRequestError, match="no expert 'third'; there are: first"):
            asked(client, red_star, extra_body={"experts": ["third"]})


def test_the_engine_captions_with_an_adapter_of_its_own(
    engine: Any, serving: Any, red_star: str
) -> None:
    context = ExpertContext(caption_expert=partial(EngineCaptions, engine))
    pool = make_pool([f"caption={bundled_adapter('caption')}"], context)
    try:
        with serving(service={"experts": ServedExperts(pool)}) as running:
            assert asked(running.client(), red_star) == "the star is red."
            assert "caption-expert" in engine.adapters
    finally:
        engine.unload_adapter("caption-expert")


def test_a_server_refuses_captions_by_beams() -> None:
    directory = bundled_adapter("caption")
    options = CaptionOptions(model=str(directory), beams=3)
    with pytest.raises(ExpertError, match=r"expert 'caption'.*take beams=1, got 3"):
        EngineCaptions(SimpleNamespace(), directory, options)  # type: ignore[arg-type]


def test_a_caption_is_of_the_adapter_that_its_prompt_was_made_for() -> None:
    """An operator may exchange it meanwhile."""
    directory, asked = bundled_adapter("caption"), []
    processor = LlamaAdapterProcessor.from_pretrained(directory)

    def submit(request: Any) -> Generation:
        asked.append(request)
        generation = Generation(request)
        generation.put(Increment(text="a star", finish="stop"))
        return generation

    engine: Any = SimpleNamespace(
        load_adapter=lambda *_: None, processor=lambda _: processor, submit=submit
    )
    expert = EngineCaptions(engine, directory, CaptionOptions(model=str(directory)))
    report = expert.consult(Request(images=[Image.new("RGB", (32, 32))]))
    assert [finding.text for finding in report.findings] == ["a star"]
    assert [request.encoded_by for request in asked] == [processor]
