from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from llama_adapter import (
    CheckpointError,
    ConfigError,
    Conversation,
    LlamaAdapterProcessor,
    PromptError,
)
from llama_adapter.processing.templates import TEMPLATES

SLOT = "<|slot_0|> <|slot_1|> <|slot_2|>"
RED = Image.new("RGB", (10, 12), (255, 0, 0))
BLUE = Image.new("RGB", (12, 10), (0, 0, 255))
TOKENIZERS = ["bytes_tokenizer", "spaces_tokenizer", "toy_tokenizer"]


@pytest.fixture
def processor(image_processor: Any, toy_tokenizer: Any) -> LlamaAdapterProcessor:
    return LlamaAdapterProcessor(image_processor, toy_tokenizer, template="toy")


@pytest.fixture
def slotted(image_processor: Any, toy_tokenizer: Any) -> LlamaAdapterProcessor:
    return LlamaAdapterProcessor(
        image_processor,
        toy_tokenizer,
        template="toy",
        visual_scope="placeholders",
        placeholder_text=SLOT,
    )


def scored(processor: LlamaAdapterProcessor, batch: Any, row: int = 0) -> str:
    labels = batch["labels"][row]
    return processor.decode(labels[labels != -100])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_generation_prompt_is_a_prefix_of_the_training_text(
    kind: str, template: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("this tokenizer has no chat template")
    processor = LlamaAdapterProcessor(None, tokenizer, template=template)
    question = Conversation.ask("What colour is the star?", context="a red star")
    prompt = processor.encode(question).input_ids
    whole = processor.encode(question.assistant("The star is red."))
    assert whole.input_ids[: len(prompt)] == prompt
    assert set(whole.labels[: len(prompt)]) == {-100}
    assert whole.labels[len(prompt) :][: whole.num_answer_tokens] == tuple(
        label for label in whole.labels if label != -100
    )


@pytest.mark.parametrize("answer", ["red", "  two  spaces ", "é → ★", "line\n\nline", "a </s> b"])
@pytest.mark.parametrize("kind", ["bytes_tokenizer", "spaces_tokenizer"])
def test_labels_cover_every_answer_exactly(
    kind: str, answer: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    processor = LlamaAdapterProcessor(None, tokenizer, template="toy")
    talk = Conversation.ask("What?", answer=answer).user("And?").assistant("No.")
    batch = processor(talk, labels=True)
    rendered = processor.render(talk)
    expected = "".join(rendered[a:b] for a, b in rendered.answers)
    assert scored(processor, batch).replace(" ", "") == expected.replace(" ", "")
    assert int((batch["labels"] == tokenizer.eos_token_id).sum()) == 2


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_first_token_opens_the_text_exactly_once(
    kind: str, template: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    if template == "chat" and not tokenizer.chat_template:
        pytest.skip("this tokenizer has no chat template")
    ids = LlamaAdapterProcessor(None, tokenizer, template=template).encode("Who?").input_ids
    uses_bos = kind != "bytes_tokenizer"
    assert ids.count(tokenizer.bos_token_id) == uses_bos
    assert (ids[0] == tokenizer.bos_token_id) == uses_bos


def test_one_tokenisation_equals_the_tokenizers_own(spaces_tokenizer: Any) -> None:
    processor = LlamaAdapterProcessor(None, spaces_tokenizer)
    talk = Conversation.ask("Who?", answer="Me.")
    text = str(processor.render(talk))
    assert list(processor.encode(talk).input_ids) == spaces_tokenizer(text).input_ids


def test_generation_pads_left_and_training_right(processor: LlamaAdapterProcessor) -> None:
    questions = ["who?", "what is the color of the star?"]
    prompts = processor(questions)
    assert prompts["attention_mask"][0].tolist() == sorted(prompts["attention_mask"][0].tolist())
    assert prompts["attention_mask"][0, 0] == 0
    talks = [Conversation.ask(q, answer="red") for q in questions]
    batch = processor(talks, labels=True)
    assert batch["attention_mask"][0, -1] == 0
    assert batch["labels"][0, -1] == -100
    assert scored(processor, batch, 0) == scored(processor, batch, 1)


def test_rows_with_and_without_image(processor: LlamaAdapterProcessor) -> None:
    talks = [
        Conversation.ask("who?"),
        Conversation.ask("who?", images=[RED]),
        Conversation.ask("who?"),
        Conversation.ask("who?", images=[BLUE]),
    ]
    batch = processor(talks)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["image_index"].tolist() == [-1, 0, -1, 1]
    assert "visual_mask" not in batch
    text_only = processor(talks[:1])
    assert set(text_only) == {"input_ids", "attention_mask"}


def test_slots_are_marked_by_place_not_by_token(slotted: LlamaAdapterProcessor) -> None:
    talk = Conversation.ask(f"what is {SLOT} ?", images=[RED])
    batch = slotted([talk, Conversation.ask("who?")])
    marked = batch["input_ids"][0][batch["visual_mask"][0]]
    assert slotted.tokenizer.convert_ids_to_tokens(marked) == SLOT.split()
    assert not batch["visual_mask"][1].any()
    assert batch["image_index"].tolist() == [0, -1]


def test_ordinary_text_as_a_slot_is_not_confused_with_the_same_text(
    image_processor: Any, bytes_tokenizer: Any
) -> None:
    processor = LlamaAdapterProcessor(
        image_processor, bytes_tokenizer, visual_scope="placeholders", placeholder_text="1 2 3"
    )
    batch = processor(Conversation.ask("1 2 3", images=[RED], context="1 2 3"))
    marked = batch["visual_mask"][0]
    assert processor.decode(batch["input_ids"][0][marked]).strip() == "1 2 3"
    assert "".join(str(int(m)) for m in marked).strip("0").count("0") == 0


def test_several_slots_see_each_their_own_image(slotted: LlamaAdapterProcessor) -> None:
    talk = Conversation.ask("who?", images=[RED], answer="me").user("and?", images=[BLUE])
    batch = slotted([Conversation.ask("x?", images=[BLUE]), talk])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    index = batch["image_index"]
    assert index.shape == batch["input_ids"].shape
    assert [(index[1] == i).sum().item() for i in range(3)] == [0, 3, 3]
    assert torch.equal(index >= 0, batch["visual_mask"])


def test_several_images_without_slots_are_frames(processor: LlamaAdapterProcessor) -> None:
    talks = [
        Conversation.ask("who?", images=[RED, BLUE]),
        Conversation.ask("who?", images=[[BLUE, RED]]),
        Conversation.ask("who?", images=[BLUE]),
    ]
    pixels = processor(talks)["pixel_values"]
    assert pixels.shape == (3, 2, 3, 8, 8)
    assert_close(pixels[0, 0], pixels[1, 1], rtol=0, atol=0)
    assert_close(pixels[2, 0], pixels[2, 1], rtol=0, atol=0)
    with pytest.raises(PromptError, match=r"equally many frames a prompt, got \[2, 3\]"):
        processor([talks[0], Conversation.ask("who?", images=[RED] * 3)])


def test_bgr_swaps_red_and_blue_before_normalisation(
    image_processor: Any, toy_tokenizer: Any
) -> None:
    rgb = LlamaAdapterProcessor(image_processor, toy_tokenizer)
    bgr = LlamaAdapterProcessor(image_processor, toy_tokenizer, channel_order="bgr")
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    blue = Image.new("RGB", (8, 8), (0, 0, 255))
    swapped = bgr(Conversation.ask("who?", images=[red]))["pixel_values"]
    expected = rgb(Conversation.ask("who?", images=[blue]))["pixel_values"]
    assert_close(swapped, expected, rtol=0, atol=0)


def test_any_form_of_prompt_gives_the_same_batch(processor: LlamaAdapterProcessor) -> None:
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    content = [{"type": "image", "image": RED}, {"type": "text", "text": "who?"}]
    messages = [{"role": "user", "content": content}]
    open_place = [{"role": "user", "content": [{"type": "image"}, *content[1:]]}]
    text = processor.apply_chat_template(open_place, add_generation_prompt=True)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batches = [
        processor(Conversation.ask("who?", images=[RED])),
        processor("who?", images=buffer.getvalue()),
        processor(text="who?", images=[RED]),
        processor([open_place], images=[[RED]]),
        processor(messages),
        processor(text=text, images=[RED]),
        processor.apply_chat_template(messages, **options),
        processor.apply_chat_template([messages], **options),
        processor.apply_chat_template(open_place, images=RED, **options),
    ]
    for batch in batches[1:]:
        assert set(batch) == set(batches[0])
        for key, value in batches[0].items():
            assert_close(batch[key], value, rtol=0, atol=0)


def test_a_chat_template_result_keeps_its_slots(slotted: LlamaAdapterProcessor) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "who?"}]}]
    text = slotted.apply_chat_template(messages, add_generation_prompt=True)
    batch = slotted(text=text, images=RED)
    assert int(batch["visual_mask"].sum()) == 3
    with pytest.raises(PromptError, match="prompt 1 has 1 image placeholders, but 2 images"):
        slotted(text=text, images=[RED, BLUE])


