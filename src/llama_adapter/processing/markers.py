"""What marks turns in a prompt, and how text is kept from looking like it.

The markers of a chat template are read off the template itself: the texts that it puts around
the contents of a probe conversation. Three kinds count:

    brackets    `[INST]`, `<<SYS>>`, `<|im_start|>`: anywhere, in upper and lower case
    headings    `### Response:`, `USER:`: anywhere, with any white space inside
    lone words  `user` on a line of its own, where nothing else marks the turn

What only resembles them stays as it is: "the user", "Assistant manager: Bob", "# Notes".
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

NOTHING = re.compile(r"(?!)")
"""A pattern that matches nowhere."""

# Longest stretch of adjacent text that a marker may share with an untrusted one.
_REACH = 256

_BRACKETED = re.compile(r"[<\[{«【]\S*?\w\S*?[>\]}»】]+")
_LABEL_ENDS = (":", "：", ">", "|")
_MOST_LABEL_WORDS = 5


def escape(text: str, pattern: re.Pattern[str], *, before: str = "", after: str = "") -> str:
    """The text with a space inside whatever the pattern matches, until it matches nowhere.

    `before` and `after` are what the text will be between: a match that reaches over the
    border is broken inside the text. Takes time in proportion to the text.
    """
    before, after = before[-_REACH:], after[:_REACH]
    window = f"{before}{text}{after}"
    first, stop = len(before), len(before) + len(text)
    parts: list[str] = []
    done, position = first, 0
    while match := pattern.search(window, position):
        if match.start() >= stop:
            break
        if match.end() <= first:
            position = match.start() + 1
            continue
        # after its first letter, or at the border where that one is not of this text
        start = match.end() - len(match.group().lstrip())
        cut = min(max(start + 1, first), stop)
        if cut > done or not parts:
            parts += [window[done:cut], " "]
            done = cut
        position = max(cut, match.start() + 1)
    return "".join(parts) + window[done:stop]


def normalized(text: str, *, tokenizer: Any) -> str:
    """The text with what the tokenizer makes of its non-ASCII characters (NFKC: `：` is `:`)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = None if backend is None else backend.normalizer
    if normalizer is None or text.isascii():
        return text
    found = {c: normalizer.normalize_str(c) for c in set(text) if not c.isascii()}
    # some put a mark of white space before every text
    found = {c: made if made == c else made.removeprefix("\u2581") for c, made in found.items()}
    return "".join(found.get(c, c) for c in text)


def special_tokens(tokenizer: Any) -> set[str]:
    """Special tokens of the tokenizer, written out, and the others that its chat template names.

    Chat templates mark turns with tokens that the tokenizer does not call special (`<think>`,
    DeepSeek's `<｜User｜>`).
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    source = template if isinstance(template, str) else ""
    contents = {token.strip() for token in tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        content = token.content.strip()
        named = content in source and re.fullmatch(r"\W.*\w.*\W", content, re.DOTALL)
        if token.special or named:
            contents.add(content)
    return {content for content in contents if len(content) > 1}


def any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of the texts, the longest first.

    What texts begin with in common is looked for once: tokenizers have up to thousands of special
    tokens that differ in a number.
    """
    return _tree(sorted({text for text in texts if text})) or NOTHING.pattern


def _tree(texts: Sequence[str]) -> str:
    """Of sorted texts that are all different; an empty one comes first and matches last."""
    branches = []
    for first, group in groupby((text for text in texts if text), key=lambda text: text[0]):
        rests = [text[1:] for text in group]
        shared = os.path.commonprefix(rests)  # noqa: RUF071  (of texts, not of paths)
        branches.append(re.escape(first + shared) + _tree([rest[len(shared) :] for rest in rests]))
    if texts and not texts[0]:
        branches.append("")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""


def marker_expressions(
    literals: Iterable[str], *, specials: re.Pattern[str], ends: Collection[str]
) -> list[str]:
    """Regular expressions for what in a template's own texts marks turns.

    `literals` are between two contents, or at the border of one. Special tokens in them are
    left to the caller; all but `ends` (bos, eos) guard the plain words next to them.
    """
    found: set[str] = set()
    for literal in literals:
        plain = specials.sub(lambda m: "\n" if m[0] in ends else "\0", literal)
        found.update(_of_literal(plain))
    return sorted(found)


def _of_literal(plain: str) -> Iterator[str]:
    brackets = _BRACKETED.findall(plain)
    yield from (f"(?i:{re.escape(bracket)})" for bracket in brackets)
    is_guarded = "\0" in plain or bool(brackets)
    for line in _BRACKETED.sub("\0", plain).split("\n"):
        for phrase in line.split("\0"):
            words = phrase.split()
            if words:
                yield from _of_phrase(words, is_guarded=is_guarded, fills_line=phrase == line)


def _of_phrase(words: list[str], *, is_guarded: bool, fills_line: bool) -> Iterator[str]:
    is_label = words[-1].endswith(_LABEL_ENDS) and len(words) <= _MOST_LABEL_WORDS
    text = " ".join(words)
    if not is_label and is_guarded:
        return
    if not any(c.isalnum() for c in text):
        # a dash may begin a list; three of them are a rule
        yield re.escape(text) if len(text) > 2 else rf"(?m:^[ \t]*{re.escape(text)})"
    elif is_label or not text.replace(" ", "").isalnum():
        yield _label(words)
    elif fills_line:
        yield rf"(?m:^[ \t]*{_spaced(words)}[ \t]*$)"


def _label(words: list[str]) -> str:
    body = _spaced(words)
    if words[0][0].isalnum():
        return body
    if words[-1].endswith(":"):
        # a heading may do without its colon, not in the middle of a sentence
        return rf"(?im:{body.removesuffix(':')}\s*(?::|$))"
    return f"(?i:{body})"


def _spaced(words: list[str]) -> str:
    """The words with any white space between, or none where one of them ends in a sign."""
    expression = re.escape(words[0])
    for left, right in pairwise(words):
        between = r"\s+" if left[-1].isalnum() and right[0].isalnum() else r"\s*"
        expression += between + re.escape(right)
    return expression
