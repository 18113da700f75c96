"""The miniature world as training data."""

from __future__ import annotations

import pickle
import re

import pytest

from llama_adapter.miniature.captions import NEXT_TEXT, describe_tasks, parse_caption
from llama_adapter.miniature.scenes import COLORS, HELD_OUT, SHAPES
from llama_adapter.miniature.sources import (
    SOURCES_WITH_MINIATURES,
    MiniatureCaptionsOptions,
    MiniatureInstructionsOptions,
)
from llama_adapter.processing.images import load_image


def test_samples_follow_from_seed_and_number() -> None:
    for type_ in ("miniature_captions", "miniature_instructions"):
        kind = "caption" if "captions" in type_ else "instruction"
        options = SOURCES_WITH_MINIATURES[type_](count=20)
        source, again = options.open(kind), pickle.loads(pickle.dumps(options.open(kind)))
        other = SOURCES_WITH_MINIATURES[type_](count=20, seed=1).open(kind)
        texts = [[m.text for m in source[i].conversation.messages] for i in range(20)]
        assert texts == [[m.text for m in again[i].conversation.messages] for i in range(20)]
        assert texts != [[m.text for m in other[i].conversation.messages] for i in range(20)]


def test_captions_show_what_they_say() -> None:
    source = MiniatureCaptionsOptions(count=50, unnamed_color_share=0.0).open("caption")
    assert len(source) == 50
    said = 0
    for index in range(50):
        sample = source[index]
        (image,) = sample.conversation.images
        assert load_image(image).size == (64, 64)
        objects = parse_caption(sample.conversation.turns[-1].text)
        said += len(objects)
        assert not any((one.shape, one.color) in HELD_OUT for one in objects)
    assert said > 20


def test_instructions_are_text_and_sometimes_talks() -> None:
    source = MiniatureInstructionsOptions(count=60, talk_share=0.5).open("instruction")
    conversations = [source[i].conversation for i in range(60)]
    assert not any(c.images for c in conversations)
    assert 10 < sum(len(c.turns) > 2 for c in conversations) < 50


def test_there_is_nothing_behind_the_end() -> None:
    source = MiniatureInstructionsOptions(count=3).open("instruction")
    with pytest.raises(IndexError):
        source[3]


def test_captions_share_images_and_hold_them_out_together() -> None:
    source = MiniatureCaptionsOptions(count=12, images=5, text_share=0.0).open("caption")
    refs = [source[i].conversation.images[0] for i in range(12)]
    assert [ref.key for ref in refs[5:10]] == [ref.key for ref in refs[:5]]
    assert len({ref.key for ref in refs}) == 5
    assert load_image(refs[0]).tobytes() == load_image(refs[5]).tobytes()
    assert source.groups().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_nothing_is_said_of_colors_without_a_name() -> None:
    options = MiniatureCaptionsOptions(count=60, unnamed_color_share=1.0, text_share=0.0)
    source = options.open("caption")
    for index in range(60):
        said = re.findall(r"[a-z]+", source[index].conversation.turns[-1].text)
        assert said
        assert not set(said) & set(COLORS)


def test_a_text_next_to_an_image_is_what_is_described() -> None:
    source = MiniatureCaptionsOptions(count=60, text_share=1.0).open("caption")
    for index in range(60):
        conversation = source[index].conversation
        question, answer = conversation.turns
        assert "picture" not in question.text
        said = set(re.findall(r"[a-z]+", answer.text)) & {*SHAPES, *COLORS}
        assert said <= set(re.findall(r"[a-z]+", conversation.context))
        assert conversation.images


def test_images_come_with_descriptions_and_never_with_questions() -> None:
    source = MiniatureCaptionsOptions(count=200).open("caption")
    asked = {i for task in describe_tasks() for i in task.instructions}
    assert {source[i].conversation.turns[0].text for i in range(200)} <= asked


def test_a_distracting_passage_comes_first_and_the_last_one_counts() -> None:
    for share in (0.0, 1.0):
        options = MiniatureInstructionsOptions(count=60, talk_share=0.0, distractor_share=share)
        source = options.open("instruction")
        contexts = [source[i].conversation.context for i in range(60)]
        assert {NEXT_TEXT in c for c in contexts if c is not None} == {bool(share)}
