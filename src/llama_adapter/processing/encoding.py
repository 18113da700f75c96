"""From a rendered prompt to token ids, labels and placeholders.

A conversation is tokenized once, as a whole; what each token is follows from its character
offsets. What generation reads has to be the beginning of it, token by token, at every answer. Where
a tokenizer would join the end of a prompt with the answer's first letters, the two are tokenized
separately.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.errors import ConfigError, PromptError
from llama_adapter.processing.pieces import Rendered, Span

Side = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One tokenized conversation."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token where it belongs to an answer, else `IGNORE_INDEX`."""
    placeholders: tuple[int, ...]
    """Which image's placeholder the token belongs to, counted within the conversation; -1: none."""
    branches: tuple[int, ...] = ()
    """Where branches start, of several conversations that begin alike: each branch goes on from
    the tokens before the first one, and sees no other branch. Empty: one conversation."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_answer_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)

    def truncated(self, length: int) -> Encoded:
        """The first `length` tokens."""
        return Encoded(
            input_ids=self.input_ids[:length],
            labels=self.labels[:length],
            placeholders=self.placeholders[:length],
            branches=tuple(start for start in self.branches if start < length),
        )

    @property
    def branch_numbers(self) -> list[int]:
        """For each token the branch it belongs to, counted from 1; 0: what all begin with."""
        ends = (*self.branches[1:], len(self))
        lengths = [stop - start for start, stop in zip(self.branches, ends, strict=False)]
        numbers = [0] * (len(self) - sum(lengths))
        for number, length in enumerate(lengths, start=1):
            numbers += [number] * length
        return numbers

    @property
    def positions(self) -> list[int]:
        """For each token its position in the conversation that it belongs to."""
        shared = self.branches[0] if self.branches else 0
        starts = (0, *self.branches)
        return [
            at - starts[number] + (shared if number else 0)
            for at, number in enumerate(self.branch_numbers)
        ]


def joined(conversations: Sequence[Encoded]) -> Encoded:
    """Several conversations with the tokens they begin with in common, each a branch of one.

    Every branch keeps a token of its own before its first answer: a label is learned from the
    token before it. Raises PromptError where images come behind what all begin with.
    """
    first = conversations[0]
    if len(conversations) == 1:
        return first
    shared = max(min(map(_prompt_length, conversations)) - 1, 0)
    for other in conversations[1:]:
        same = (
            first.input_ids[at] == other.input_ids[at]
            and first.placeholders[at] == other.placeholders[at]
            for at in range(shared)
        )
        shared = next((at for at, is_same in enumerate(same) if not is_same), shared)
    if any(place >= 0 for each in conversations for place in each.placeholders[shared:]):
        raise PromptError("the branches of a sample must begin with the same images")
    parts = [(0, shared, first), *((shared, len(each), each) for each in conversations)]

    def of(name: str) -> tuple[int, ...]:
        return tuple(v for start, stop, each in parts for v in getattr(each, name)[start:stop])

    lengths = [len(each) - shared for each in conversations]
    return Encoded(
        input_ids=of("input_ids"),
        labels=of("labels"),
        placeholders=of("placeholders"),
        branches=tuple(accumulate(lengths[:-1], initial=shared)),
    )


def _prompt_length(encoded: Encoded) -> int:
    """Tokens before the first that is scored."""
    scored = (at for at, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    return next(scored, len(encoded))


def opening_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before any text by itself: its bos token, or nothing."""
    ids = tokenizer("").input_ids
    starts = bool(ids) and ids[0] == tokenizer.bos_token_id
    return (tokenizer.bos_token_id,) if starts else ()


