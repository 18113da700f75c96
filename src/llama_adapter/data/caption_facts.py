"""What a caption says, read by rule: things with color and number, what is done, and where.

English and deliberately plain: a caption that the rules do not understand yields fewer facts, and
what they yield is said in the caption.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llama_adapter.data.caption_words import (
    ACCOMPANIES,
    ADJECTIVES,
    ARTICLES,
    COLORS,
    GROUPS,
    ING_FORMS,
    NOT_VERBS,
    NOUNS,
    NUMBERS,
    PREPOSITIONS,
    RELATED,
    SINGULAR,
    SPORTS,
    TAKES_OBJECT,
    UNCOUNTED,
)

_MOST_MODIFIERS = 5
_MOST_PHRASE = 6
_OTHERS = frozenset({"another", "other", "others"})
_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A noun of the caption with what precedes it."""

    noun: str
    """The singular."""
    kind: str
    phrase: str
    """As the caption says it: `two brown dogs`."""
    color: str | None
    number: int | None
    """None: not said, or of one of several mentions, which may be other things or the same."""
    is_plural: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """What somebody or something is doing."""

    who: Thing
    verb: str
    """In its -ing form."""
    object: Thing | None
    """What it is done to, where it follows at once."""
    short: str
    """The verb, with its object where one says little without: `riding a bike`."""
    phrase: str
    """With the words that follow: `running through the grass`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What one caption says."""

    things: tuple[Thing, ...]
    actions: tuple[Action, ...]
    place: str | None
    """`in the water`."""
    words: frozenset[str]
    """All of the caption's."""

    @property
    def verbs(self) -> frozenset[str]:
        """All that is done, in -ing form, also where it is not clear by whom to what."""
        return frozenset(verb for word in self.words if (verb := _verb(word)))


def sentence_of(caption: str) -> str:
    """A caption as a sentence: first letter upper case, a full stop, no stray spaces.

    >>> sentence_of("two dogs run , and play .")
    'Two dogs run, and play.'
    """
    text = re.sub(r"\s+([.,!?;]|'s\b)", r"\1", " ".join(caption.split())).rstrip(" .,;")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".")


