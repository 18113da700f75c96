"""Questions about captions as text, with short answers, made by rule from what the captions say."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from llama_adapter.data.caption_facts import Action, Facts, Thing, facts_of
from llama_adapter.data.caption_words import (
    IMPLIED,
    MASSES,
    NOUNS,
    PAIRS,
    PLURALS,
    RELATED,
    SPORTS,
)

HINTS = (
    "Answer with one word.",
    "Answer briefly.",
    "Answer the question using a single word or phrase.",
    "Short answer.",
)
"""What may follow a question to ask for a short answer."""
_SIMPLE_COLORS = ("black", "white", "red", "blue", "green", "yellow", "brown", "orange", "pink")
MOVEMENTS = (
    "running", "standing", "sitting", "jumping", "walking", "swimming", "sleeping", "climbing",
    "dancing",
)  # fmt: skip
"""Of which who does one does no other, as far as a caption goes."""
_WITH = {
    "riding": ("sitting", "playing"), "jumping": ("playing", "running"),
    "chasing": ("running", "playing"), "racing": ("running",), "catching": ("playing", "jumping"),
    "kicking": ("playing",), "throwing": ("playing",), "hitting": ("playing",),
    "swinging": ("playing",), "holding": ("standing",), "posing": ("standing", "smiling"),
    "looking": ("standing",), "watching": ("standing", "sitting"), "wearing": ("standing",),
    "laughing": ("smiling",), "lying": ("sleeping",), "laying": ("sleeping",),
    "resting": ("sleeping", "sitting"), "hiking": ("walking", "climbing"),
    "splashing": ("playing", "swimming"), "leaping": ("jumping", "playing"),
    "drinking": ("sitting", "standing"), "eating": ("sitting", "standing"),
    "reading": ("sitting",), "driving": ("sitting",),
}  # fmt: skip
"""What somebody who does the one may well do too."""
_EXCLUDING = frozenset({*MOVEMENTS, "riding", "lying", "laying", "skiing", "surfing", "driving"})

_CHOICES = ("animal", "vehicle", "person")
Asked = tuple[str, str]
"""A question and its answer."""


def ask_about(captions: Sequence[str], rng: random.Random, *, hint_share: float) -> Asked | None:
    """A question that these captions answer; None where the rules find none.

    Each kind of question is as likely as every other that the captions allow.
    """
    facts = [facts_of(caption) for caption in captions]
    for kind in rng.sample(KINDS, len(KINDS)):
        asked = list(kind(facts, rng))
        if asked:
            question, answer = rng.choice(asked)
            if rng.random() < hint_share:
                question = f"{question} {rng.choice(HINTS)}"
            return question, answer[:1].upper() + answer[1:]
    return None


def _things(facts: Sequence[Facts]) -> list[Thing]:
    return [thing for each in facts for thing in each.things]


def _actions(facts: Sequence[Facts]) -> list[Action]:
    return [action for each in facts for action in each.actions]


def _name(thing: Thing) -> str:
    return PLURALS[thing.noun] if thing.is_plural else thing.noun


def _with_article(noun: str) -> str:
    """`a dog`, `an umbrella`, `water`."""
    if noun in MASSES:
        return noun
    return f"an {noun}" if noun[0] in "aeio" or noun == "umbrella" else f"a {noun}"


def _be(thing: Thing) -> str:
    return "are" if thing.is_plural else "is"


def _only(things: Sequence[Thing], thing: Thing) -> bool:
    """Whether the captions give all things of this name one color."""
    return len({t.color for t in things if t.noun == thing.noun}) == 1


def _color(facts: Sequence[Facts], _: random.Random) -> Iterator[Asked]:
    for thing in _things(facts):
        if thing.color and _only(_things(facts), thing):
            yield f"What color {_be(thing)} the {_name(thing)}?", thing.color


def _number(facts: Sequence[Facts], _: random.Random) -> Iterator[Asked]:
    things = _things(facts)
    for thing in things:
        said = {t.number for t in things if t.noun == thing.noun}
        if thing.number and said == {thing.number} and thing.kind != "place":
            yield f"How many {PLURALS[thing.noun]} are there?", str(thing.number)


def _is_one_thing(things: Sequence[Thing], noun: str) -> bool:
    """Whether a caption with these things mentions it once, so that `the dog` is clear."""
    return sum(thing.noun == noun for thing in things) == 1


def _is_one_of_several(facts: Sequence[Facts], kind: str) -> bool:
    """Whether a caption names several things of a kind."""
    return any(len({t.noun for t in each.things if t.kind == kind}) > 1 for each in facts)


def _clear_actions(facts: Sequence[Facts]) -> Iterator[Action]:
    for each in facts:
        for action in each.actions:
            if _is_one_thing(each.things, action.who.noun):
                yield action


def _doing(facts: Sequence[Facts], rng: random.Random) -> Iterator[Asked]:
    for action in _clear_actions(facts):
        if action.verb != "wearing":
            who = _name(action.who)
            wording = rng.choice(
                ("What {be} the {who} doing?", "What activity {be} the {who} doing?")
            )
            yield wording.format(be=_be(action.who), who=who), action.short


def _object(facts: Sequence[Facts], _: random.Random) -> Iterator[Asked]:
    for action in _clear_actions(facts):
        if action.object is not None:
            noun = _name(action.object)
            shown = f"{action.object.color} {noun}" if action.object.color else noun
            yield f"What {_be(action.who)} the {_name(action.who)} {action.verb}?", shown
            if action.verb != "wearing":
                yield f"Who is {action.verb} the {noun}?", _name(action.who)


def _sport(facts: Sequence[Facts], _: random.Random) -> Iterator[Asked]:
    for action in _actions(facts):
        sport = action.short.rpartition(" ")[2]
        if sport in SPORTS:
            yield "What sport is being played?", sport
            yield "What game is this?", sport


def _which(facts: Sequence[Facts], _: random.Random) -> Iterator[Asked]:
    for thing in _things(facts):
        if thing.kind in _CHOICES and _is_one_of_several(facts, thing.kind):
            continue  # the others would be right as well
        match thing.kind:
            case "animal":
                yield "What animal is in the image?", _name(thing)
                yield "What kind of animal is this?", _name(thing)
            case "vehicle":
                yield "What vehicle is shown?", _name(thing)
            case "person":
                yield "Who is in the image?", _name(thing)
            case _:
                pass


def _where(facts: Sequence[Facts], _: random.Random) -> Iterator[Asked]:
    for each in facts:
        if each.place and each.things and each.things[0].kind in ("person", "animal", "vehicle"):
            thing = each.things[0]
            yield f"Where {_be(thing)} the {_name(thing)}?", each.place
            yield "Where is this?", each.place


def _either(facts: Sequence[Facts], rng: random.Random) -> Iterator[Asked]:
    """A choice between what is said and something else."""
    things = _things(facts)
    for thing in things:
        if thing.color in _SIMPLE_COLORS and _only(things, thing):
            other = rng.choice([c for c in _SIMPLE_COLORS if c != thing.color])
            pair = rng.sample([thing.color, other], 2)
            yield f"{_be(thing).title()} the {_name(thing)} {pair[0]} or {pair[1]}?", thing.color
        absent = _absent(facts, thing.kind)
        if thing.kind in ("animal", "vehicle") and absent:
            other = rng.choice(absent)
            pair = rng.sample([thing.noun, other], 2)
            first, second = map(_with_article, pair)
            yield f"Is it {first} or {second}?", thing.noun


def _absent(facts: Sequence[Facts], kind: str) -> list[str]:
    """Nouns of a kind that no caption says in these or other words."""
    words = {word for each in facts for word in each.words}
    said = {NOUNS[word][0] for word in words & NOUNS.keys()}
    said.update(*(IMPLIED[word] for word in words & IMPLIED.keys()))
    said.update(*(RELATED.get(noun, ()) for noun in tuple(said)))
    return sorted({noun for noun, k, _ in NOUNS.values() if k == kind} - said)


def _is_there(facts: Sequence[Facts], rng: random.Random) -> Iterator[Asked]:
    """As often yes as no, so that the question alone tells nothing."""
    for thing in _things(facts):
        absent = _absent(facts, thing.kind)
        if not absent:
            continue
        noun, answer = thing.noun, "yes"
        if rng.random() < 0.5:
            noun, answer = rng.choice(absent), "no"
        be, shown = ("Are", noun) if noun in PAIRS else ("Is", _with_article(noun))
        wordings = [
            f"{be} there {shown}?",
            f"{be} there {shown} in the image?",
            f"Do you see {shown}?",
        ]
        if thing.kind in _CHOICES:
            wordings.append(f"Are there any {PLURALS[noun]}?")
        yield rng.choice(wordings), answer


def _is_color(facts: Sequence[Facts], rng: random.Random) -> Iterator[Asked]:
    things = _things(facts)
    for thing in things:
        if thing.color in _SIMPLE_COLORS and _only(things, thing):
            color, answer = thing.color, "yes"
            if rng.random() < 0.5:
                color, answer = rng.choice([c for c in _SIMPLE_COLORS if c != color]), "no"
            yield f"{_be(thing).title()} the {_name(thing)} {color}?", answer


def _is_doing(facts: Sequence[Facts], rng: random.Random) -> Iterator[Asked]:
    said = {verb for each in facts for verb in each.verbs}
    if said.isdisjoint(_EXCLUDING):
        return  # a hat is worn while running, too
    said.update(*(_WITH.get(verb, ()) for verb in tuple(said)))
    absent = [verb for verb in MOVEMENTS if verb not in said]
    for action in _actions(facts) if absent else ():
        phrase, answer = action.short, "yes"
        if rng.random() < 0.5:
            phrase, answer = rng.choice(absent), "no"
        yield f"{_be(action.who).title()} the {_name(action.who)} {phrase}?", answer


KINDS: tuple[Callable[[Sequence[Facts], random.Random], Iterator[Asked]], ...] = (
    _color, _number, _doing, _object, _sport, _which, _where, _either,
    _is_there, _is_color, _is_doing,
)  # fmt: skip
"""Every kind of question."""
