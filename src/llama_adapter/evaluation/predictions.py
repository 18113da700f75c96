"""Stored answers: our own `predictions.jsonl` and `judgements.jsonl`, and joining with the data.

A line of ours holds all that scoring needs, so that numbers can be had from it alone:
`{"task", "id", "questions", "answers", "gold", "facts", ...}`. Verdicts are in a file of their own,
a line each: `{"task", "id", "aspect", "verdict", "reply", "prompt_hash", ...}`; the last counts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import MAX_BYTES, brief, field_of, id_of, read_jsonl, unique
from llama_adapter.evaluation.records import Record, Row, Verdict
from llama_adapter.files import open_regular, read_bytes, write_atomically

PREDICTIONS = "predictions.jsonl"
JUDGMENTS = "judgements.jsonl"
SCORE_FILE = "score.json"
"""The numbers, as `score --json` prints them."""
CUT = "the last line was cut short and is left out"
"""Of a file whose writer was stopped."""
_FIRST_LINE = 1 << 20  # bytes in which a line of ours names its task and its answers
Parse = Callable[[str, str], Verdict | None]
"""From an aspect and a judge's reply to the verdict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Rows read from stored answers, and what was odd about them."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    judge: str | None = None
    """Who gave the verdicts, where that is stored."""
    is_ours: bool = False
    """Whether a run of ours wrote them: its ids are the benchmark's own."""
    stated: Mapping[str, Any] | None = None
    """What a public result file says about itself besides its answers, such as its own count."""

    @classmethod
    def of_file(
        cls,
        rows: Iterable[Row],
        path: Path,
        *,
        is_cut: bool,
        notes: Sequence[str] = (),
        **more: Any,
    ) -> Predictions:
        """Rows of a file with each record once; notes tell of repeats and of a line cut short."""
        kept, repeated = without_repeats(rows, where=str(path))
        cut = (CUT,) if is_cut else ()
        return cls(rows=tuple(kept), notes=(*cut, *notes, *repeated), **more)


def record_to_json(record: Record) -> dict[str, Any]:
    """The part of a predictions line that comes from the benchmark."""
    fields = {"id": record.id, "questions": list(record.questions), "gold": record.reference}
    if record.images:
        fields["images"] = list(record.images)
    if record.video:
        fields["video"] = record.video
    if record.metadata:
        fields["facts"] = dict(record.metadata)
    return fields


def record_from_json(line: Mapping[str, Any]) -> Record:
    """The benchmark's part of a predictions line."""
    return Record(
        id=str(line["id"]),
        questions=tuple(line.get("questions") or ("",)),
        reference=line.get("gold"),
        images=tuple(line.get("images") or ()),
        video=line.get("video"),
        metadata=line.get("facts") or {},
    )


_TYPES = {
    "questions": list,
    "answers": list,
    "images": list,
    "video": str,
    "facts": dict,
    "verdicts": dict,
    "problem": str,
    "contexts": list,
}
_JUDGED = {
    "aspect": str,
    "judge": str,
    "reply": str | None,
    "verdict": dict | None,
    "prompt_hash": str | None,
}
_TEXTS = frozenset(("questions", "answers", "images"))


def _check(line: Mapping[str, Any], *, task: str, where: str) -> None:
    """Refuse a line that no run has written."""
    if line.get("task") != task:
        found = brief(line.get("task"))
        raise EvaluationError(f"{where} is of task {found}, expected {task!r}")
    id_of(field_of(line, ("id",), where=where), where=where)
    for name, kind in _TYPES.items():
        value = line.get(name)
        texts = value if name in _TEXTS and isinstance(value, list) else []
        verdicts = value.values() if name == "verdicts" and isinstance(value, dict) else []
        if (
            (value is not None and not isinstance(value, kind))
            or not all(isinstance(text, str) for text in texts)
            or not all(isinstance(verdict, dict) for verdict in verdicts)
            or not (name != "contexts" or _are_reports(value or ()))
        ):
            raise EvaluationError(f"{where}: {name} is not as a run writes it: {brief(value)}")


def _are_reports(contexts: Sequence[Any]) -> bool:
    """Whether experts' reports are lists of objects, a list for each question."""
    return all(
        isinstance(reports, list) and all(isinstance(report, dict) for report in reports)
        for reports in contexts
    )


def is_ours(path: Path) -> bool:
    """Whether a file is a `predictions.jsonl` of this package."""
    if path.suffix != ".jsonl":
        return False
    with open_regular(path, error=EvaluationError) as file:
        first, _, _ = file.read(_FIRST_LINE).lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    return b'"task"' in first and b'"answers"' in first


