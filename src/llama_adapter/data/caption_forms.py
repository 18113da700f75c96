"""Ways to describe an image, each written by rule from its captions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llama_adapter.data.caption_facts import Facts, facts_of, sentence_of
from llama_adapter.data.caption_words import NUMBERS, PLURALS

_MOST_THINGS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One way to describe."""

    wordings: tuple[str, ...]
    """What asks for it; `{subject}` is `image`, or `text`."""
    write: Callable[[Sequence[str], random.Random], str | None]
    """From an image's captions to the description; None where they do not say it."""


def _sentence(captions: Sequence[str], rng: random.Random) -> str:
    return sentence_of(rng.choice(captions))


def _detail(captions: Sequence[str], rng: random.Random) -> str | None:
    if len(captions) < 2:
        return None
    return " ".join(map(sentence_of, rng.sample(list(captions), 2)))


def _main(captions: Sequence[str], rng: random.Random) -> str | None:
    facts = facts_of(rng.choice(captions))
    return _upper(facts.things[0].phrase) if facts.things else None


def _things(captions: Sequence[str], _: random.Random) -> str | None:
    """The things that most captions name come first."""
    nouns = Counter(
        noun for caption in captions for noun in {t.noun: 0 for t in facts_of(caption).things}
    )
    return _upper(", ".join(noun for noun, _ in nouns.most_common(_MOST_THINGS))) or None


def _place(captions: Sequence[str], rng: random.Random) -> str | None:
    return _one_of([facts.place for facts in _all(captions) if facts.place], rng)


def _doing(captions: Sequence[str], rng: random.Random) -> str | None:
    phrases = [a.phrase for facts in _all(captions) for a in facts.actions if a.verb != "wearing"]
    return _one_of(phrases, rng)


def _colors(captions: Sequence[str], rng: random.Random) -> str | None:
    """The colored things of one caption."""
    found = [
        ", ".join(dict.fromkeys(f"{t.color} {t.noun}" for t in facts.things if t.color))
        for facts in _all(captions)
    ]
    return _one_of([each for each in found if each], rng)


def _numbers(captions: Sequence[str], rng: random.Random) -> str | None:
    """The persons, animals and vehicles of one caption, counted."""
    words = {number: word for word, number in NUMBERS.items()}
    found = []
    for facts in _all(captions):
        counted = [
            f"{words[t.number]} {t.noun if t.number == 1 else PLURALS[t.noun]}"
            for t in facts.things
            if t.number and t.kind in ("person", "animal", "vehicle")
        ]
        found += [", ".join(counted)] if counted else []
    return _one_of(found, rng)


def _all(captions: Sequence[str]) -> list[Facts]:
    return [facts_of(caption) for caption in captions]


def _one_of(found: Sequence[str], rng: random.Random) -> str | None:
    return _upper(rng.choice(found)) if found else None


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


SENTENCE = Form(
    wordings=(
        "Describe the {subject} in one sentence.",
        "Write a short caption for this {subject}.",
        "Describe this {subject} briefly.",
        "Repeat the description.",
        "Sum up the {subject} in one short sentence.",
        "Describe the {subject}.",
        "Generate caption of this {subject}",  # what the task coco-caption asks
    ),
    write=_sentence,
)
FORMS: Mapping[str, Form] = {
    "sentence": SENTENCE,
    "detail": Form(
        wordings=("Describe the {subject} in two sentences.", "Describe the {subject} in detail."),
        write=_detail,
    ),
    "main": Form(
        wordings=("Name only the main thing of the {subject}.", "Only the main subject, please."),
        write=_main,
    ),
    "things": Form(
        wordings=("List the things in the {subject}.", "Write tags for this {subject}."),
        write=_things,
    ),
    "place": Form(
        wordings=("Describe only the place.", "Say only where the {subject} is set."),
        write=_place,
    ),
    "doing": Form(
        wordings=("Describe only what is going on.", "Name only the activity in the {subject}."),
        write=_doing,
    ),
    "colors": Form(
        wordings=("List the things with their colors.", "Describe only the colors."),
        write=_colors,
    ),
    "numbers": Form(
        wordings=("List who is in the {subject}, with numbers.", "Count what is in the {subject}."),
        write=_numbers,
    ),
}
"""Every form by its name."""


def write_form(
    captions: Sequence[str], rng: random.Random, *, subject: str, caption_weight: float
) -> tuple[str, str]:
    """What asks for one of the forms, and the description."""
    weights = [caption_weight if form is SENTENCE else 1.0 for form in FORMS.values()]
    form = rng.choices(list(FORMS.values()), weights)[0]
    answer = form.write(captions, rng)
    if answer is None:
        form, answer = SENTENCE, _sentence(captions, rng)
    return rng.choice(form.wordings).format(subject=subject), answer
