"""When a stream begins: with its first token, or with the error that it cannot begin with."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_adapter.generation.requests import (
    EncodedPrompt,
    Generation,
    GenerationRequest,
    Increment,
    Usage,
)
from llama_adapter.serving.service import Reader, Waker


class _Engine:
    def submit(self, request: GenerationRequest, notify: Any) -> Generation:
        return Generation(request, notify=notify)


def _first_news(*news: Any) -> bool:
    """Whether a stream has failed after what the engine does to its generation, in turn."""

    async def run() -> bool:
        prompt = EncodedPrompt(input_ids=(1,))
        reader = Reader(_Engine(), GenerationRequest(prompt=prompt), Waker())  # type: ignore[arg-type]
        waiting = asyncio.create_task(reader.has_failed())
        for happens in news:
            await asyncio.sleep(0.01)
            assert not waiting.done()
            happens(reader.generation)
        return await asyncio.wait_for(waiting, 5)

    return asyncio.run(run())


def test_news_without_a_token_is_not_the_first() -> None:
    assert _first_news(lambda g: g.put(), lambda g: g.fail(ValueError("schema")))


def test_a_token_begins_a_stream() -> None:
    begun = Increment(choice=0, text="a", tokens=())
    assert not _first_news(
        lambda g: g.put(), lambda g: g.put(begun, usage=Usage(prompt_tokens=1, completion_tokens=1))
    )
