"""Reading answers and judges' replies by pattern; None says that there is nothing to read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = r"-?\d+(?:\.\d+)?"
_VERDICT = re.compile(
    r"""(?:['"]?(?:pred|verdict|correct|prediction)['"]?\s*[:=]\s*['"]?)(yes|no)\b""", re.I
)
_SCORE = re.compile(
    rf"""['"]?\b(?:score|rating|grade)['"]?\s*(?:is|[:=])\s*['"]?({_NUMBER})""", re.I
)
_ALONE = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*\d+)?\s*\.?\s*")
_MARKUP = r"[\s*_`#>(\[]*"
_OUT_OF = r"(?:\s*(?:/|out of)\s*10\b)?"
_BETWEEN = r"(?:[\s*_`]*(?:[,;&|]|\band\b|\bvs\b\.?)[\s*_`]*|[^\S\n]+)"
_FIRST_LINE = re.compile(
    rf"{_MARKUP}(?:scores?{_MARKUP}:{_MARKUP})?({_NUMBER}){_OUT_OF}{_BETWEEN}"
    rf"({_NUMBER}){_OUT_OF}[\s*_`)\].,;]*",
    re.I,
)
# (3, 4) is a point unless the sentence speaks of scores
_TUPLE = re.compile(
    rf"\b(?:scores?|ratings?)\b[^\n.?!\d]{{0,60}}[(\[]\s*({_NUMBER}){_OUT_OF}\s*,"
    rf"\s*({_NUMBER}){_OUT_OF}\s*[)\]]",
    re.I,
)
# A number is a score where its side's name, the word score or "/10" says so, and nothing that it
# could count or be added to follows: not "Answer 1: 2 + 2 = 4", nor "Assistant 1: 3 apples".
_END = (
    r"(?=[\s*_`]*(?:$|\n|[.,;:)\]]+(?:\s|$)|[(–—]|-\s+[a-z]"
    r"|(?:assistant|answer|response|model|and|because|while|whereas|but|for|vs|points?)\b))"
)
_WORDS = (
    r"(?:[\s*_`]*(?:'s|(?:gets|receives|received|earns|deserves|is|of|an?|overall|scores?|ratings?"
    r"|scored)\b|[:=(]|[-–—](?!\d))){0,6}[\s*_`]*"
)
_SIDE = (
    r"\b(?:(?:assistant|model)\s*(?:{side})\b|(?:answer|response)\s*(?:{side})\b"
    r"(?=[^\n]{0,20}\b(?:scores?|ratings?|gets)\b|[\s*_`:=]*[\d.]+\s*(?:/|out\s+of)\s*10\b))"
    rf"{_WORDS}({_NUMBER}){_OUT_OF}{_END}"
)
_SIDES = [re.compile(_SIDE.replace("{side}", side), re.I | re.M) for side in ("1|A", "2|B")]


def parse_yes_no_score(reply: str) -> dict[str, Any] | None:
    """A verdict and a score from 0 to 5 in whatever frame a judge puts them.

    >>> parse_yes_no_score("{'pred': 'yes', 'score': 4.5}")
    {'pred': 'yes', 'score': 4.5}
    >>> parse_yes_no_score("No. Score: 1")
    {'pred': 'no', 'score': 1}
    >>> parse_yes_no_score("The answer seems quite good to me.")
    """
    score = parse_score(reply, low=0, high=5)
    found = _VERDICT.search(reply) or re.match(r"\W*(yes|no)\b", reply, re.I)
    if score is None or found is None:
        return None
    return {"pred": found[1].lower(), **score}


def parse_score(reply: str, *, low: float, high: float) -> dict[str, Any] | None:
    """A score within bounds: after its name, or a reply that is nothing but a number.

    >>> parse_score("{'score': 4.8}", low=0, high=5), parse_score(" 3/5", low=0, high=5)
    ({'score': 4.8}, {'score': 3})
    >>> parse_score("score: 11", low=0, high=5)
    """
    found = _SCORE.search(reply) or _ALONE.fullmatch(reply)
    if found is None:
        return None
    value = float(found[1])
    if not low <= value <= high or not math.isfinite(value):
        return None
    return {"score": int(value) if value.is_integer() else value}


def parse_score_pair(reply: str) -> tuple[float, float] | None:
    r"""Two scores from 1 to 10: alone on the first line, or named or in a tuple further down.

    >>> parse_score_pair("8 7.5\nBoth are fine.")
    (8.0, 7.5)
    >>> parse_score_pair("Let us see.\nAssistant 1: 3/10\nAssistant 2: 9/10")
    (3.0, 9.0)
    >>> parse_score_pair("Both get 8/10.")
    """
    first = first_line_pair(reply)
    if first is not None:
        return first
    sides = [[*pattern.finditer(reply)] for pattern in _SIDES]
    if all(sides):
        return _pair(sides[0][-1][1], sides[1][-1][1])
    for found in [*_TUPLE.finditer(reply)][::-1]:
        pair = _pair(found[1], found[2])
        if pair is not None:
            return pair
    # a line of two numbers further down is a verdict where it is the only one
    alone = [line for line in reply.splitlines()[1:] if _FIRST_LINE.fullmatch(line)]
    return first_line_pair(alone[0]) if len(alone) == 1 else None


def first_line_pair(reply: str) -> tuple[float, float] | None:
    """Two scores that are all of the first line, as judges are told to write them."""
    found = _FIRST_LINE.fullmatch(reply.strip().split("\n")[0])
    return None if found is None else _pair(found[1], found[2])


def _pair(left: str, right: str) -> tuple[float, float] | None:
    pair = float(left), float(right)
    return pair if all(0 <= value <= 10 for value in pair) else None


def parse_choice(answer: str, *, choices: int) -> int | None:
    """The index of the chosen letter: alone, leading as "X. ", or in one "The answer is X."

    >>> parse_choice("B", choices=3), parse_choice("C. a dog", choices=3)
    (1, 2)
    >>> parse_choice("The answer is A. BECAUSE: it is.", choices=2)
    0
    >>> parse_choice("The answer is A. No: The answer is B.", choices=2)
    >>> parse_choice("D", choices=2)
    """
    text = answer.strip()
    leading = re.match(r"([A-Z])\. ", text)
    stated = re.findall(r"The answer is ([A-Z])\.", text)
    if re.fullmatch(r"[A-Z]", text):
        letter = text[0]
    elif leading:
        letter = leading[1]
    elif len(stated) == 1:
        letter = stated[0]
    else:
        return None
    index = ord(letter) - ord("A")
    return index if index < choices else None


_STATED = re.compile(r"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is)?:?\s*\W{0,3}([A-Z])\b(?!')")


def parse_choice_in_any_form(answer: str, *, choices: Sequence[str]) -> int | None:
    """The index of a choice named by its letter in some other way, or by its own words.

    >>> parse_choice_in_any_form("(B)", choices=["a dog", "a cat"])
    1
    >>> parse_choice_in_any_form("So the answer is: **A**", choices=["a dog", "a cat"])
    0
    >>> parse_choice_in_any_form("A cat.", choices=["a dog", "a cat"])
    1
    >>> parse_choice_in_any_form("b", choices=["a dog", "a cat"])
    1
    >>> parse_choice_in_any_form("Cats and dogs", choices=["a dog", "a cat"])
    """
    text = answer.strip()
    words = re.findall(r"\w+", text.lower())
    same = [i for i, choice in enumerate(choices) if re.findall(r"\w+", choice.lower()) == words]
    if words and len(same) == 1:
        return same[0]
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text) or re.match(r"\(?([A-Z])[):]\s", text)
    letters = {alone[1].upper()} if alone else set(_STATED.findall(text))
    index = ord(letters.pop()) - ord("A") if len(letters) == 1 else len(choices)
    return index if index < len(choices) else None


def parse_yes_no(answer: str) -> str | None:
    """MME's rule: lower-cased "yes" or "no" within the first four characters.

    >>> parse_yes_no("Yes, it is."), parse_yes_no(" no"), parse_yes_no("It is not.")
    ('yes', 'no', None)
    """
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None