def read_ours(path: Path, *, task: str, parse: Parse | None = None) -> Predictions:
    """Read a `predictions.jsonl`, with the verdicts stored next to it.

    `parse` reads the judge's stored replies again.
    """
    lines, is_cut = read_jsonl(path)
    notes = []
    verdicts, judge = read_verdicts(path.with_name(JUDGMENTS), task=task, parse=parse)
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
    damaged = sum(bool(line.get("notes")) for line in lines)
    if damaged:
        notes.append(f"{damaged} answers rest on videos of which a part cannot be decoded")
    notes += _without_experts(lines)
    return Predictions.of_file(rows, path, is_cut=is_cut, notes=notes, judge=judge, is_ours=True)


def _without_experts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note of each expert that failed, with how often and why."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        failed = {
            str(report.get("expert")): str(report["problem"])
            for reports in line.get("contexts") or ()
            for report in reports
            if report.get("problem")
        }
        for expert, problem in failed.items():
            reasons.setdefault(expert, []).append(problem)
    return [
        f"{len(problems)} answers were given without the expert {expert!r}, such as: {problems[0]}"
        for expert, problems in sorted(reasons.items())
    ]


NOT_KEPT = "(not kept)"
"""The answer of a public file that kept the verdict on it alone."""


def store_answers(found: Predictions, folder: Path, *, task: str) -> None:
    """Make a run's folder of answers that stand elsewhere, to have them judged there."""
    lines = []
    for row in found.rows:
        if NOT_KEPT in row.answers:
            raise EvaluationError(f"record {brief(row.record.id)}: the answer itself is not kept")
        if row.is_answered and row.record.reference is None and task != "vicuna-80":
            raise EvaluationError(
                f"record {brief(row.record.id)}: no right answer to judge by; give --data"
            )
        line = {"task": task, **record_to_json(row.record), "answers": list(row.answers)}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path, text = folder / PREDICTIONS, "".join(lines)
    if path.exists() and read_bytes(path, error=EvaluationError, limit=MAX_BYTES) != text.encode():
        raise EvaluationError(f"{folder}: holds other answers. Choose another --out")
    if not path.exists() and (folder / SCORE_FILE).exists():
        raise EvaluationError(
            f"{folder}: holds the {SCORE_FILE} of another run. Choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def read_verdicts(
    path: Path, *, task: str, parse: Parse | None = None
) -> tuple[dict[str, dict[str, Verdict]], str | None]:
    """The last readable verdict on each aspect of each record, by id; and who judged.

    Where several judges were asked, or one on several versions of the prompts, what was asked last
    counts and the rest does not.
    """
    verdicts: dict[str, dict[str, Verdict]] = {}
    if not path.exists():
        return verdicts, None
    lines = [line for line in read_judgments(path) if line.get("task") == task]
    judge = lines[-1].get("judge") if lines else None
    for line in lines:
        if asked_as(line) != asked_as(lines[-1]):
            continue
        verdict = line.get("verdict")
        if parse is not None and line.get("reply"):
            verdict = parse(line["aspect"], line["reply"])
        if verdict is not None:
            verdicts.setdefault(line["id"], {})[line["aspect"]] = verdict
    return verdicts, judge