def facts_of(caption: str) -> Facts:
    """What the caption says, in its order."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)*|[.,;]", caption.lower())
    spans = _counted(words, list(_noun_phrases(words)))
    return Facts(
        things=tuple(thing for _, _, thing in spans),
        actions=tuple(_actions(words, spans)),
        place=_place(words, spans),
        words=frozenset(words),
    )


_Span = tuple[int, int, Thing]


def _noun_phrases(words: Sequence[str]) -> Iterator[_Span]:
    for end, word in enumerate(words):
        if word not in NOUNS or (end + 1 < len(words) and words[end + 1] in NOUNS):
            continue  # of two nouns in a row the second names the thing
        start = end
        while start > 0 and end - start < _MOST_MODIFIERS and _modifies(words, start - 1):
            start -= 1
        opened = start > 0 and (words[start - 1] in ARTICLES or words[start - 1] in NUMBERS)
        first = start - 1 if opened else start
        noun, kind, is_plural = NOUNS[word]
        before = words[start:end]
        colors = [w for w in before if w in COLORS]
        yield (
            first,
            end,
            Thing(
                noun=noun,
                kind=kind,
                phrase=" ".join(words[first : end + 1]),
                color=_color(before, colors),
                number=_number(words[first] if opened else "", is_plural, word),
                is_plural=is_plural,
            ),
        )


def _counted(words: Sequence[str], spans: Sequence[_Span]) -> list[_Span]:
    """Without the number of things of which others are mentioned: `a dog runs after a puppy`."""
    nouns = Counter(thing.noun for _, _, thing in spans)
    has_others = not _OTHERS.isdisjoint(words)

    def is_open(noun: str) -> bool:
        return has_others or nouns[noun] > 1 or not RELATED.get(noun, _NONE).isdisjoint(nouns)

    return [
        (start, end, replace(thing, number=None) if is_open(thing.noun) else thing)
        for start, end, thing in spans
    ]


def _modifies(words: Sequence[str], at: int) -> bool:
    word = words[at]
    joins = word == "and" and at > 0 and words[at - 1] in COLORS and words[at + 1] in COLORS
    return joins or word in COLORS or word in ADJECTIVES or word in SPORTS


def _color(before: Sequence[str], colors: Sequence[str]) -> str | None:
    """`black and white`, or the one color; None where it belongs to something else."""
    if not colors or "haired" in before or len(colors) > 2:
        return None
    if len(colors) == 2:
        return " and ".join(colors) if "and" in before else None
    return colors[0]


def _number(opening: str, is_plural: bool, word: str) -> int | None:
    if opening in NUMBERS:
        return NUMBERS[opening]
    return 1 if opening in SINGULAR and not is_plural and word not in UNCOUNTED else None


def _actions(words: Sequence[str], spans: Sequence[_Span]) -> Iterator[Action]:
    for at, word in enumerate(words):
        verb = _verb(word)
        if verb is None:
            continue
        # "a jumping dog": the verb describes a noun that follows at once
        if at > 0 and (words[at - 1] in ARTICLES or words[at - 1] in NUMBERS):
            continue
        who = _acting(words, spans, at)
        if who is None:
            continue
        object_, end = _object(words, spans, at)
        takes = verb in TAKES_OBJECT and end > at
        if verb in TAKES_OBJECT and not takes and verb != "playing":
            continue  # its object is a word that is not known
        short = " ".join((verb, *words[at + 1 : end + 1])) if takes else verb
        yield Action(
            who=who,
            verb=verb,
            object=object_ if takes else None,
            short=short,
            phrase=" ".join((verb, *_following(words, at))),
        )


def _verb(word: str) -> str | None:
    verb = ING_FORMS.get(word, word)
    is_one = verb.endswith("ing") and verb not in NOT_VERBS and verb not in NOUNS and len(verb) > 4
    return verb if is_one else None


def _acting(words: Sequence[str], spans: Sequence[_Span], at: int) -> Thing | None:
    """Who does what the verb says: the person or animal before it.

    None where that one is ridden, held or stood next to: `a jockey on a horse is waving` leaves
    open who waves.
    """
    before = [
        (start, thing)
        for start, end, thing in spans
        if end < at and thing.kind in ("person", "animal")
    ]
    if not before:
        return None
    start, thing = before[-1]
    word, earlier = (words[start - 1] if start > 0 else ""), (words[start - 2] if start > 1 else "")
    is_part = word == "of" and earlier not in GROUPS
    return None if is_part or word in ACCOMPANIES or _verb(word) else thing


def _object(words: Sequence[str], spans: Sequence[_Span], at: int) -> tuple[Thing | None, int]:
    """What follows the verb at once, and its last word; no thing for a sport."""
    if at + 1 < len(words) and words[at + 1] in SPORTS:
        follows = at + 2 < len(words) and words[at + 2] in NOUNS
        if not follows:
            return None, at + 1
    return next(((thing, end) for start, end, thing in spans if start == at + 1), (None, at))


def _following(words: Sequence[str], at: int) -> list[str]:
    """Words after the verb, up to where the phrase ends; whole noun phrases only."""
    found: list[str] = []
    for word in words[at + 1 : at + 1 + _MOST_PHRASE]:
        ends = word in {".", ",", ";", "while", "as", "and", "that", "with", "wearing"}
        if ends or word.endswith("ing") or word in ING_FORMS:
            break
        found.append(word)
    while found and found[-1] not in NOUNS and found[-1] not in SPORTS:
        found.pop()
    return found


def _place(words: Sequence[str], spans: Sequence[_Span]) -> str | None:
    for start, end, thing in spans:
        if thing.kind == "place" and start > 0 and words[start - 1] in PREPOSITIONS:
            return " ".join(words[start - 1 : end + 1])
    return None
