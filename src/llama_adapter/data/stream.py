"""Endless batches of one kind, in an order that follows from seed and position alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llama_adapter.config import IGNORE_INDEX
from llama_adapter.data.batch import TrainBatch
from llama_adapter.data.length_index import Pieces, refuse_invalid
from llama_adapter.data.packing import Padding, Rows, assemble, by_length, pack
from llama_adapter.data.samples import KINDS, InvalidRecord, Kind, Source
from llama_adapter.data.truncation import SampleEncoder
from llama_adapter.errors import ConfigError, DataError, LlamaAdapterError, TrainingError
from llama_adapter.processing.batching import EncodedSample

_AHEAD = 2
"""Batches that each worker process holds ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A source's share in a stream."""

    source: Source
    pieces: Pieces
    weight: float = 1.0
    """How many times an epoch goes through it."""
    held_out: np.ndarray | None = None
    """Samples that training never sees."""
    max_invalid: float | None = None
    """Share of invalid samples that is too much; None: the stream's."""

    def trained(self) -> np.ndarray:
        """Indices of the pieces to learn from."""
        everything = np.arange(len(self.pieces))
        if self.held_out is None or not len(self.held_out):
            return everything
        return everything[~np.isin(self.pieces.column("sample"), self.held_out)]


class Cursor(NamedTuple):
    """The position of a stream: the next row, counted within its epoch."""

    epoch: int
    row: int


class _Task(NamedTuple):
    """What a worker builds a batch from."""

    after: Cursor
    rows: tuple[np.ndarray, ...]


class _PieceIndex:
    """Finds a piece by its number, counted through all components."""

    def __init__(self, components: tuple[Component, ...]) -> None:
        self.components = components
        self.offsets = np.cumsum([0, *(len(component.pieces) for component in components[:-1])])

    def find(self, number: int) -> tuple[int, tuple[int, int, int]]:
        """The index of a piece's component, and its sample with the exchanges."""
        index = int(np.searchsorted(self.offsets, number, side="right")) - 1
        row = self.components[index].pieces.table[number - self.offsets[index], :3]
        sample, first, stop = row.tolist()
        return index, (sample, first, stop)


