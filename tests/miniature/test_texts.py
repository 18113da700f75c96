"""Texts of the miniature world say what is in the scene, and nothing held out leaks."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from llama_adapter.config import AdapterConfig
from llama_adapter.miniature.bundled import toy_processor
from llama_adapter.miniature.captions import (
    CAPTION_TASK,
    NEXT_TEXT,
    describe_tasks,
    parse_caption,
    passage,
)
from llama_adapter.miniature.instructions import sample_instruction, sample_talk
from llama_adapter.miniature.questions import KEYWORDS, QUESTION_TYPES, ask, key_positions
from llama_adapter.miniature.scenes import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    sample_scene,
)
from llama_adapter.processing.templates import TEMPLATES

SCENE = Scene(
    objects=(
        SceneObject(shape="star", color="red", size="small", place="north"),
        SceneObject(shape="circle", color="orange", size="large", place="southeast"),
    ),
    sign="42",
)


def questions(kind: str, count: int = 200, *, split: Split = Split.TEST):
    rng = random.Random(kind)
    while count:
        scene = sample_scene(rng, split=split)
        asked = ask(scene, rng, kind)
        if asked is not None:
            count -= 1
            yield scene, asked


def test_the_standard_caption_states_everything_in_reading_order():
    assert CAPTION_TASK.write(SCENE, random.Random(0)) == (
        "a small red star in the north and a large orange circle in the southeast."
    )
    assert describe_tasks()[0] is CAPTION_TASK


def test_descriptions_are_at_least_six_tasks_with_distinct_instructions():
    wordings = [text for task in describe_tasks() for text in task.instructions]
    assert len(describe_tasks()) >= 6
    assert len(set(wordings)) == len(wordings)


@pytest.mark.parametrize("name", ["caption", "tags", "facts", "places"])
def test_a_full_description_is_read_back_exactly(name):
    rng = random.Random(0)
    task = next(task for task in describe_tasks() if task.name == name)
    for _ in range(200):
        scene = sample_scene(rng, split=rng.choice(list(Split)))
        assert parse_caption(task.write(scene, rng)) == list(scene.objects)


def test_a_contradictory_or_partial_caption_yields_no_thing():
    assert parse_caption("a red star.") == []
    assert parse_caption("a small red blue star in the north.") == []
    assert parse_caption("") == []


def test_a_passage_names_every_attribute_of_every_thing_and_the_sign():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng, split=Split.TEST)
        words = set(re.findall(r"\w+", passage(scene, rng)))
        for one in scene.objects:
            assert {one.shape, one.color, one.size, one.place} <= words
        assert scene.sign is None or scene.sign in words


def test_answers_agree_with_the_scene():
    for scene, asked in itertools.chain(questions("color"), questions("size")):
        shape = next(s for s in SHAPES if s in asked.question)
        one = next(t for t in scene.objects if t.shape == shape)
        value = one.color if asked.kind == "color" else one.size
        assert asked.answer == f"the {shape} is {value}."
    for scene, asked in questions("count"):
        assert str(["zero", "one", "two", "three"][len(scene.objects)]) in asked.answer
    for scene, asked in questions("sign"):
        assert asked.answer == f"the sign says {scene.sign}."
    for scene, asked in questions("at"):
        place = asked.answer.rstrip(".").split()[-1]
        one = next(t for t in scene.objects if t.place == place)
        assert asked.answer == f"a {one.shape} is in the {place}."


def test_existence_is_balanced_and_true():
    yes = 0
    for scene, asked in questions("exist", 600):
        color, shape = asked.question.rstrip("?").split()[-2:]
        exists = any((t.color, t.shape) == (color, shape) for t in scene.objects)
        assert asked.answer.startswith("yes" if exists else "no")
        yes += exists
    assert 0.42 < yes / 600 < 0.58


def test_comparison_is_balanced_and_true():
    yes = 0
    for scene, asked in questions("compare", 600):
        a, b = (w for w in re.findall(r"\w+", asked.question) if w in SHAPES)
        size = {t.shape: t.size for t in scene.objects}
        larger = (size[a], size[b]) == ("large", "small")
        assert asked.answer.startswith("yes" if larger else "no")
        yes += larger
    assert 0.42 < yes / 600 < 0.58


def test_a_relation_question_has_one_answer():
    beyond = {
        "left": ("column", -1),
        "right": ("column", 1),
        "above": ("row", -1),
        "below": ("row", 1),
    }
    for scene, asked in questions("relation"):
        axis, sign = next(beyond[w] for w in re.findall(r"\w+", asked.question) if w in beyond)
        shape = next(s for s in SHAPES if s in asked.question)
        one = next(t for t in scene.objects if t.shape == shape)
        there = [
            t.shape for t in scene.objects if sign * (getattr(t, axis) - getattr(one, axis)) > 0
        ]
        assert there == [asked.keywords[0].word]


@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_every_question_has_a_keyword_it_does_not_give_away(kind):
    for _, asked in questions(kind, 100):
        assert asked.keywords == key_positions(asked.question, asked.answer) != ()
        for keyword in asked.keywords:
            assert asked.answer[keyword.start : keyword.end] == keyword.word
            assert keyword.word in keyword.alternatives == KEYWORDS[keyword.category]
            assert keyword.word not in re.findall(r"\w+", asked.question)


def test_one_word_answers_are_the_keyword():
    rng = random.Random(0)
    asked = ask(SCENE, rng, "color", one_word=1.0)
    assert asked is not None
    assert asked.question.startswith("in one word, ")
    assert asked.answer in {"red.", "orange."}


def test_scenes_without_a_sign_or_a_second_thing_allow_no_such_question():
    lonely = Scene(objects=SCENE.objects[:1])
    rng = random.Random(0)
    assert [ask(lonely, rng, kind) for kind in ("sign", "relation", "compare")] == [None] * 3


def held_out_pairs(text: str) -> list[tuple[str, str]]:
    """Held-out shape and color in one clause about one thing."""
    pairs = []
    for clause in re.split(r"[.,?:]|\band\b", text):
        words = clause.split()
        shapes = [w for w in words if w in SHAPES]
        colors = [w for w in words if w in COLORS]
        pairs += [(s, c) for s in shapes for c in colors if (s, c) in HELD_OUT]
    return pairs


def test_no_training_text_contains_a_held_out_combination():
    rng = random.Random(0)
    for _ in range(300):
        talk = sample_talk(rng)
        instruction = sample_instruction(rng)
        texts = [talk.context, *itertools.chain(*talk.turns)]
        texts += [instruction.instruction, instruction.context or "", instruction.answer]
        for text in texts:
            assert held_out_pairs(text) == []


def test_instructions_hold_questions_descriptions_and_knowledge():
    rng = random.Random(0)
    kinds = {sample_instruction(rng).kind for _ in range(1000)}
    assert kinds == {*QUESTION_TYPES, "describe", "knowledge"}
    test_split = sample_instruction(rng, split=Split.TEST)
    assert test_split.instruction
    assert test_split.answer


def test_texts_depend_on_their_seed_alone():
    assert sample_talk(random.Random(3)) == sample_talk(random.Random(3))
    assert sample_instruction(random.Random(3)) == sample_instruction(random.Random(3))


def test_places_are_named_as_in_scenes():
    rng = random.Random(0)
    asked = {ask(sample_scene(rng), rng, "where").keywords[0].word for _ in range(300)}
    assert asked == set(PLACES)


def test_what_is_before_a_text_with_an_image_is_what_the_bases_read():
    tokenizer = toy_processor(AdapterConfig(visual_scope="all")).tokenizer
    ids = {
        tuple(tokenizer(words, add_special_tokens=False).input_ids)
        for words in (NEXT_TEXT, TEMPLATES["toy"].after_placeholders)
    }
    assert len(ids) == 1
    assert tokenizer.unk_token_id not in ids.pop()
