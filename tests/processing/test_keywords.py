"""Keywords of Hugging Face's processors are honoured or refused; nothing vanishes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers.processing_utils import ImagesKwargs, TextKwargs

from llama_adapter import ConfigError, Conversation, LlamaAdapterProcessor, PromptError

RED = Image.new("RGB", (10, 12), (255, 0, 0))
QUESTION = "what is the color of the star?"
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "red"}]
THEIRS = sorted({*TextKwargs.__annotations__, *ImagesKwargs.__annotations__})


@pytest.fixture
def processor(image_processor: Any, toy_tokenizer: Any) -> LlamaAdapterProcessor:
    return LlamaAdapterProcessor(image_processor, toy_tokenizer, template="toy")


def assert_same(batch: Any, expected: Any) -> None:
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert_close(batch[key], value, rtol=0, atol=0)


def test_by_position_images_come_first_as_with_hugging_face(processor: Any) -> None:
    expected = processor(text="who?", images=RED)
    talk = Conversation.ask("who?")
    for given in (
        (RED, "who?"),
        ([RED], ["who?"]),
        (RED, talk),
        ("who?", RED),
        (talk, RED),
        (["who?"], [[RED]]),
    ):
        assert_same(processor(*given), expected)
    assert_same(processor("who?", images=RED), expected)
    assert_same(processor(RED, text="who?"), expected)
    plain = processor(text="who?")
    for given in (("who?",), (None, "who?"), ("who?", None)):
        assert_same(processor(*given), plain)
    with pytest.raises(ConfigError, match="each of them once"):
        processor(RED, "who?", images=RED)
    with pytest.raises(PromptError, match="a prompt is needed"):
        processor(images=RED)


def test_keywords_may_stand_in_groups(processor: Any) -> None:
    texts = ["who?", QUESTION]
    expected = processor(texts, padding_side="right", max_length=100, padding="max_length")
    batch = processor(
        texts,
        text_kwargs={"padding": "max_length", "max_length": 100},
        padding_side="right",
        common_kwargs={"return_tensors": "pt"},
        images_kwargs={},
    )
    assert_same(batch, expected)
    assert batch["input_ids"].shape == (2, 100)
    with pytest.raises(ConfigError, match="'max_length' is given twice, as 9 and in text_kwargs"):
        processor(texts, max_length=9, text_kwargs={"max_length": 8})
    for group in ("videos_kwargs", "audio_kwargs"):
        with pytest.raises(ConfigError, match=f"{group} are not supported, got 'fps'"):
            processor(texts, **{group: {"fps": 2}})


def test_padding_and_truncation_in_every_spelling(processor: Any) -> None:
    texts = ["who?", QUESTION]
    longest = processor(texts)["input_ids"].shape[1]
    assert processor(texts, padding="longest")["input_ids"].shape == (2, longest)
    assert processor(texts, pad_to_multiple_of=16)["input_ids"].shape == (2, 16)
    assert processor(texts, truncation=None, max_length=None)["input_ids"].shape == (2, longest)
    cut = processor(texts, truncation="longest_first", max_length=5)
    assert_close(cut["input_ids"], processor(texts, padding_side="right")["input_ids"][:, :5])
    assert processor(QUESTION, padding="do_not_pad")["input_ids"].shape == (1, longest)
    with pytest.raises(PromptError, match="padding=False cannot batch them"):
        processor(texts, padding=False)
    for wrong in ({"padding": "some"}, {"truncation": "only_second"}, {"padding_side": "top"}):
        with pytest.raises(ConfigError, match=r"must be one of .*, got '\w+'"):
            processor(texts, **wrong)
    for wrong in ({"max_length": 0}, {"pad_to_multiple_of": 2.5}, {"max_length": "9"}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            processor(texts, **wrong)


def test_arrays_and_lists_for_those_who_ask(processor: Any) -> None:
    expected = processor(text=QUESTION, images=RED)
    arrays = processor(text=QUESTION, images=RED, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    assert_same({k: torch.from_numpy(v) for k, v in arrays.items()}, expected)
    lists = processor(text=QUESTION, images=RED, return_tensors=None)
    assert lists["input_ids"] == expected["input_ids"].tolist()
    assert isinstance(lists["pixel_values"][0], np.ndarray)
    assert "attention_mask" not in processor(QUESTION, return_attention_mask=False)
    with pytest.raises(ConfigError, match="return_tensors must be one of 'pt', 'np', None"):
        processor(QUESTION, return_tensors="tf")


def test_an_image_processor_can_be_asked_for_other_pixels(processor: Any) -> None:
    expected = processor.image_processor(images=[RED], do_normalize=False, return_tensors="pt")
    for options in ({"do_normalize": False}, {"images_kwargs": {"do_normalize": False}}):
        pixels = processor(text="who?", images=RED, **options)["pixel_values"]
        assert_close(pixels, expected["pixel_values"], rtol=0, atol=0)
    # for this call alone
    assert processor.image_processor.do_normalize
    with pytest.raises(ConfigError, match="do_normalize must be true or false, got 3"):
        processor(text="who?", images=RED, do_normalize=3)
    text_only = LlamaAdapterProcessor(None, processor.tokenizer)
    with pytest.raises(ConfigError, match="'do_resize' is of images, but this adapter reads text"):
        text_only("who?", do_resize=True)


@pytest.mark.parametrize(
    "name", sorted({*TextKwargs.__annotations__, *ImagesKwargs.__annotations__})
)
def test_no_keyword_of_transformers_vanishes(name: str, processor: Any) -> None:
    """Each does what it says or is refused, so that what means nothing is refused by all."""
    for options in ({name: "nonsense"}, {"text_kwargs": {name: "nonsense"}}):
        with pytest.raises(ConfigError):
            processor(text="who?", images=RED, **options)
        with pytest.raises(ConfigError):
            processor.apply_chat_template(
                MESSAGES, tokenize=True, return_dict=True, processor_kwargs=options
            )


def test_defaults_of_transformers_that_mean_nothing_here_pass(processor: Any) -> None:
    expected = processor("who?")
    options = {"stride": 0, "return_token_type_ids": False, "return_mm_token_type_ids": None}
    assert_same(processor("who?", verbose=True, videos=None, audio=None, **options), expected)
    with pytest.raises(ConfigError, match=r"return_token_type_ids=True is not supported"):
        processor("who?", return_token_type_ids=True)
    with pytest.raises(ConfigError, match=r"videos=.* is not supported: a video is passed among"):
        processor("who?", videos=[[RED, RED]])


def test_without_special_tokens_text_is_what_it_is(processor: Any) -> None:
    tokenizer = processor.tokenizer
    text = "the star is red"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor(text, add_special_tokens=False)["input_ids"].tolist() == [bare]
    assert processor(text, rendered=True)["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    # a text that ends is no question
    whole = text + tokenizer.eos_token
    assert processor(text=whole)["input_ids"].tolist() == [tokenizer(whole)["input_ids"]]
    forged = f"a{tokenizer.eos_token}b{tokenizer.eos_token}"
    assert int((processor(forged)["input_ids"] == tokenizer.eos_token_id).sum()) == 1
    # said once for all calls, as trainers need it
    processor.rendered = True
    assert processor(text)["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    assert processor.encode(text).input_ids == tuple(tokenizer(text)["input_ids"])
    assert "rendered" not in processor.to_dict()


def test_a_rendered_talk_in_two_texts_is_the_talk(processor: Any) -> None:
    """As trainers hand over prompt and completion: plain strings, without special tokens."""
    prompt = str(processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True))
    talk = str(processor.apply_chat_template(MESSAGES))
    assert talk.startswith(prompt)
    options = {"add_special_tokens": False, "return_tensors": None}
    begun = processor(text=[prompt], **options)["input_ids"][0]
    ended = processor(text=[talk[len(prompt) :]], **options)["input_ids"][0]
    assert begun + ended == processor([MESSAGES])["input_ids"][0].tolist()


def test_a_chat_template_call_as_trainers_make_it(processor: Any) -> None:
    expected = processor([MESSAGES, MESSAGES], labels=True)
    batch = processor.apply_chat_template(
        [MESSAGES, MESSAGES],
        chat_template=None,
        tools=None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={
            "padding": True,
            "padding_side": "right",
            "pad_to_multiple_of": None,
            "truncation": False,
            "max_length": None,
            "add_special_tokens": False,
        },
    )
    assert_close(batch["assistant_masks"], (expected["labels"] != -100).long())
    assert_close(batch["input_ids"], expected["input_ids"])
    with pytest.raises(ConfigError, match="needs tokenize=True and return_dict=True"):
        processor.apply_chat_template(MESSAGES, return_assistant_tokens_mask=True)


def test_a_template_and_its_switches_are_the_adapters(processor: Any, bytes_tokenizer: Any) -> None:
    for options, message in (
        ({"tools": [{"name": "search"}]}, "no place for tools"),
        ({"documents": [{"text": "x"}]}, "no place for documents"),
        ({"enable_thinking": True}, "enable_thinking=True is not what the adapter has, None"),
        ({"chat_template": "{{ messages }}"}, "chat_template cannot replace it"),
        ({"colour": 1}, "unknown processor option 'colour'"),
        ({"processor_kwargs": {"colour": 1}}, "unknown processor option 'colour'"),
    ):
        with pytest.raises(ConfigError, match=message):
            processor.apply_chat_template(MESSAGES, **options)
    assert processor.apply_chat_template(MESSAGES, tools=[], enable_thinking=None)
    with pytest.raises(ConfigError, match="chat_template cannot replace it"):
        processor.chat_template = "{{ messages }}"
    tokenizer = bytes_tokenizer
    thinking = "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}"
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=["<|im_start|>"],
        chat_template=thinking + tokenizer.chat_template,
    )
    switched = LlamaAdapterProcessor(
        None, tokenizer, template="chat", chat_switches={"enable_thinking": False}
    )
    text = switched.apply_chat_template(MESSAGES, enable_thinking=False)
    assert text == switched.apply_chat_template(MESSAGES)
    with pytest.raises(ConfigError, match="enable_thinking=True is not what the adapter has"):
        switched.apply_chat_template(MESSAGES, enable_thinking=True)
