"""Requests: values are checked by name, increments reach their reader, prompts are whole."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llama_adapter import Conversation, LlamaAdapterProcessor
from llama_adapter.errors import ConfigError, PromptError
from llama_adapter.generation.requests import (
    EncodedPrompt,
    Generation,
    GenerationRequest,
    Increment,
    Sampling,
    Usage,
    encode_prompt,
)

PROMPT = EncodedPrompt(input_ids=(1, 2, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.5},
        {"stop": ("",)},
        {"max_tokens": 0},
        {"n": 0},
        {"top_logprobs": 2},
        {"top_logprobs": 21, "logprobs": True},
        {"grammar": "root ::= 'a'", "json_schema": "{}"},
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        Sampling(**wrong)


def test_an_answer_that_is_done_has_its_cost() -> None:
    """Other threads look at both without a lock."""
    generation = Generation(GenerationRequest(prompt=PROMPT))
    costs = []

    class Open(set[int]):
        def __isub__(self, other: Any) -> Any:
            costs.append(generation.usage.completion_tokens)
            return self

    generation._open = Open()
    generation.put(Increment(finish="stop"), usage=Usage(completion_tokens=1))
    assert costs == [1]


def test_a_reader_gets_everything_until_the_last_answer_ends() -> None:
    told = threading.Event()
    request = GenerationRequest(prompt=PROMPT, sampling=Sampling(n=2))
    generation = Generation(request, notify=told.set)

    def work() -> None:
        generation.put(Increment(text="a"), Increment(choice=1, text="b", finish="stop"))
        generation.put(Increment(text="c", finish="length"), usage=Usage(completion_tokens=3))

    thread = threading.Thread(target=work)
    thread.start()
    assert "".join(part.text for part in generation) == "abc"
    thread.join()
    assert told.is_set()
    assert generation.is_done
    assert generation.usage.completion_tokens == 3


def test_a_failure_comes_after_what_was_delivered() -> None:
    generation = Generation(GenerationRequest(prompt=PROMPT))
    generation.put(Increment(text="a"))
    generation.fail(PromptError("broken"))
    parts = iter(generation)
    assert next(parts).text == "a"
    with pytest.raises(PromptError, match="broken"):
        next(parts)


def test_a_prompt_has_its_images_by_content(adapter_dir: Path) -> None:
    processor = LlamaAdapterProcessor.from_pretrained(adapter_dir)
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    first, again, other = (
        encode_prompt(processor, Conversation.ask("What is it?", images=[image]))
        for image in (red, red.copy(), blue)
    )
    assert first.images[0].key == again.images[0].key != other.images[0].key
    assert len(first.placeholders) == len(first.input_ids)
    assert first.images[0].pixel_values.ndim == 3