class BatchStream:
    """Batches of one kind without end, read ahead by worker processes.

    Every rank draws the same plan from the seed; of each global micro-batch of `rows` rows, rank
    r takes rows r, r + world, ... The plan of an epoch lays all pieces into rows once, in an order
    of its own. An epoch that ends within a batch is continued by the next one. With `join_rows` a
    packed batch comes as one long row: see `TrainBatch.joined`.
    """

    def __init__(
        self,
        kind: Kind,
        components: Sequence[Component],
        encoder: SampleEncoder,
        *,
        rows: int,
        row_length: int,
        padding: Padding = "packed",
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        max_invalid: float = 0.01,
        join_rows: bool = False,
        group_by_length: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if rows < world:
            raise ConfigError(
                f"{kind}s.rows is {rows}, but {world} processes train: each needs a row"
            )
        self.kind: Kind = kind
        self.components = tuple(components)
        self.encoder = encoder
        self.rows, self.row_length, self.padding = rows, row_length, padding
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.max_invalid = max_invalid
        self.join_rows = join_rows
        self.group_by_length = group_by_length
        self.pin_memory = pin_memory
        self._trained = tuple(component.trained() for component in components)
        for component, trained in zip(self.components, self._trained, strict=True):
            if not len(trained):
                raise DataError(f"{component.source.name} leaves no sample to learn from")
        self._piece_index = _PieceIndex(self.components)
        self._tokens = np.concatenate(
            [component.pieces.column("tokens") for component in components]
        )
        self._earlier: dict[tuple[int, str], InvalidRecord] = {}
        self._found: dict[tuple[int, str], InvalidRecord] = {}
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._cursor = Cursor(0, 0)
        self._loading: Iterator[Any] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TrainBatch:
        if self._loading is None:
            self._loading = iter(self._loader())
        built = next(self._loading)
        if isinstance(built, LlamaAdapterError):
            raise built
        self._cursor, batch, invalid = built
        for component, fault in invalid:
            self._found[component, fault.where] = fault
        if invalid and self.world == 1:
            self._refuse_too_many_invalid()
        result: TrainBatch = batch
        return result

    @property
    def invalid(self) -> tuple[InvalidRecord, ...]:
        """Samples that turned out unreadable in any process's rows, as far as they were shared."""
        return tuple({**self._earlier, **self._found}.values())

    def share_invalid(self, gather: Callable[[Any], list[Any]]) -> None:
        """Learn what other processes found; DataError, on all of them, where it is too much."""
        for of_rank in gather(self._found):
            self._earlier.update(of_rank)
        self._found = {}  # only what is new travels
        self._refuse_too_many_invalid()

    def _refuse_too_many_invalid(self) -> None:
        known = {**self._earlier, **self._found}
        for number, component in enumerate(self.components):
            found = [fault for (owner, _), fault in known.items() if owner == number]
            if found:
                most = component.max_invalid
                refuse_invalid(
                    (*found, *component.pieces.invalid),
                    component.pieces.num_samples,
                    max_invalid=self.max_invalid if most is None else most,
                    name=component.source.name,
                )

    # --- the plan ---------------------------------------------------------------------------

    def rows_in_epoch(self, epoch: int = 0) -> int:
        """Rows that one pass through the data makes."""
        return len(self._plan(epoch))

    def fill(self, epoch: int = 0) -> float:
        """Share of the tokens in packed rows that are not padding."""
        plan = self._plan(epoch)
        return float(self._tokens[plan.numbers].sum() / (len(plan) * self.row_length))

    def _make_plan(self, epoch: int) -> Rows:
        rng = np.random.default_rng([self.seed, KINDS.index(self.kind), epoch])
        chosen = []
        for component, trained, offset in zip(
            self.components, self._trained, self._piece_index.offsets, strict=True
        ):
            times, share = divmod(component.weight, 1.0)
            chosen += [trained + offset] * int(times)
            some = rng.permutation(trained)[: max(round(share * len(trained)), int(times == 0))]
            chosen.append(some + offset)
        order = rng.permutation(np.concatenate(chosen))
        if self.group_by_length:
            # where an epoch ends within a batch, the next one's first rows complete it
            head = -epoch * len(order) % self.rows
            order = by_length(order, self._tokens, size=self.rows, head=head, rng=rng)
        if self.padding != "packed":
            return Rows(numbers=order, starts=np.arange(len(order) + 1))
        rows = pack(order, self._tokens, row_length=self.row_length)
        return rows.shuffled(rng)

    def _tasks(self) -> Iterator[_Task]:
        epoch, row = self._cursor
        while True:
            mine = []
            for number in range(self.rows):
                while row >= len(self._plan(epoch)):
                    epoch, row = epoch + 1, 0
                if number % self.world == self.rank:
                    mine.append(self._plan(epoch)[row])
                row += 1
            yield _Task(Cursor(epoch, row), tuple(mine))

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(
            _Builder(self),
            sampler=self._tasks(),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=_AHEAD if self.workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_leave_group,
            pin_memory=self.pin_memory,
            # its own generator: the global one belongs to the training's random state
            generator=torch.Generator(),
        )

    # --- position ---------------------------------------------------------------------------

    def _plan_key(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        return {
            "seed": self.seed,
            "rows": self.rows,
            "row_length": self.row_length,
            "padding": self.padding,
            "pieces": [len(trained) for trained in self._trained],
            "tokens": int(self._tokens.sum()),
            "held_out": self._held_out_key(),
        }

    def _held_out_key(self) -> str:
        """Which samples are held out; nothing where none is."""
        held_out = [component.held_out for component in self.components]
        if not any(some is not None and len(some) for some in held_out):
            return ""
        numbers = [[] if some is None else sorted(some.tolist()) for some in held_out]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; equal on all ranks once `share_invalid`
        was called after it.
        """
        invalid = [
            [component, fault.where, fault.reason]
            for (component, _), fault in {**self._earlier, **self._found}.items()
        ]
        return {
            "epoch": self._cursor.epoch,
            "row": self._cursor.row,
            "broken": invalid,
            **self._plan_key(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, whatever the number of ranks or workers was.

        Raises TrainingError if the position is one in other data or rows.
        """
        if "held_out" not in state and self.seed and self._held_out_key():
            raise TrainingError(
                f"an earlier version wrote the checkpoint, and held out other {self.kind}s for "
                f"seed {self.seed}: going on would learn them; begin from the start"
            )
        for key, value in self._plan_key().items():
            if state.get(key, value if key == "held_out" else None) != value:
                raise TrainingError(
                    f"the checkpoint's position is in other {self.kind} data: "
                    f"{key} was {state.get(key)}, is now {value}"
                )
        self.close()
        self._cursor = Cursor(int(state["epoch"]), int(state["row"]))
        self._found = {}
        self._earlier = {
            (component, where): InvalidRecord(where=where, reason=reason)
            for component, where, reason in state.get("broken", ())
        }

    def close(self) -> None:
        """End worker processes; the stream continues from its position if asked again."""
        self._loading = None


def _leave_group(_: int) -> None:
    """What is sent to a process group, as Ctrl-C is, is for the process that trains: it ends its
    step, and its workers with it.
    """
    if hasattr(os, "setsid"):
        os.setsid()


def _unchanged(item: Any) -> Any:
    return item


class _Builder(Dataset[Any]):
    """Reads samples and makes batches of them; runs in worker processes."""

    def __init__(self, stream: BatchStream) -> None:
        self.components = stream.components
        self.piece_index = _PieceIndex(stream.components)
        self.kind = stream.kind
        self.encoder = stream.encoder
        self.padding, self.row_length = stream.padding, stream.row_length
        self.join_rows = stream.join_rows

    def __getitem__(self, task: _Task) -> Any:
        try:
            return self._build(task)
        except LlamaAdapterError as error:
            # as a value: raised here, a traceback would be put into its message
            return error

    def _build(self, task: _Task) -> tuple[Cursor, TrainBatch, list[tuple[int, InvalidRecord]]]:
        invalid: list[tuple[int, InvalidRecord]] = []
        rows = [[p for n in row.tolist() if (p := self._read(n, invalid))] for row in task.rows]
        prepared = [p for row in rows for p in row]
        inputs = assemble(
            rows, self.encoder.processor, padding=self.padding, row_length=self.row_length
        )
        batch = TrainBatch(
            kind=self.kind,
            inputs=inputs,
            sample_ids=tuple(p.id for p in prepared),
            answer_tokens=int((inputs["labels"] != IGNORE_INDEX).sum()),
            tokens=sum(len(p.encoded) for p in prepared),
            invalid=tuple(fault for _, fault in invalid),
        )
        return task.after, batch.joined() if self.join_rows else batch, invalid

    def _read(self, number: int, invalid: list[tuple[int, InvalidRecord]]) -> EncodedSample | None:
        """A piece; or None, and an entry in the list, where it cannot be read any more."""
        index, (sample, first, stop) = self.piece_index.find(number)
        source = self.components[index].source
        try:
            return self.encoder.encode_sample(source[sample], first, stop)
        except LlamaAdapterError as error:
            invalid.append((index, InvalidRecord(where=source.where(sample), reason=str(error))))
            return None