def asked_as(line: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Which judge a line of judgements is from, and on which version of the prompts."""
    return line.get("judge"), line.get("version")


def read_judgments(path: Path) -> list[dict[str, Any]]:
    """The lines of a `judgements.jsonl`, each of the shape that a run writes."""
    lines, _ = read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        line["id"] = id_of(field_of(line, ("id",), where=where), where=where)
        for name, kind in _JUDGED.items():
            if not isinstance(line.get(name), kind):
                found = brief(line.get(name))
                raise EvaluationError(f"{where}: {name} is not as a run writes it: {found}")
    return lines


def without_repeats(rows: Iterable[Row], *, where: str) -> tuple[list[Row], tuple[str, ...]]:
    """Rows with each record once. A repeat of the same answer is noted, another is refused.

    A record is known by its id, what it asks and of which moment: some benchmarks give a video's
    id to all its questions, MovieChat asks the same at several frames. Where two questions share
    an id, each is named after all of these.
    """
    kept: dict[str, Row] = {}
    repeats = 0
    for row in rows:
        key = _full_name(row.record)
        earlier = kept.get(key)
        if earlier is None or not earlier.answers:
            # A record whose image was missing at first may be answered by a later run.
            kept[key] = row
        elif row.answers in (earlier.answers, ()):
            repeats += 1
        else:
            raise EvaluationError(
                f"{where}: id {brief(row.record.id)} has two answers, "
                f"{earlier.answer[:40]!r} and {row.answer[:40]!r}"
            )
    note = (f"{repeats} repeated answers are counted once",) if repeats else ()
    records = told_apart([row.record for row in kept.values()])
    found = [replace(row, record=r) for row, r in zip(kept.values(), records, strict=True)]
    return found, note


def told_apart(records: Sequence[Record]) -> list[Record]:
    """The records, those that share an id named after id and question."""
    seen = Counter(record.id for record in records)
    return [
        replace(record, id=_full_name(record)) if seen[record.id] > 1 else record
        for record in records
    ]


def unique_records(records: Sequence[Record], *, where: str) -> list[Record]:
    """A benchmark's records told apart; an id that comes twice with one question is refused."""
    apart = told_apart(records)
    list(unique((record.id for record in apart), where=where))
    return apart


def _full_name(record: Record) -> str:
    moment = f" @{record.metadata['time']}" if "time" in record.metadata else ""
    return f"{record.id}: {_plain(record.question)}{moment}"


def moment_of(item: Mapping[str, Any]) -> dict[str, str]:
    """The fact of which frame a question asks; seconds that an answer took are no such.

    >>> moment_of({"time": 100}), moment_of({"time": "100"}), moment_of({"time": 1.25})
    ({'time': '100'}, {'time': '100'}, {})
    """
    time = item.get("time")
    is_whole = not isinstance(time, bool) and re.fullmatch(r"\d{1,9}", str(time)) is not None
    return {"time": str(time)} if is_whole else {}


def _plain(question: str) -> str:
    """A question without what files spell differently: case, punctuation, white space."""
    return " ".join(re.findall(r"\w+", question.lower()))


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
        row = by_id.get(record.id)
        if row is not None and (predictions.is_ours or _asks_the_same(record, row.record)):
            found[record.id] = by_id.pop(record.id)
    for record in records:
        names = [*_aliases(record), _full_name(record)]
        if record.id not in found and (row := _take(by_id, names, record)):
            found[record.id] = row
    others: dict[str, list[str]] = {}
    for id_, row in by_id.items():
        for alias in (*_aliases(row.record), _full_name(row.record)):
            others.setdefault(alias, []).append(id_)
    for record in records:
        names = [id_ for name in (record.id, *_aliases(record)) for id_ in others.get(name, ())]
        if record.id not in found and (row := _take(by_id, names, record)):
            found[record.id] = row
    rows = [replace(found.get(r.id, Row(record=r)), record=r) for r in records]
    if by_id and len(by_id) == len(predictions.rows):
        raise EvaluationError(
            f"{data}: knows none of the {len(by_id)} answered ids, such as "
            f"{brief(next(iter(by_id)))}, or has other questions under them; its own are like "
            f"{brief(records[0].id) if records else 'none'}"
        )
    notes = predictions.notes
    if by_id:
        some = ", ".join(id_[:60] for id_ in list(by_id)[:3])
        notes = (*notes, f"{len(by_id)} answers to ids that the data does not have: {some}")
    return replace(predictions, rows=tuple(rows), notes=notes)


def _take(by_id: dict[str, Row], names: Iterable[str], record: Record) -> Row | None:
    """The row under one of the names whose question is nearest to the record's, taken out."""
    known = [n for n in names if n in by_id and _asks_the_same(record, by_id[n].record)]
    asked = len(_plain(record.question))
    nearest = min(
        known, key=lambda n: abs(len(_plain(by_id[n].record.question)) - asked), default=None
    )
    return None if nearest is None else by_id.pop(nearest)


def _asks_the_same(record: Record, other: Record) -> bool:
    """Whether one question is in the other: result files may keep a prompt around it."""
    times = {r.metadata["time"] for r in (record, other) if "time" in r.metadata}
    if len(times) > 1:
        return False
    one, two = _plain(record.question), _plain(other.question)
    return one in two or two in one


def _aliases(record: Record) -> Sequence[str]:
    return record.texts("aliases")


def number(value: Any) -> float | None:
    """A finite number from a number or its text, else None.

    >>> number("4.5"), number(float("nan")), number("good"), number(True)
    (4.5, None, None, None)
    """
    if isinstance(value, bool) or value is None:
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


_SCORES = ("score", "socre", "scores", "rating", "grade")  # as judges and scripts spell it
_OUT_OF = re.compile(r"([-+\d.]+)\s*(?:/|out of)\s*\d+")


def score_of(verdict: Verdict | None, *, low: float, high: float) -> float | None:
    """The score of a verdict; None where it has none, or one beyond the scale.

    >>> score_of({"Score": 4}, low=0, high=5), score_of({"socre": "3.5/5"}, low=0, high=5)
    (4.0, 3.5)
    >>> score_of({"score": 50}, low=0, high=5)
    """
    lowered = {str(name).strip().lower(): value for name, value in (verdict or {}).items()}
    value = next((lowered[name] for name in _SCORES if name in lowered), None)
    if isinstance(value, str) and (said := _OUT_OF.fullmatch(value.strip())):
        value = said[1]
    found = number(value)
    return found if found is not None and low <= found <= high else None
