"""VideoInstruct (Video-ChatGPT's benchmark): free answers about videos, graded in five aspects."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    Item,
    brief,
    items_of,
    lowered,
    read_objects,
    text_of,
)
from llama_adapter.evaluation.judge_prompts import VIDEO_ASPECTS
from llama_adapter.evaluation.parsing import parse_score
from llama_adapter.evaluation.predictions import NOT_KEPT, Predictions, score_of, without_repeats
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Judging, Task
from llama_adapter.evaluation.tasks.video_qa import TOP, public_entries, split_entry

ASPECTS = ("correctness", "detail", "context", "temporal", "consistency")
PARTS = {
    "generic": ("correctness", "detail", "context"),
    "temporal": ("temporal",),
    "consistency": ("consistency",),
}
"""Which aspects the answers of each question file are graded in."""
_NAMES = {
    "correctness": ("correctness", "generic_1", "benchmark_1", "1_"),
    "detail": ("detail", "benchmark_2", "2_"),
    "context": ("context", "benchmark_3", "3_"),
    "temporal": ("temporal", "benchmark_4", "4_"),
    "consistency": ("consistency", "benchmark_5", "5_"),
}
_SHORT = {
    "ci": "correctness",
    "do": "detail",
    "cu": "context",
    "tu": "temporal",
    "co": "consistency",
}
"""As the papers' tables head them: correctness of information, detail orientation and so on."""
_SAID = ("pred", "prediction", "response", "output", "pred1", "pred2")


def read(inputs: Inputs) -> list[Record]:
    """`generic_qa.json`, `temporal_qa.json` and `consistency_qa.json`; any one alone will do."""
    folder = inputs.data if inputs.data.is_dir() else inputs.data.parent
    files = {part: sorted(folder.glob(f"**/{part}_qa.json")) for part in PARTS}
    if inputs.data.is_file():
        files = {p: [inputs.data] if p in inputs.data.name else [] for p in PARTS}
    if not any(files.values()):
        wanted = ", ".join(f"{part}_qa.json" for part in PARTS)
        raise EvaluationError(f"{inputs.data}: lacks {wanted}")
    return [
        _record(part, number_, item)
        for part, found in files.items()
        if found
        for number_, item in enumerate(
            items_of(read_objects(found[0])[0], f"{found[0]}: item", first=0)
        )
    ]


def _record(part: str, number_: int, item: Item) -> Record:
    names = ("Q1", "Q2") if part == "consistency" else ("Q",)
    return Record(
        id=f"{part}-{number_}",
        questions=tuple(map(item.text, names)),
        reference=item.text("A"),
        video=item.id("video_name"),
        metadata={"part": part},
    )


def read_public(path: Path) -> Predictions:
    """Five judged files as Video-ChatGPT's scripts store them, named after their aspects."""
    files = [path]
    if path.is_dir():
        files = sorted((*path.glob("*.json"), *path.glob("*.jsonl"), *path.glob("*/")))
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for aspect, file in _by_aspect(files, where=str(path)).items():
        entries, is_cut = public_entries(file)
        found, odd = without_repeats(
            [
                _public_row(aspect, key, entry, where=f"{file}: {brief(key)}")
                for key, entry in entries
            ],
            where=str(file),
        )
        rows += found
        notes |= dict.fromkeys([f"{file.name}: the last line was cut short"] * is_cut)
        notes |= dict.fromkeys(f"{file.name}: {note}" for note in odd)
    return Predictions(rows=tuple(rows), notes=(*notes, *_differing(rows)))


def _public_row(aspect: str, key: str, entry: Any, *, where: str) -> Row:
    verdict, question = split_entry(entry, where=where)
    item = lowered(question)
    if verdict is None and score_of(item, low=-math.inf, high=math.inf) is not None:
        verdict = item
    elif isinstance(verdict, str):  # a reply that a script kept as it came
        verdict = parse_score(verdict, low=0, high=TOP) or {}
    asked = tuple(text_of(item[n], where=where) for n in ("q", "question", "q1", "q2") if n in item)
    said = tuple(text_of(item[n], where=where) for n in _SAID if n in item)
    if verdict is not None and not said:
        said = (NOT_KEPT,) * max(1, len(asked))  # there was an answer to judge
    record = Record(
        id=f"{aspect}/{key}",
        questions=asked or ("",),
        reference=text_of(item.get("a", item.get("answer")), where=where),
        metadata={"aspects": [aspect]},
    )
    return Row(record=record, answers=said, verdicts={} if verdict is None else {aspect: verdict})


