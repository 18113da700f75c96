"""VQA's accuracy over several human answers, as the VQA challenge counts it.

Antol et al., *VQA: Visual Question Answering* (arXiv 1505.00468), §3.3, with the normalization of
answers that the challenge's evaluation page describes (visualqa.org/evaluation.html).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_AGREEING = 3
"""So many people who gave an answer make it wholly right."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DECIMAL_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = {
    word: str(n)
    for n, word in enumerate(
        ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"zero": "0"}
# those whose bare letters are another word (well, were, shed, id) are left out, as there
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're
    you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, letter in enumerate(word)
    if letter == "'"
}
"""With one apostrophe left out, to the whole."""


def normalized(answer: str) -> str:
    """The answer as it is compared: lower case, digits, no articles, no punctuation.

    >>> normalized("Two  of the Dogs."), normalized("1,000"), normalized("dont know")
    ('2 of dogs', '1000', "don't know")
    """
    words = _without_punctuation(" ".join(answer.split())).lower().split()
    kept = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def _without_punctuation(text: str) -> str:
    """A mark at the edge of a word goes; one inside a word parts it, but in `1,000`."""
    is_number = _DECIMAL_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        at_edge = is_number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_edge else " ")
    return _PERIOD.sub("", out)


def vqa_accuracy(answer: str, human: Sequence[str]) -> float:
    """From 0 to 1: mean over all choices of all people but one of min(1, agreeing / 3).

    Human answers lose their punctuation where they differ among each other, as in the challenge's
    own code. An answer that three others gave counts wholly:

    >>> vqa_accuracy("Yes.", ["yes"] * 3 + ["no"] * 7)
    0.9
    """
    said = normalized(answer)
    given = list(human)
    if len(set(given)) > 1:
        given = [_without_punctuation(one) for one in given]
    agreeing = sum(one == said for one in given)
    # leaving out one who agrees leaves one fewer to agree with
    with_one_less = agreeing * min(1.0, (agreeing - 1) / _AGREEING)
    with_all = (len(given) - agreeing) * min(1.0, agreeing / _AGREEING)
    return (with_one_less + with_all) / len(given) if given else 0.0
