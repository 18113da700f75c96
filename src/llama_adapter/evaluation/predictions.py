"""Stored answers: our own `predictions.jsonl` and `judgements.jsonl`, and joining with the data.

A line of ours holds all that scoring needs, so that numbers can be had from it alone:
`{"task", "id", "questions", "answers", "gold", "facts", ...}`. Verdicts lie beside it, a line
each: `{"task", "id", "aspect", "verdict", "reply", "prompt_hash", ...}`; the last one counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import brief, read_jsonl
from llama_adapter.evaluation.records import Record, Row, Verdict

PREDICTIONS = "predictions.jsonl"
JUDGEMENTS = "judgements.jsonl"
Parse = Callable[[str, str], Verdict | None]
"""From an aspect and a judge's reply to the verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Rows read from stored answers, and what was odd about them."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    judge: str | None = None
    """Who gave the verdicts, where that is stored."""
    stated: Mapping[str, Any] | None = None
    """What a public result file says about itself beside its answers, such as its own count."""


def record_to_json(record: Record) -> dict[str, Any]:
    """The part of a predictions line that comes from the benchmark."""
    fields = {"id": record.id, "questions": list(record.questions), "gold": record.gold}
    if record.images:
        fields["images"] = list(record.images)
    if record.video:
        fields["video"] = record.video
    if record.facts:
        fields["facts"] = dict(record.facts)
    return fields


def record_from_json(line: Mapping[str, Any]) -> Record:
    """The benchmark's part of a predictions line."""
    return Record(
        id=str(line["id"]),
        questions=tuple(line.get("questions") or ("",)),
        gold=line.get("gold"),
        images=tuple(line.get("images", ())),
        video=line.get("video"),
        facts=line.get("facts") or {},
    )


_TYPES = {
    "questions": list,
    "answers": list,
    "images": list,
    "video": str,
    "facts": dict,
    "verdicts": dict,
}


def _check(line: Mapping[str, Any], *, task: str, where: str) -> None:
    """Refuse a line that no run has written."""
    if line.get("task") != task:
        raise EvaluationError(f"{where} is of task {line.get('task')!r}, expected {task!r}")
    if "id" not in line:
        raise EvaluationError(f"{where} lacks id")
    for name, kind in _TYPES.items():
        value = line.get(name)
        texts = value if name in {"questions", "answers"} and isinstance(value, list) else []
        verdicts = value.values() if name == "verdicts" and isinstance(value, dict) else []
        if (
            (name in line and not isinstance(value, kind))
            or not all(isinstance(text, str) for text in texts)
            or not all(isinstance(verdict, dict) for verdict in verdicts)
        ):
            raise EvaluationError(f"{where}: {name} is not as a run writes it: {brief(value)}")


def is_ours(path: Path) -> bool:
    """Whether a file is a `predictions.jsonl` of this package."""
    if path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    return '"task"' in first and '"answers"' in first


def read_ours(path: Path, *, task: str, parse: Parse | None = None) -> Predictions:
    """Read a `predictions.jsonl`, with the verdicts that lie beside it.

    `parse` reads the judge's stored replies anew.
    """
    lines, is_cut = read_jsonl(path)
    notes = ["the last line was cut short and is left out"] if is_cut else []
    verdicts, judge = read_verdicts(path.with_name(JUDGEMENTS), task=task, parse=parse)
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        _check(line, task=task, where=where)
        rows.append(
            Row(
                record=record_from_json(line),
                answers=tuple(line.get("answers") or ()),
                verdicts=line.get("verdicts") or verdicts.get(str(line["id"]), {}),
                problem=line.get("problem"),
            )
        )
    rows, repeated = without_repeats(rows, where=str(path))
    return Predictions(rows=tuple(rows), notes=(*notes, *repeated), judge=judge)


def read_verdicts(
    path: Path, *, task: str, parse: Parse | None = None
) -> tuple[dict[str, dict[str, Verdict]], str | None]:
    """The last readable verdict on each aspect of each record, by id; and who judged.

    Where several judges were asked, the one asked last counts and the others do not.
    """
    verdicts: dict[str, dict[str, Verdict]] = {}
    if not path.exists():
        return verdicts, None
    lines = [line for line in read_jsonl(path)[0] if line.get("task") == task]
    judge = lines[-1].get("judge") if lines else None
    for line in lines:
        if line.get("judge") != judge:
            continue
        verdict = line.get("verdict")
        if parse is not None and line.get("reply"):
            verdict = parse(line["aspect"], line["reply"])
        if verdict is not None:
            verdicts.setdefault(str(line["id"]), {})[line["aspect"]] = verdict
    return verdicts, judge


def without_repeats(rows: Iterable[Row], *, where: str) -> tuple[list[Row], tuple[str, ...]]:
    """Rows with each id once. A repeat of the same answer is noted, another answer is refused."""
    kept: dict[str, Row] = {}
    repeats = 0
    for row in rows:
        earlier = kept.get(row.record.id)
        if earlier is None or not earlier.answers:
            # A record whose picture was missing at first may be answered by a later run.
            kept[row.record.id] = row
        elif row.answers in (earlier.answers, ()):
            repeats += 1
        else:
            raise EvaluationError(
                f"{where}: id {row.record.id!r} has two answers, "
                f"{earlier.answer[:40]!r} and {row.answer[:40]!r}"
            )
    note = (f"{repeats} repeated answers are counted once",) if repeats else ()
    return list(kept.values()), note


def join(predictions: Predictions, records: Sequence[Record], *, data: Path) -> Predictions:
    """One row for each record of the data, answered or not; answers to anything else are noted."""
    by_id = {row.record.id: row for row in predictions.rows}
    if any(id_.startswith("#") for id_ in by_id) and len(by_id) != len(records):
        raise EvaluationError(
            f"{data}: holds {len(records)} records; {len(by_id)} answers without ids cannot be "
            "told to be which"
        )
    found: dict[str, Row] = {}
    # another name counts only where no record or answer has it for its own
    for record in records:
        if record.id in by_id:
            found[record.id] = by_id.pop(record.id)
    for record in records:
        names = [name for name in _aliases(record) if name in by_id]
        if names and record.id not in found:
            found[record.id] = by_id.pop(names[0])
    others = {alias: id_ for id_, row in by_id.items() for alias in _aliases(row.record)}
    for record in records:
        ids = [others[name] for name in (record.id, *_aliases(record)) if name in others]
        if record.id not in found and ids and ids[0] in by_id:
            found[record.id] = by_id.pop(ids[0])
    rows = [replace(found.get(r.id, Row(record=r)), record=r) for r in records]
    if by_id and len(by_id) == len(predictions.rows):
        raise EvaluationError(
            f"{data}: knows none of the {len(by_id)} answered ids, such as {next(iter(by_id))!r}; "
            f"its own are like {records[0].id if records else 'none'!r}"
        )
    notes = predictions.notes
    if by_id:
        some = ", ".join(list(by_id)[:3])
        notes = (*notes, f"{len(by_id)} answers to ids that the data does not have: {some}")
    return replace(predictions, rows=tuple(rows), notes=notes)


def _aliases(record: Record) -> Sequence[str]:
    return record.facts.get("aliases", ())


def number(value: Any) -> float | None:
    """A finite number from a number or its text, else None.

    >>> number("4.5"), number(float("nan")), number("good"), number(True)
    (4.5, None, None, None)
    """
    if isinstance(value, bool) or value is None:
        return None
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None
