"""The processor and the model as Hugging Face's own pipeline uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llama_adapter

RED = Image.new("RGB", (16, 12), (255, 0, 0))
GREEDY = {"do_sample": False, "max_new_tokens": 3}
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": RED}, {"type": "text", "text": "who?"}],
    }
]


@pytest.fixture(scope="module")
def pipe(adapter_dir: Path) -> Any:
    from transformers import pipeline

    return pipeline("image-text-to-text", model=str(adapter_dir))


def expected_answer(pipe: Any) -> str:
    inputs = pipe.processor.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    tokens = pipe.model.generate(**inputs, **GREEDY)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return pipe.processor.decode(new, skip_special_tokens=True)


def test_the_auto_classes_load_ours(adapter_dir: Path, pipe: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(adapter_dir)
    assert type(model) is llama_adapter.LlamaAdapterForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(adapter_dir)) is llama_adapter.LlamaAdapterProcessor
    assert type(pipe.model) is type(model)


def test_messages_and_a_plain_question_give_the_same_answer(pipe: Any) -> None:
    answer = expected_answer(pipe)
    options = {"generate_kwargs": GREEDY, "return_full_text": False}
    assert pipe(text=MESSAGES, **options)[0]["generated_text"] == answer
    assert pipe(images=RED, text="who?", **options)[0]["generated_text"] == answer


def test_a_batch_of_conversations(pipe: Any) -> None:
    options = {"generate_kwargs": GREEDY, "return_full_text": False}
    both = pipe(text=[MESSAGES, MESSAGES], batch_size=2, **options)
    assert [row[0]["generated_text"] for row in both] == [expected_answer(pipe)] * 2


def test_a_started_answer_is_continued(pipe: Any) -> None:
    started = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "it is"}]}]
    inputs = pipe.preprocess(pipe_chat(started))
    assert not torch.any(inputs["input_ids"] == pipe.tokenizer.eos_token_id)


def pipe_chat(messages: list[dict[str, Any]]) -> Any:
    from transformers.utils.chat_template_utils import Chat

    return Chat(messages)
