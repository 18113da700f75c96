"""Getting a benchmark's answers: append as they come, take up where a killed run stopped."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import EvaluationError, ImageError, PromptError, VideoError
from llama_adapter.evaluation.answering import Answerer, Prediction
from llama_adapter.evaluation.jsonfiles import lines_to_append, read_text
from llama_adapter.evaluation.manifest import (
    make_manifest,
    merged_manifest,
    read_manifest,
    start_or_resume,
    write_manifest,
)
from llama_adapter.evaluation.media import MediaFolders, media_of
from llama_adapter.evaluation.predictions import (
    JUDGMENTS,
    PREDICTIONS,
    read_ours,
    record_to_json,
)
from llama_adapter.evaluation.records import Record
from llama_adapter.evaluation.tasks.base import Generation, Inputs, Task, fill
from llama_adapter.files import write_atomically
from llama_adapter.processing.video import load_video

_VIDEOS_KEPT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What a run did."""

    folder: Path
    records: int
    answered_before: int
    """Records that an earlier run had done."""
    problems: tuple[str, ...]
    """`id: why` for records without an answer."""
    failed: int
    """Of these, records that the answerer failed at, such as a dead server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which records of a benchmark to do."""

    limit: int | None = None
    """So many: the first of each part of the benchmark, taken in turn."""
    shard: tuple[int, int] | None = None
    """(i, n): every n-th record from the i-th on, counting from 1."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"limit must be at least 1, got {self.limit}")

    @property
    def shard_name(self) -> str | None:
        """`2/5`, or None."""
        return None if self.shard is None else f"{self.shard[0]}/{self.shard[1]}"

    def of(self, task: Task, records: Sequence[Record]) -> list[Record]:
        """The records to do, in the benchmark's order."""
        chosen = list(records)
        if self.limit is not None and self.limit < len(records):
            # the n-th of every part comes before the next of any
            seen: Counter[str] = Counter()
            turns = []
            for place, record in enumerate(records):
                part = task.part(record)
                turns.append((seen[part], place))
                seen[part] += 1
            chosen = [records[place] for place in sorted(p for _, p in sorted(turns)[: self.limit])]
        return chosen if self.shard is None else chosen[self.shard[0] - 1 :: self.shard[1]]


