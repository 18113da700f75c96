"""Which samples share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from llama_adapter.processing.batching import EncodedSample, make_batch
from llama_adapter.processing.encoding import pad_id
from llama_adapter.processing.processor import LlamaAdapterProcessor

Padding = Literal["packed", "padded", "max_length"]

OPEN_ROWS = 64
"""Rows that are filled at a time: more leave smaller gaps, and mix farther samples."""

BANDS = 50
"""Groups of similar length that are told apart, as in transformers' Trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of sample numbers, as two arrays."""

    numbers: np.ndarray
    starts: np.ndarray
    """Where each row starts in `numbers`, and one more for the end."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.numbers[self.starts[row] : self.starts[row + 1]]

    def shuffled(self, rng: np.random.Generator) -> Rows:
        """The same rows in another order."""
        return Rows.of([self[int(row)] for row in rng.permutation(len(self))])

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray]) -> Rows:
        """From lists of numbers."""
        sizes = [len(row) for row in rows]
        flat = np.fromiter((int(n) for row in rows for n in row), dtype=np.int64, count=sum(sizes))
        return cls(numbers=flat, starts=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))


def pack(order: np.ndarray, tokens: np.ndarray, *, row_length: int) -> Rows:
    """Lay samples into rows in their order, each into the fullest open row that has room.

    `tokens` are the lengths of the samples that `order` lists, by their number.

    >>> rows = pack(np.arange(4), np.array([5, 4, 3, 4]), row_length=8)
    >>> [list(map(int, rows[i])) for i in range(len(rows))]
    [[0, 2], [1, 3]]
    """
    return Rows.of(list(_packed(order, tokens, row_length)))


def _packed(order: np.ndarray, tokens: np.ndarray, row_length: int) -> Iterator[list[int]]:
    rows: dict[int, list[int]] = {}
    # (tokens left, number) of open rows, the fullest first
    room: list[tuple[int, int]] = []
    opened = 0
    for number in order.tolist():
        length = int(tokens[number])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = row_length, opened
            rows[row] = []
            opened += 1
        rows[row].append(number)
        if left == length:
            yield rows.pop(row)
            continue
        insort(room, (left - length, row))
        if len(room) > OPEN_ROWS:
            yield rows.pop(room.pop(0)[1])
    yield from rows.values()


def by_length(
    order: np.ndarray, tokens: np.ndarray, *, size: int, head: int, rng: np.random.Generator
) -> np.ndarray:
    """Samples of similar length next to each other, in groups of `size` that come in any order.

    Sorted within stretches of `BANDS` groups, so that a group is another one each epoch. The
    first `head` samples make a group of their own.

    >>> order = by_length(
    ...     np.arange(6), np.array([9, 1, 8, 2, 7, 3]), size=3, head=0, rng=np.random.default_rng(0)
    ... )
    >>> sorted(sorted(map(int, order[at : at + 3])) for at in (0, 3))
    [[0, 2, 4], [1, 3, 5]]
    """
    found = [order[:head]]
    for at in range(head, len(order), size * BANDS):
        some = order[at : at + size * BANDS]
        some = some[np.argsort(tokens[some], kind="stable")]
        full = len(some) // size
        groups = some[: full * size].reshape(full, size)
        # what fills no group comes last: in the last stretch it begins the next epoch's first
        found += [groups[rng.permutation(full)].ravel(), some[full * size :]]
    return np.concatenate(found)


def assemble(
    rows: Sequence[Sequence[EncodedSample]],
    processor: LlamaAdapterProcessor,
    *,
    padding: Padding,
    row_length: int,
) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward for rows of samples."""
    length = row_length
    if padding == "padded":
        length = max((len(sample.encoded) for row in rows for sample in row), default=1)
    return make_batch(
        rows,
        filling=pad_id(processor.tokenizer),
        length=length,
        placeholders_only=processor.visual_scope == "placeholders",
        packed=padding == "packed",
    )