def _differing(rows: Sequence[Row]) -> list[str]:
    """Says where the files of one part judge different answers to the same question."""
    given: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for row in rows:
        aspect, _, key = row.record.id.partition("/")
        part = next(name for name, aspects in PARTS.items() if aspect in aspects)
        if row.is_answered and row.answer != NOT_KEPT:
            given.setdefault((part, key), set()).add(row.answers)
    differ = sum(len(answers) > 1 for answers in given.values())
    if not differ:
        return []
    return [f"the files judge different answers to {differ} questions: not one model's, or run's"]


def _by_aspect(files: list[Path], *, where: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        stem = file.stem.lower()
        named = [a for a, names in _NAMES.items() if any(name in stem for name in names)]
        named += [_SHORT[word] for word in re.split(r"[\W_]+", stem) if word in _SHORT]
        if named:
            found.setdefault(named[0], file)
    if not found:
        raise EvaluationError(
            f"{where}: expected result files named after {', '.join(ASPECTS)}, "
            f"found {', '.join(f.name for f in files[:5]) or 'none'}"
        )
    return found


def aspects_of(record: Record) -> tuple[str, ...]:
    """The aspects that a record's answers are graded in."""
    aspects = record.metadata.get("aspects") or PARTS.get(str(record.required("part")), ("?",))
    if not isinstance(aspects, list | tuple) or any(name not in ASPECTS for name in aspects):
        raise EvaluationError(
            f"record {brief(record.id)}: is of no part or aspect of VideoInstruct"
        )
    return tuple(aspects)


def count(predictions: Predictions, _: Counting) -> Tally:
    """Mean of the integer part of each aspect's scores, and the mean of the five."""
    sums, unanswered, unjudged, judged = [], 0, 0, 0
    for row in predictions.rows:
        line = np.zeros((len(ASPECTS), 3))
        aspects = aspects_of(row.record)
        scores = {a: score_of(row.verdicts.get(a), low=0, high=TOP) for a in aspects}
        judged += any(score is not None for score in scores.values())
        for aspect, score in scores.items():
            if score is not None:
                line[ASPECTS.index(aspect)] = int(score), score, 1
        unanswered += not row.is_answered
        unjudged += row.is_answered and None in scores.values()
        sums.append(line.ravel())
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums, columns=3 * len(ASPECTS)),
        metrics=_metrics,
        unanswered=unanswered,
        unjudged=unjudged,
        judged=judged,
        protocol={"score": "mean of the score's integer part, over judged answers"},
    )


def _metrics(totals: Floats) -> dict[str, Floats]:
    parts = totals.reshape(*totals.shape[:-1], len(ASPECTS), 3)
    whole = ratio(parts[..., 0], parts[..., 2])
    exact = ratio(parts[..., 1], parts[..., 2])
    metrics = {aspect: whole[..., i] for i, aspect in enumerate(ASPECTS)}
    # the mean is that of the five: NaN, and so not shown, where one is missing
    metrics["mean"] = whole.mean(axis=-1)
    metrics["mean_unrounded"] = exact.mean(axis=-1)
    return metrics


def judge_questions(row: Row) -> Mapping[str, Mapping[str, str]]:
    """The answer is graded in each aspect; consistency shows both answers at once."""
    record = row.record
    fields = {"question": record.question, "gold": str(record.reference), "answer": row.answer}
    if len(record.questions) > 1:
        fields |= {"question_2": record.questions[1], "answer_2": row.answers[1]}
    return dict.fromkeys(aspects_of(record), fields)


VIDEOINSTRUCT = Task(
    name="videoinstruct",
    summary="1,996 generic, 499 temporal and 499 paired questions about 500 videos",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    part=lambda record: str(record.metadata["part"]),
    media="video",
    judging=Judging(
        questions=judge_questions,
        prompts=VIDEO_ASPECTS,
        parse=lambda _, reply: parse_score(reply, low=0, high=TOP),
    ),
    generation=Generation(max_new_tokens=256),
)
