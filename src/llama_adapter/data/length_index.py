"""How long every sample of a source is, found once before training starts.

A run then knows its rows in advance: its position is two numbers, and a malformed record is found
before any step is made. Takes 20 bytes a sample.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llama_adapter.conversation import Conversation, Message
from llama_adapter.data.samples import InvalidRecord, Source
from llama_adapter.data.truncation import SampleEncoder
from llama_adapter.errors import DataError, LlamaAdapterError
from llama_adapter.files import atomic_file, open_regular

Progress = Callable[[int], None]
"""Called with the number of samples just done."""

_FORMAT = 4
"""Counts up when samples are cut or tokenized in another way."""
_CHUNK = 256
_MAX_HEADER_BYTES = 1 << 26
"""Bytes of a cache file's first line, which lists invalid records."""
COLUMNS = ("sample", "first", "stop", "tokens", "answer_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """Every piece of every sample of a source, and the samples that are invalid."""

    table: np.ndarray
    """int32, a row a piece; its columns are `COLUMNS`."""
    invalid: tuple[InvalidRecord, ...]
    num_samples: int

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> np.ndarray:
        """One column of the table."""
        return self.table[:, COLUMNS.index(name)]

    def refuse_beyond(self, max_invalid: float, *, name: str) -> None:
        """DataError with the list if more than this share of the samples is invalid."""
        refuse_invalid(self.invalid, self.num_samples, max_invalid=max_invalid, name=name)


def refuse_invalid(
    invalid: Sequence[InvalidRecord], total: int, *, max_invalid: float, name: str, shown: int = 5
) -> None:
    """DataError with a list if too many of `total` samples are invalid."""
    if len(invalid) <= max_invalid * total:
        return
    listed = "; ".join(str(each) for each in invalid[:shown])
    more = f"; and {len(invalid) - shown} more" if len(invalid) > shown else ""
    raise DataError(
        f"{name}: {len(invalid)} of {total} records are invalid, "
        f"more than the {max_invalid:.1%} of max_invalid: {listed}{more}"
    )


def measure(
    source: Source,
    encoder: SampleEncoder,
    *,
    workers: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Pieces:
    """The pieces of all samples of a source.

    `cache` is a folder where they are kept; a change of source, template, tokenizer, processor or
    row finds none, a damaged file is made again, and a disk that cannot be written costs no more
    than a warning.
    """
    key = "" if cache is None else _key(source, encoder)
    kept = None if cache is None else cache / f"{key}.pieces"
    found = None if kept is None else _kept(kept, key=key, num_samples=len(source))
    if found is not None:
        if progress is not None:
            progress(len(source))
        return found
    pieces = _measure(source, encoder, workers=workers, progress=progress)
    if kept is not None:
        try:
            _keep(pieces, kept, key=key)
        except OSError as error:
            warnings.warn(
                f"the samples' lengths are not kept: cannot write {kept}: "
                f"{error.strerror or error}",
                stacklevel=2,
            )
    return pieces


def _measure(
    source: Source, encoder: SampleEncoder, *, workers: int, progress: Progress | None
) -> Pieces:
    chunks = [range(at, min(at + _CHUNK, len(source))) for at in range(0, len(source), _CHUNK)]
    tables: list[np.ndarray] = []
    invalid: list[InvalidRecord] = []
    loader = DataLoader(
        _Chunks(source, encoder),
        sampler=chunks,
        batch_size=None,
        num_workers=min(workers, len(chunks) - 1),
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    for chunk, (table, faults) in zip(chunks, loader, strict=True):
        tables.append(table)
        invalid += faults
        if progress is not None:
            progress(len(chunk))
    return Pieces(table=np.concatenate(tables), invalid=tuple(invalid), num_samples=len(source))


def _unchanged(item: Any) -> Any:
    return item


def measure_some(source: Source, encoder: SampleEncoder, indices: Sequence[int]) -> Pieces:
    """The pieces of some samples."""
    table, invalid = _Chunks(source, encoder)[indices]
    return Pieces(table=table, invalid=tuple(invalid), num_samples=len(indices))


class _Chunks(Dataset[Any]):
    """Measures some samples; runs in worker processes."""

    def __init__(self, source: Source, encoder: SampleEncoder) -> None:
        self.source = source
        self.encoder = encoder

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, list[InvalidRecord]]:
        rows: list[tuple[int, ...]] = []
        invalid: list[InvalidRecord] = []
        for index in indices:
            try:
                sample = self.source[index]
                rows += [(index, *cut) for cut in self.encoder.cut(sample)]
            except LlamaAdapterError as error:
                invalid.append(InvalidRecord(where=self.source.where(index), reason=str(error)))
        return np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS)), invalid


def _key(source: Source, encoder: SampleEncoder) -> str:
    processor = encoder.processor
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    parts = (
        str(_FORMAT),
        source.fingerprint(),
        *_renderings(encoder),
        json.dumps(processor.to_dict(), sort_keys=True, default=str),
        "" if backend is None else backend.to_str(),
        str(processor.tokenizer.chat_template),
        str(encoder.limit),
        encoder.too_long,
    )
    return hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()[:24]


def _renderings(encoder: SampleEncoder) -> Iterator[str]:
    """What the template makes of conversations that hold all it tells apart.

    A template is named in the processor's settings, but its words are in our code.
    """
    begun = Conversation.ask("q ### Instruction: USER:", answer="a ###").user("r").assistant("b")
    system = Message(role="system", text="s")
    for images in ((), ("i",)):
        for context in (None, "c"):
            shown = begun.with_context(context).with_images(images)
            for conversation in (shown, replace(shown, messages=(system, *shown.messages))):
                try:
                    text = encoder.processor.render(conversation)
                    yield f"{text} {text.answers} {text.placeholders}"
                except LlamaAdapterError as error:  # not every chat template has a system turn
                    yield str(error)


def _kept(path: Path, *, key: str, num_samples: int) -> Pieces | None:
    """What `_keep` wrote; None where there is nothing, something else, or nothing whole."""
    try:
        with open_regular(path, error=DataError) as file:
            head = json.loads(file.readline(_MAX_HEADER_BYTES))
            size = path.stat().st_size - file.tell()
            if size != 4 * len(COLUMNS) * head["pieces"]:
                return None
            data = file.read(size)
        invalid = tuple(InvalidRecord(**each) for each in head["broken"])
        stated = (head["key"], head["num_samples"], head["sha256"])
        if stated != (key, num_samples, hashlib.sha256(data + _listed(invalid)).hexdigest()):
            return None
    except (DataError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # a copy, for what comes from bytes cannot be written to
    table = np.frombuffer(data, dtype="<i4").astype(np.int32).reshape(-1, len(COLUMNS))
    return Pieces(table=table, invalid=invalid, num_samples=num_samples)


def _keep(pieces: Pieces, path: Path, *, key: str) -> None:
    """Write whole or not at all: several processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pieces.table.astype("<i4").tobytes()
    head = {
        "key": key,
        "num_samples": pieces.num_samples,
        "pieces": len(pieces),
        "sha256": hashlib.sha256(data + _listed(pieces.invalid)).hexdigest(),
        "broken": [each.to_dict() for each in pieces.invalid],
    }
    with atomic_file(path) as file:
        file.write(json.dumps(head).encode() + b"\n" + data)


def _listed(invalid: Sequence[InvalidRecord]) -> bytes:
    return json.dumps([each.to_dict() for each in invalid]).encode()