def encode(text: Rendered, *, tokenizer: Any, opening: tuple[int, ...]) -> Encoded:
    """Tokenize once; `opening` comes first unless the text itself begins with bos."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} reports no character offsets; a fast tokenizer is needed"
        )
    text, ids, offsets = _tokenize(text, tokenizer)
    bos = tokenizer.bos_token
    if text.continues or (bos is not None and text.startswith(bos)):
        opening = ()
    unmarked = (-1,) * len(opening)
    # what the model writes begins where its prompt ends, with white space before the answer
    prompts = (bisect_right(text.openings, start) - 1 for start, _ in text.answers)
    written = [
        (text.openings[prompt], stop)
        for prompt, (_, stop) in zip(prompts, text.answers, strict=True)
    ]
    scored = _spans_of(offsets, written)
    labels = (token if span >= 0 else IGNORE_INDEX for token, span in zip(ids, scored, strict=True))
    return Encoded(
        input_ids=(*opening, *ids),
        labels=(*((IGNORE_INDEX,) * len(opening)), *labels),
        placeholders=(*unmarked, *_spans_of(offsets, text.placeholders)),
    )


def _tokenize(text: Rendered, tokenizer: Any) -> tuple[Rendered, list[int], list[Span]]:
    """Token ids and their characters, and the text once what was said holds no special token.

    Special tokens written out are broken up already; a tokenizer that looks for them in
    normalized text makes them of other spellings too, and only it knows of which.
    """
    normalized = _special_ids(tokenizer, len(tokenizer), normalized=True)
    for _ in range(_MOST_SPELLINGS):
        ids, offsets = _with_prompts_apart(text, tokenizer)
        if normalized.isdisjoint(ids):
            return text, ids, offsets
        # some special tokens take the white space next to them along
        special = [
            _trimmed(text, span)
            for span, token in zip(offsets, ids, strict=True)
            if token in normalized
        ]
        in_said = _spans_of(special, text.said)
        forged = [first for (first, _), span in zip(special, in_said, strict=True) if span >= 0]
        if not forged:
            return text, ids, offsets
        text = text.with_spaces([first + 1 for first in forged])
    raise PromptError("the prompt holds a special token of the tokenizer that cannot be broken up")


_MOST_SPELLINGS = 4


def _trimmed(text: str, span: Span) -> Span:
    first, stop = span
    token = text[first:stop]
    return stop - len(token.lstrip()), first + len(token.rstrip())


def _with_prompts_apart(text: Rendered, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Token ids and characters, of which the prompt of every answer is the beginning."""
    ids, offsets = _tokens(text, 0, len(text), tokenizer)
    specials = _special_ids(tokenizer, len(tokenizer), normalized=False)
    cuts = []
    token = 0
    for at in text.openings:
        # what a special token follows is tokenized as if it were alone
        start = token
        while token < len(ids) and offsets[token][1] <= at:
            if ids[token] in specials:
                start = token
            token += 1
        if not any(
            _tokens(text, offsets[i][0] if i else 0, at, tokenizer)[0] == ids[i:token]
            for i in ((start, 0) if start and ids[start] in specials else (0,))
        ):
            cuts.append(at)
    if not cuts:
        return ids, offsets
    ids, offsets = [], []
    for first, stop in pairwise((0, *cuts, len(text))):
        more_ids, more_offsets = _tokens(text, first, stop, tokenizer)
        ids += more_ids
        offsets += more_offsets
    return ids, offsets


def _tokens(text: str, first: int, stop: int, tokenizer: Any) -> tuple[list[int], list[Span]]:
    found = tokenizer(
        str(text[first:stop]), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = found["offset_mapping"]
    return found["input_ids"], [(a + first, b + first) for a, b in offsets] if first else offsets


@lru_cache(maxsize=16)
def _special_ids(tokenizer: Any, length: int, *, normalized: bool) -> frozenset[int]:  # noqa: ARG001
    """Ids of special tokens; `normalized`: those looked for in normalized text.

    `length` is there since the tokenizer may grow.
    """
    added = tokenizer.added_tokens_decoder.items()
    found = {i for i, token in added if token.special and token.normalized >= normalized}
    return frozenset(found - {tokenizer.unk_token_id})


def _spans_of(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """For each token the first span it overlaps, -1 for none."""
    if not spans:
        return [-1] * len(offsets)
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    found = np.full(len(starts), -1)
    # byte-level tokenizers report a lone space as empty, at its end
    is_empty = starts == ends
    for index, (first, stop) in reversed(list(enumerate(spans))):
        overlaps = (starts < stop) & (ends > first)
        found[np.where(is_empty, (first < starts) & (starts <= stop), overlaps)] = index
    listed: list[int] = found.tolist()
    return listed


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up: the tokenizer's padding or, where it has none, its end."""
    found = tokenizer.pad_token_id
    return int((tokenizer.eos_token_id or 0) if found is None else found)


def pad(rows: Sequence[Sequence[int]], *, value: int, side: Side, length: int) -> Tensor:
    """Rows of integers as one (B, T) tensor."""
    padded = [
        [*row, *([value] * (length - len(row)))]
        if side == "right"
        else [*([value] * (length - len(row))), *row]
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), length)