@pytest.mark.parametrize("scope", ["all", "placeholders"])
def test_saved_and_loaded_it_is_the_same(
    scope: str, image_processor: Any, toy_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    processor = LlamaAdapterProcessor(
        image_processor,
        toy_tokenizer,
        template="toy",
        visual_scope=scope,
        placeholder_text=SLOT if scope == "placeholders" else None,
        channel_order="bgr",
    )
    processor.save_pretrained(tmp_path)
    talk = Conversation.ask("what is the star? xyz", images=[RED], context="a star")
    expected = processor(talk)
    for loaded in (
        LlamaAdapterProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is LlamaAdapterProcessor
        assert type(loaded.image_processor) is type(image_processor)
        assert loaded.to_dict() == processor.to_dict()
        batch = loaded(talk)
        for key, value in expected.items():
            assert_close(batch[key], value, rtol=0, atol=0)


def test_a_text_only_processor_is_saved_and_loaded(spaces_tokenizer: Any, tmp_path: Path) -> None:
    LlamaAdapterProcessor(None, spaces_tokenizer).save_pretrained(tmp_path)
    loaded = LlamaAdapterProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor is None
    assert loaded.tokenizer.chat_template == spaces_tokenizer.chat_template
    with pytest.raises(ConfigError, match="reads text alone"):
        loaded("who?", images=RED)


def test_a_directory_without_our_file_is_refused(toy_tokenizer: Any, tmp_path: Path) -> None:
    toy_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"processor_config\.json is missing.*save_pretrained"
    ):
        LlamaAdapterProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{]")
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        LlamaAdapterProcessor.from_pretrained(tmp_path)


def test_prompts_that_are_empty_or_too_long_are_refused(processor: LlamaAdapterProcessor) -> None:
    with pytest.raises(PromptError, match="user message 1 is empty"):
        processor("   ", images=RED)
    with pytest.raises(PromptError, match="empty list"):
        processor([])
    with pytest.raises(PromptError, match=r"prompt has 20\d\d tokens; the context holds 1024"):
        processor("star " * 2000)
    with pytest.raises(PromptError, match="the context holds 8"):
        processor("what is the color of the star?", max_length=8)
    batch = processor("star " * 2000, truncation=True)
    assert batch["input_ids"].shape == (1, 1024)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"visual_scope": "placeholders"}, "placeholder_text goes with visual_scope"),
        ({"placeholder_text": "1 2"}, "placeholder_text goes with visual_scope"),
        ({"visual_scope": "some"}, "got 'some'"),
        ({"channel_order": "grb"}, "got 'grb'"),
        ({"template": "none"}, "got 'none'"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, str], complaint: str, toy_tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        LlamaAdapterProcessor(None, toy_tokenizer, **options)


def test_unknown_options_and_mismatched_images_are_refused(
    processor: LlamaAdapterProcessor,
) -> None:
    with pytest.raises(ConfigError, match="unknown processor option 'paddding'"):
        processor("who?", paddding=True)
    with pytest.raises(PromptError, match="got 3 images for 2 prompts"):
        processor(["who?", "what?"], images=[RED] * 3)
    content = [{"type": "image"}, {"type": "text", "text": "who?"}]
    with pytest.raises(PromptError, match="messages leave 1 images to be handed in, got 0"):
        processor([{"role": "user", "content": content}])