def parse_shard(text: str) -> tuple[int, int]:
    """Read `i/n`.

    >>> parse_shard("2/5")
    (2, 5)
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise EvaluationError(f"shard must be i/n with 1 <= i <= n, got {text!r}")
    return int(found[1]), int(found[2])


def run(
    task: Task,
    answerer: Answerer,
    inputs: Inputs,
    out: Path,
    *,
    generation: Generation | None = None,
    selection: Selection | None = None,
    media: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RunReport:
    """Answer every record that `out` has no answer to yet.

    Batches are a function of the selection alone, never of what is done already, so a run that
    was killed and taken up again gives the same answers as one that was not.
    """
    generation = generation or task.generation
    selection = selection or Selection()
    records = selection.of(task, task.read(inputs))
    if not records:
        raise EvaluationError(f"{inputs.data}: selection holds no records")
    folders = MediaFolders.around(inputs.data, media)
    folder = run_folder(out, selection)
    paths, missing = _shown(records, generation, folders)
    asker = _Asker(task, generation, paths)
    manifest = make_manifest(
        task=task.name,
        model=answerer.describe(),
        data=inputs.data,
        records=records,
        generation=generation,
        shard=selection.shard_name,
        example=asker.prompts(records[0])[0],
    )
    start_or_resume(folder, manifest)
    predictions = lines_to_append(folder / PREDICTIONS)
    done = _done(folder, task)
    report = progress or (lambda *_: None)
    report(len(done), len(records))
    failed = 0
    for index, batch in enumerate(asker.batches(records)):
        pending = [record for record in batch if record.id not in done]
        if not pending:
            continue
        lines = asker.ask(batch, answerer, missing, seed=generation.seed * 1_000_003 + index)
        predictions.append(
            *({"task": task.name, **record_to_json(r), **lines[r.id]} for r in pending)
        )
        failed += sum(record.id in asker.failed for record in pending)
        report(len(pending), len(records))
    found = read_ours(folder / PREDICTIONS, task=task.name)
    problems = tuple(f"{row.record.id}: {row.problem}" for row in found.rows if row.problem)
    return RunReport(
        folder=folder,
        records=len(records),
        answered_before=len(done),
        problems=problems,
        failed=failed,
    )


def merge_shards(task: Task, out: Path) -> Path:
    """Put the predictions and judgments of all shards into `out`, in one file each."""
    named = sorted(out.glob("shard-*-of-*"))
    folders = [path for path in named if re.fullmatch(r"shard-\d+-of-\d{1,4}", path.name)]
    if not folders:
        raise EvaluationError(f"{out}: holds no shards, such as shard-1-of-2")
    total = int(folders[0].name.rpartition("-")[2])
    expected = [_shard_folder((i, total)) for i in range(1, total + 1)]
    lacking = [name for name in expected if not (out / name / PREDICTIONS).exists()]
    if lacking or len(folders) != total:
        names = ", ".join(folder.name for folder in folders)
        raise EvaluationError(f"{out}: expected {', '.join(expected)}, found {names}")
    merged = merged_manifest([out / name for name in expected])
    for folder in folders:
        stored = read_manifest(folder)
        found = read_ours(folder / PREDICTIONS, task=task.name)
        if len(found.rows) != stored.get("records"):
            raise EvaluationError(
                f"{folder}: is not done, {len(found.rows)} of {stored.get('records')} records"
            )
    for name in (PREDICTIONS, JUDGMENTS):
        lines = [line for part in expected for line in _whole_lines(out / part / name)]
        if name == JUDGMENTS:  # verdicts on the whole, given since it was put together, are kept
            of_shards = Counter(lines)
            for line in _whole_lines(out / name):
                if of_shards[line]:
                    of_shards[line] -= 1
                else:
                    lines.append(line)
        if lines:
            write_atomically(out / name, "".join(f"{line}\n" for line in lines))
    write_manifest(out, merged)
    return out / PREDICTIONS


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, if it is there, without one that its writer was stopped in."""
    return read_text(path).split("\n")[:-1] if path.exists() else []


def run_folder(out: Path, selection: Selection) -> Path:
    """Where a run keeps its answers: each shard in a folder of its own."""
    return out if selection.shard is None else out / _shard_folder(selection.shard)


def _shard_folder(shard: tuple[int, int]) -> str:
    return f"shard-{shard[0]}-of-{shard[1]}"


def _done(folder: Path, task: Task) -> set[str]:
    path = folder / PREDICTIONS
    if not path.exists() or not path.stat().st_size:
        return set()
    # what had a problem is tried again: the missing video may be there by now
    rows = read_ours(path, task=task.name).rows
    return {row.record.id for row in rows if row.problem is None}


