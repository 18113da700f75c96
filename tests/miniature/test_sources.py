"""The miniature world as training data."""

from __future__ import annotations

import pickle

import pytest

from llama_adapter.miniature.captions import parse_caption
from llama_adapter.miniature.scenes import HELD_OUT
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
    source = MiniatureCaptionsOptions(count=50).open("caption")
    assert len(source) == 50
    said = 0
    for index in range(50):
        sample = source[index]
        (image,) = sample.conversation.images
        assert load_image(image).size == (64, 64)
        things = parse_caption(sample.conversation.turns[-1].text)
        said += len(things)
        assert not any((thing.shape, thing.color) in HELD_OUT for thing in things)
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
