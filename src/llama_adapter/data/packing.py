"""Which samples share a row, and the tensors of rows.

Shape suffixes: B rows, T tokens, I pictures.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.data.encoding import EncodedSample
from llama_adapter.processing.encoding import pad, pad_id
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
        length = max((len(p.encoded) for row in rows for p in row), default=1)

    def batch(rows_of_numbers: list[list[int]], *, value: int) -> Tensor:
        return pad(rows_of_numbers, value=value, side="right", length=length)

    inputs = {
        "input_ids": batch(
            [_chain(p.encoded.input_ids for p in row) for row in rows],
            value=pad_id(processor.tokenizer),
        ),
        "labels": batch(
            [_chain(p.encoded.labels for p in row) for row in rows], value=IGNORE_INDEX
        ),
    }
    if padding == "packed":
        inputs["position_ids"] = _positions(rows, length)
    else:
        ones = [_chain([1] * len(p.encoded) for p in row) for row in rows]
        inputs["attention_mask"] = batch(ones, value=0)
    samples = [p for row in rows for p in row]
    for name, found, still in (
        ("pixel_values", [p.pixels for p in samples if p.pixels is not None], 4),
        ("visual_features", [p.features for p in samples if p.features is not None], 3),
    ):
        if found:
            inputs[name] = torch.cat(_as_frames(found, still=still))
    if any(p.num_images for p in samples):
        inputs["image_index"] = batch(_pictures(rows), value=-1)
        if processor.visual_scope == "placeholders":
            placeholders = batch(
                [_chain(p.encoded.placeholders for p in row) for row in rows], value=-1
            )
            inputs["visual_mask"] = placeholders >= 0
        if padding != "packed" and all(_one_picture_at_most(row) for row in rows):
            # a number a row is the cheaper form, where it says the same
            inputs["image_index"] = inputs["image_index"].amax(dim=1)
    return inputs


def _chain(parts: Iterable[Sequence[int]]) -> list[int]:
    return [number for part in parts for number in part]


def _positions(rows: Sequence[Sequence[EncodedSample]], length: int) -> Tensor:
    """Positions that restart at every sample; the padding behind them is one more sample."""
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        at = 0
        for size in [len(p.encoded) for p in row]:
            positions[index, at : at + size] = torch.arange(size)
            at += size
        positions[index, at:] = torch.arange(length - at)
    return positions


def _pictures(rows: Sequence[Sequence[EncodedSample]]) -> list[list[int]]:
    """For each token the picture its sample shows, or the one whose placeholder it is."""
    index: list[list[int]] = []
    count = 0
    for row in rows:
        index.append([])
        for prepared in row:
            if not prepared.num_images:
                index[-1] += [-1] * len(prepared.encoded)
                continue
            index[-1] += [
                count + max(placeholder, 0) for placeholder in prepared.encoded.placeholders
            ]
            count += prepared.num_images
    return index


def _as_frames(images: Sequence[Tensor], *, still: int) -> list[Tensor]:
    """Images as they are, or beside videos [I, F, ...] as videos of equal frames.

    `still` is the number of dimensions without frames.
    """
    frames = max((i.shape[1] for i in images if i.ndim > still), default=0)
    return [
        i if i.ndim > still or not frames else i[:, None].expand(-1, frames, *i.shape[1:])
        for i in images
    ]


def _one_picture_at_most(row: Sequence[EncodedSample]) -> bool:
    return all(p.num_images <= 1 for p in row)