def _shown(
    records: Sequence[Record], generation: Generation, folders: MediaFolders
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Files that are shown with each record, by its id, and what is missing."""
    if generation.images == "none":
        return {record.id: [] for record in records}, {}
    paths, missing = _find_media(records, folders)
    if generation.images == "own":
        return paths, missing
    return _exchanged(records, paths, seed=generation.seed), missing


def _exchanged(
    records: Sequence[Record], paths: dict[str, list[Path]], *, seed: int
) -> dict[str, list[Path]]:
    """Files of another record that has as many, and others; every file is shown as often as before.

    Ordered by their files and shifted by the size of the largest group that shares them, no record
    keeps its own.
    """
    kinds: dict[tuple[int, bool], list[str]] = {}
    for record in records:
        if paths[record.id]:
            kind = (len(paths[record.id]), record.video is not None)
            kinds.setdefault(kind, []).append(record.id)
    exchanged = {record.id: paths[record.id] for record in records}
    for ids in kinds.values():
        shuffled = random.Random(seed).sample(ids, len(ids))
        place = {str(paths[id_]): number for number, id_ in enumerate(shuffled)}
        ordered = sorted(shuffled, key=lambda id_: place[str(paths[id_])])
        shift = max(Counter(str(paths[id_]) for id_ in ids).values())
        if 2 * shift > len(ids):
            raise EvaluationError(
                f"--images shuffled: {shift} of {len(ids)} records have the same images, so that "
                "not everyone can have another's"
            )
        for at, id_ in enumerate(ordered):
            exchanged[id_] = paths[ordered[(at + shift) % len(ordered)]]
    return exchanged


def _find_media(
    records: Sequence[Record], folders: MediaFolders
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Files by record id, and what is missing by record id; an error where all of it is."""
    paths: dict[str, list[Path]] = {}
    missing: dict[str, str] = {}
    wanted = 0
    for record in records:
        wanted += bool(record.images or record.video)
        paths[record.id], names = media_of(record, folders)
        if names:
            missing[record.id] = f"missing {', '.join(names)}"
    if missing and len(missing) == wanted:
        where = ", ".join(map(str, folders.roots))
        raise EvaluationError(
            f"none of the images and videos of {wanted} records is below {where}; the first is "
            f"{next(iter(missing.values())).removeprefix('missing ')!r}. Name their folder: --media"
        )
    return paths, missing


class _Asker:
    """Turns records into batches of conversations, and answers into lines."""

    def __init__(self, task: Task, generation: Generation, paths: dict[str, list[Path]]) -> None:
        self._task = task
        self._generation = generation
        self._paths = paths
        self._video = lru_cache(maxsize=_VIDEOS_KEPT)(self._load)
        self.failed: set[str] = set()
        """Records that the answerer failed at."""

    def prompts(self, record: Record) -> list[str]:
        """What is asked, in full."""
        asked = self._task.prompts(record)
        return [fill(self._generation.prompt, {"question": text}) for text in asked]

    def batches(self, records: Sequence[Record]) -> Iterator[list[Record]]:
        """Records of like length together, and the questions about one video in a row."""
        size = self._generation.batch_size

        def key(record: Record) -> tuple[int, str, int]:
            return len(record.images), record.video or "", sum(map(len, self.prompts(record)))

        groups: dict[int, list[Record]] = {}
        for record in sorted(records, key=key):
            groups.setdefault(len(record.images), []).append(record)
        for group in groups.values():
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def ask(
        self, batch: Sequence[Record], answerer: Answerer, missing: dict[str, str], *, seed: int
    ) -> dict[str, dict[str, Any]]:
        """The answer's part of each record's line."""
        started = time.perf_counter()
        lines: dict[str, dict[str, Any]] = {}
        asked: list[tuple[Record, list[Conversation]]] = []
        for record in batch:
            try:
                if record.id in missing:
                    raise EvaluationError(missing[record.id])
                asked.append((record, self._conversations(record)))
            except (EvaluationError, ImageError, VideoError, PromptError) as error:
                lines[record.id] = {"answers": [], "problem": str(error)}
        flat = [conversation for _, several in asked for conversation in several]
        answers = iter(answerer.answer(flat, self._generation, seed=seed) if flat else ())
        for record, several in asked:
            own = [next(answers) for _ in several]
            lines[record.id] = _line(own)
            if any(answer.has_failed for answer in own):
                self.failed.add(record.id)
            notes = [f"{ref.name}: {ref.note}" for ref in several[0].images if ref.note]
            lines[record.id] |= {"notes": notes} if notes else {}
        seconds = round((time.perf_counter() - started) / len(batch), 4)
        return {id_: {**line, "seconds": seconds} for id_, line in lines.items()}

    def _conversations(self, record: Record) -> list[Conversation]:
        paths = self._paths[record.id]
        images = [ImageRef.of(path) for path in paths[: len(record.images)]]
        images += [self._video(path) for path in paths[len(record.images) :]]
        return [Conversation.ask(text, images=images) for text in self.prompts(record)]

    def _load(self, path: Path) -> ImageRef:
        return load_video(path, frames=self._generation.frames).as_image_ref()


def _line(answers: Sequence[Prediction]) -> dict[str, Any]:
    problem = next((answer.problem for answer in answers if answer.problem), None)
    if problem is not None:
        return {"answers": [], "problem": problem}
    line: dict[str, Any] = {"answers": [answer.text or "" for answer in answers]}
    if any(answer.contexts for answer in answers):
        line["contexts"] = [list(answer.contexts) for answer in answers]
    return line
