"""Captions made into text instructions and into many ways to describe an image, by rule."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.data.files import open_source, write_pictures

from llama_adapter.data import SOURCES
from llama_adapter.data.caption_facts import facts_of, sentence_of
from llama_adapter.data.caption_forms import FORMS, write_form
from llama_adapter.data.caption_questions import MOVEMENTS, ask_about
from llama_adapter.data.caption_words import ING_FORMS
from llama_adapter.errors import DataError
from llama_adapter.training.recipe import SourceSection
from llama_adapter.training.streams import choose_held_out
from llama_adapter.training.streams import open_source as open_streams

CAPTIONS = [
    "Two brown dogs are running through the grass .",
    "A man in a red shirt throws a yellow ball .",
]


def write_captions(folder: Path) -> Path:
    names = write_pictures(folder, 3)
    records = [
        {"image": names[0], "captions": CAPTIONS, "split": "train"},
        {"image": names[1], "captions": ["A white cat sleeps on a bed ."], "split": "train"},
        {"image": names[2], "captions": ["A boat on the lake ."], "split": "test"},
    ]
    path = folder / "captions.json"
    path.write_text(json.dumps(records))
    return path


def test_what_a_caption_says() -> None:
    facts = facts_of("Two brown dogs are running through the green grass .")
    dog, grass = facts.things
    assert (dog.noun, dog.color, dog.number, dog.phrase) == ("dog", "brown", 2, "two brown dogs")
    assert (grass.noun, grass.color, grass.number) == ("grass", "green", None)
    assert facts.place == "through the green grass"
    [action] = facts.actions
    assert action.short == "running"
    assert action.phrase == "running through the green grass"


@pytest.mark.parametrize(
    ("caption", "short"),
    [
        ("A boy is riding a red bike .", "riding a red bike"),
        ("Men play soccer on a field .", "playing soccer"),
        ("A girl is holding .", None),
        ("A building with a railing .", None),
    ],
)
def test_what_somebody_does(caption: str, short: str | None) -> None:
    assert [action.short for action in facts_of(caption).actions] == ([short] if short else [])


@pytest.mark.parametrize(
    ("caption", "color"),
    [
        ("a black and white dog", "black and white"),
        ("a blond haired girl", None),
        ("a red and a blue ball", "blue"),
        ("a dog", None),
    ],
)
def test_the_color_of_a_thing(caption: str, color: str | None) -> None:
    assert facts_of(caption).things[-1].color == color


def test_a_caption_as_a_sentence() -> None:
    assert sentence_of("a man 's dog runs , fast .") == "A man's dog runs, fast."


def test_questions_are_answered_by_the_captions() -> None:
    asked = {ask_about(CAPTIONS, random.Random(n), hint_share=0.0) for n in range(400)}
    assert {
        ("What color are the dogs?", "Brown"),
        ("How many dogs are there?", "2"),
        ("What is the man throwing?", "Yellow ball"),
        ("Who is throwing the ball?", "Man"),
        ("What are the dogs doing?", "Running"),
        ("Where are the dogs?", "Through the grass"),
        ("What animal is in the image?", "Dogs"),
    } <= asked
    assert ("Is there a dog?", "No") not in asked
    assert ("Is there a cat?", "Yes") not in asked


def test_yes_and_no_are_as_frequent() -> None:
    given = [ask_about(CAPTIONS, random.Random(n), hint_share=0.0) for n in range(3000)]
    answers = [answer for _, answer in filter(None, given)]
    share = answers.count("Yes") / (answers.count("Yes") + answers.count("No"))
    assert 0.45 < share < 0.55


def asked_of(*captions: str, count: int = 400) -> set[tuple[str, str]]:
    return {
        found
        for n in range(count)
        if (found := ask_about(captions, random.Random(n), hint_share=0.0)) is not None
    }


def denied_by(*captions: str, start: str = "Is there") -> set[str]:
    """The last words of questions that are answered with `no`."""
    asked = asked_of(*captions, count=3000)
    return {
        question.removesuffix("?").removesuffix(" in the image").split()[-1]
        for question, answer in asked
        if question.startswith(start) and answer == "No"
    }


@pytest.mark.parametrize(
    "caption",
    [
        "A brown dog runs after a black dog .",
        "A poodle chases another dog .",
        "Two dogs and a puppy run .",
        "A man with a hat and two people walk .",
    ],
)
def test_things_of_which_others_are_mentioned_are_not_counted(caption: str) -> None:
    wrong = ("How many dog", "How many people", "How many men", "How many poodle")
    assert not [question for question, _ in asked_of(caption) if question.startswith(wrong)]
    assert write_form([caption], random.Random(0), subject="image", caption_weight=1.0)
    assert ("How many dogs are there?", "2") in asked_of("Two dogs run .")


def test_one_of_two_is_not_the_one() -> None:
    asked = asked_of("A brown dog runs after a black dog .")
    assert not [question for question, _ in asked if question.startswith("What is the dog")]


@pytest.mark.parametrize(
    ("caption", "open_"),
    [
        ("A woman sits in a kayak near a puppy .", {"person", "lady", "dog", "boat", "kayak"}),
        ("A cyclist rides past a car .", {"bike", "bicycle"}),
        ("A skateboarder jumps over a car .", {"skateboard"}),
        ("A boy is skateboarding past a bus .", {"skateboard"}),
        ("A man is surfing near a kayak .", {"surfboard"}),
        ("A man plays baseball and hits a ball .", {"bat"}),
        ("A mountain bike on a field .", {"mountain"}),
    ],
)
def test_no_is_said_of_nothing_that_other_words_say(caption: str, open_: set[str]) -> None:
    denied = denied_by(caption)
    assert len(denied) > 5
    assert not open_ & denied


@pytest.mark.parametrize("verb", MOVEMENTS)
def test_no_is_said_of_nothing_that_is_done(verb: str) -> None:
    forms = [form for form, ing in ING_FORMS.items() if ing == verb]
    assert len(forms) > 1, "of one and of many"
    for form in (verb, *forms):
        denied = denied_by(f"A dog is walking and a girl and two boys {form} .", start="Is the dog")
        assert denied
        assert verb not in denied


def test_what_goes_with_what_is_done_is_not_denied() -> None:
    caption = "A man is holding something while he rides a bike ."
    denied = denied_by(caption, start="Is the man")
    assert "swimming" in denied
    assert not {"riding", "holding", "sitting", "standing"} & denied
    assert not denied_by("A man wearing a hat .", start="Is the man")


@pytest.mark.parametrize(
    ("caption", "who"),
    [
        ("A boy with a dog is running .", []),
        ("A man on a horse is waving .", []),
        ("A girl riding a horse is smiling .", ["girl"]),
        ("A group of people is dancing .", ["person"]),
        ("A dog is running towards a man .", ["dog"]),
        ("A jockey on a horse is waving .", []),
        ("A cowboy riding a horse is holding a rope .", []),
        ("A man in front of a horse is waving .", []),
    ],
)
def test_who_acts_is_clear_or_not_said(caption: str, who: list[str]) -> None:
    assert [action.who.noun for action in facts_of(caption).actions] == who


def test_which_of_two_is_not_asked() -> None:
    asked = asked_of("A dog looks at a cat .", "A man and a woman sit .")
    assert not [q for q, _ in asked if q.startswith(("What animal", "Who is in the image"))]
    assert ("Who is in the image?", "Man") in asked_of("A man sits .", "A guy sits .")


def test_articles_fit_their_nouns() -> None:
    asked = {q for q, _ in asked_of("An elephant with glasses stands in water .", count=1500)}
    assert {"Is there an elephant?", "Are there glasses?", "Is there water?"} <= asked
    assert not [
        question for question in asked if " a elephant" in question or " a water" in question
    ]


def test_no_question_where_the_rules_understand_nothing() -> None:
    assert ask_about(["Gorgeous !"], random.Random(0), hint_share=0.0) is None


def test_every_form_is_written_from_the_captions() -> None:
    written = {name: form.write(CAPTIONS[:1], random.Random(0)) for name, form in FORMS.items()}
    assert written == {
        "sentence": "Two brown dogs are running through the grass.",
        "detail": None,  # one caption is no two sentences
        "main": "Two brown dogs",
        "things": "Dog, grass",
        "place": "Through the grass",
        "doing": "Running through the grass",
        "colors": "Brown dog",
        "numbers": "Two dogs",
    }


def test_a_form_that_captions_do_not_say_becomes_a_sentence() -> None:
    answers = {
        write_form(["Gorgeous ."], random.Random(n), subject="image", caption_weight=1.0)[1]
        for n in range(30)
    }
    assert answers == {"Gorgeous."}


def test_texts_stand_as_context_and_images_are_not_looked_for(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    for image in tmp_path.glob("*.png"):
        image.unlink()
    source = open_source("caption_questions", "instruction", path=path, split="train", per_image=9)
    assert len(source) == 18
    assert source.groups().tolist() == [0] * 9 + [1] * 9
    for sample in map(source.__getitem__, range(18)):
        assert sample.conversation.context
        assert not sample.conversation.images
    assert source[3] == source[3]


def test_an_image_that_a_file_lists_several_times_is_held_out_whole(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6)
    records = [
        {"image": name, "caption": f"{text} ."} for text in ("a dog", "a cat") for name in names
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(records))
    for type_, options in (("coco_captions", {"images": tmp_path}), ("caption_questions", {})):
        source = open_source(type_, "caption", path=path, **options)
        images = [index * 12 // len(source) % 6 for index in range(len(source))]
        held_out = set(choose_held_out(source, 3).tolist())
        kept = {image for index, image in enumerate(images) if index not in held_out}
        assert kept.isdisjoint(images[index] for index in held_out)


def test_images_are_described_and_never_asked_about(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    source = open_source(
        "caption_tasks", "caption", path=path, images=tmp_path, split="train", per_image=60
    )
    asked = {
        w.format(subject=s) for f in FORMS.values() for w in f.wordings for s in ("image", "text")
    }
    contexts = 0
    for sample in map(source.__getitem__, range(len(source))):
        assert len(sample.conversation.images) == 1
        assert sample.conversation.messages[0].text in asked
        contexts += sample.conversation.context is not None
    assert 0 < contexts < 40


def test_a_text_next_to_an_image_is_of_another_image(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    source = open_source(
        "caption_tasks", "caption", path=path, images=tmp_path, split="train", text_share=1.0
    )
    of_first = [source[n].conversation for n in range(5)]
    assert {c.context for c in of_first} == {"Text: A white cat sleeps on a bed."}


def test_no_text_is_of_an_image_that_is_held_out(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6)
    nouns = ("dog", "cat", "horse", "cow", "sheep", "bird")
    records = [
        {"image": name, "captions": [f"a {noun} ."]}
        for name, noun in zip(names, nouns, strict=True)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(records))
    section = {"held_out": 4, "path": str(path), "text_share": 1.0, "per_image": 20}
    recipes = {
        ("caption_tasks", "caption"): {**section, "images": str(tmp_path)},
        ("caption_questions", "instruction"): section,
    }
    for (type_, kind), options in recipes.items():
        described = SourceSection.model_validate({"type": type_, **options})
        source, held_out = open_streams(described, kind, types=SOURCES)
        apart = {nouns[index // 20] for index in held_out}
        assert len(apart) == 1
        shown = [source[n].conversation.context or "" for n in range(len(source))]
        lent = {
            noun
            for n, text in enumerate(shown)
            for noun in nouns
            if noun in text.lower() and noun != nouns[n // 20]
        }
        assert lent == set(nouns) - apart
        plain = {name: value for name, value in options.items() if name != "held_out"}
        assert open_source(type_, kind, **plain).fingerprint() != source.fingerprint()


def test_questions_next_to_an_image_are_about_the_text_alone(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    options = {"path": path, "images": tmp_path, "split": "train", "per_image": 60}
    plain = open_source("caption_tasks", "caption", **options, text_share=1.0)
    asking = open_source("caption_tasks", "caption", **options, text_share=1.0, question_share=1.0)
    forms = {w.format(subject="image") for f in FORMS.values() for w in f.wordings}
    about_text = [
        c.messages[0].text
        for c in (asking[n].conversation for n in range(60))
        if c.messages[0].text not in forms
    ]
    assert about_text
    assert all(text.startswith("According to the text: ") for text in about_text)
    assert plain.fingerprint() != asking.fingerprint()


def test_other_options_have_another_fingerprint(tmp_path: Path) -> None:
    options = {"path": write_captions(tmp_path), "images": tmp_path, "split": "train"}
    changes: list[dict[str, Any]] = [
        {}, {"question_share": 0.05}, {"question_share": 0.5}, {"per_image": 50},
        {"answers": 10}, {"per_image": 50, "answers": 10}, {"text_share": 0.2},
        {"captions_share": 0.5}, {"captions_share": 0.05},
    ]  # fmt: skip
    found = [
        open_source("caption_tasks", "caption", **options, **change).fingerprint()
        for change in changes
    ]
    assert len(set(found)) == len(changes)


def test_an_invalid_caption_is_one_refused_sample(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"image": "a.png", "captions": [3]}]))
    source = open_source("caption_questions", "instruction", path=path)
    with pytest.raises(DataError, match=r"captions.json.*caption must be text, found 3"):
        source[0]


def test_the_seed_and_the_file_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write_captions(tmp_path)
    prints = {
        open_source("caption_questions", "instruction", path=path, seed=seed).fingerprint()
        for seed in (0, 1)
    }
    assert len(prints) == 2
