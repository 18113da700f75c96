"""ScienceQA: multiple choice with and without images, by subject, context and grade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import field_of, read_json, read_objects
from llama_adapter.evaluation.parsing import parse_choice
from llama_adapter.evaluation.predictions import Predictions, without_repeats
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
SUBSETS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
_MOST_CHOICES = 5


def subsets_of(problem: Mapping[str, Any]) -> list[str]:
    """Which columns of the published table a problem counts in."""
    has_image, has_text = bool(problem.get("image")), bool(problem.get("hint"))
    grade = int(str(problem.get("grade", "grade0")).removeprefix("grade"))
    names = [_SUBJECTS.get(problem.get("subject", ""), "")]
    names += ["TXT"] * has_text + ["IMG"] * has_image + ["NO"] * (not (has_image or has_text))
    names.append("G1-6" if grade <= 6 else "G7-12")
    return [name for name in names if name]


def read(inputs: Inputs) -> list[Record]:
    """`problems.json` and `pid_splits.json`; answers alone are read where no problem is on disk."""
    folder = inputs.data if inputs.data.is_dir() else inputs.data.parent
    problems = _problems(inputs.data, folder)
    split = inputs.split or "test"
    splits = folder / "pid_splits.json"
    if splits.exists():
        content = read_json(splits)
        if split not in content:
            raise EvaluationError(f"{splits}: has no split {split!r}, only {', '.join(content)}")
        ids = [str(id_) for id_ in content[split]]
    else:
        ids = [id_ for id_, p in problems.items() if p.get("split", split) == split]
    letters = _image_answers(folder)
    records = [_record(id_, problems.get(id_), letters) for id_ in ids]
    if all(record.gold is None for record in records):
        raise EvaluationError(f"{inputs.data}: lacks problems.json (question, choices, answer)")
    return records


def _problems(data: Path, folder: Path) -> dict[str, Any]:
    found = [data] if data.is_file() else sorted(folder.glob("problems*.json"))
    merged: dict[str, Any] = {}
    for path in found:
        merged |= read_json(path)
    return merged


def _image_answers(folder: Path) -> dict[str, str]:
    path = folder / "test_img_answers.json"
    return read_json(path) if path.exists() else {}


def _record(id_: str, problem: dict[str, Any] | None, letters: Mapping[str, str]) -> Record:
    if problem is None:
        gold = LETTERS.index(letters[id_]) if id_ in letters else None
        facts = {"subsets": ["IMG"] if id_ in letters else [], "is_partial": True}
        return Record(id=id_, questions=("",), gold=gold, facts=facts)
    names = [problem["image"]] if problem.get("image") else []
    return Record(
        id=id_,
        questions=(problem["question"],),
        gold=int(problem["answer"]),
        images=tuple(f"{problem.get('split', 'test')}/{id_}/{name}" for name in names),
        facts={
            "choices": problem["choices"],
            "hint": problem.get("hint") or "",
            "subsets": subsets_of(problem),
        },
    )


def prompt(record: Record) -> tuple[str, ...]:
    """Context, question and lettered options, and how to answer."""
    choices = record.facts.get("choices", ())
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    hint = record.facts.get("hint") or "N/A"
    text = f"Context: {hint}\nQuestion: {record.question}\nOptions: {options}\n"
    return (text + 'Reply in the form "The answer is X."',)


def read_public(path: Path) -> Predictions:
    """The official {results, outputs}, a map of id to answer, or lines of {question_id, text}."""
    stated: dict[str, Any] | None = None
    if path.suffix == ".json" and isinstance(content := read_json(path), dict):
        if "results" in content:
            stated = {key: content[key] for key in ("correct", "count") if key in content}
            outputs = content.get("outputs", {})
            pairs = [
                _stored(str(id_), index, outputs.get(id_))
                for id_, index in content["results"].items()
            ]
        else:
            pairs = [_row(str(id_), answer) for id_, answer in content.items()]
        return Predictions(rows=tuple(pairs), stated=stated)
    objects, is_cut = read_objects(path)
    rows = []
    for n, item in enumerate(objects, start=1):
        where = f"{path}: item {n}"
        id_ = field_of(item, ("question_id", "id", "pid"), where=where)
        answer = field_of(item, ("text", "answer", "pred", "prediction", "output"), where=where)
        rows.append(_row(str(id_), answer))
    kept, notes = without_repeats(rows, where=str(path))
    cut = ("the last line was cut short and is left out",) if is_cut else ()
    return Predictions(rows=tuple(kept), notes=(*cut, *notes))


def _row(id_: str, answer: Any) -> Row:
    text = LETTERS[answer] if isinstance(answer, int) else str(answer)
    return Row(record=Record(id=id_, questions=("",)), answers=(text,))


def _stored(id_: str, index: Any, output: str | None) -> Row:
    """The official files keep the index that was counted: guessed where no letter was found."""
    chosen = index if isinstance(index, int) and 0 <= index < len(LETTERS) else None
    text = output or (LETTERS[chosen] if chosen is not None and output is None else "")
    return Row(
        record=Record(id=id_, questions=("",)),
        answers=(text,),
        verdicts={"stored": {"index": chosen}},
    )


def count(predictions: Predictions, _: Counting) -> Tally:
    """Accuracy by subset; an answer without a readable letter counts as wrong.

    Where a result file stores the choice it counted, that one counts, as published (there,
    guesses stand in for unreadable answers); `accuracy_unparsed_as_wrong` shows the other way.
    """
    rows = predictions.rows
    columns = ("all", *SUBSETS)
    sums, unanswered, unparsed = [], 0, 0
    for row in rows:
        choices = len(row.record.facts.get("choices", ())) or _MOST_CHOICES
        parsed = parse_choice(row.answer, choices=choices)
        unanswered += not row.answer.strip()
        unparsed += bool(row.answer.strip()) and parsed is None
        stored = row.verdicts.get("stored", {}).get("index", parsed)
        gold = row.record.gold
        line = np.zeros((len(columns), 4))
        if gold is not None:
            for name in ("all", *row.record.facts.get("subsets", ())):
                line[columns.index(name)] = stored == gold, parsed == gold, 1, row.is_answered
        sums.append(line.ravel())
    fixed, notes = _coverage(rows, predictions.stated)
    known = [name for name in columns if name not in notes]
    return Tally(
        n=len(rows),
        sums_UC=table(sums, columns=4 * len(columns)),
        metrics=lambda totals: _metrics(totals, columns, known),
        unanswered=unanswered,
        unparsed=unparsed,
        notes=tuple(dict.fromkeys(notes.values())),
        fixed=fixed,
        protocol={"parse": 'a lone letter, a leading "X. ", exactly one "The answer is X."'},
    )


def _coverage(
    rows: Sequence[Row], stated: Mapping[str, Any] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """What cannot be counted from the data at hand, and what the file itself says in its place."""
    unknown = [row for row in rows if row.record.gold is None]
    if len(unknown) == len(rows):
        raise EvaluationError("scienceqa needs the right answers; give --data")
    partial = [row for row in rows if row.record.facts.get("is_partial")]
    notes = {}
    if partial:
        text = f"problems of {len(partial)} of {len(rows)} records are not on disk"
        # which records have images is known as soon as all answers to those are there
        hidden = [name for name in SUBSETS if name != "IMG"]
        notes = dict.fromkeys(hidden, f"{text}: {', '.join(hidden)} are not counted")
    if not unknown:
        return {}, notes
    share = f"right answers of {len(unknown)} of {len(rows)} records are not on disk"
    if stated and stated.get("count") == len(rows) and "correct" in stated:
        known_right = sum(_stored_right(row) for row in rows if row.record.gold is not None)
        if not known_right <= stated["correct"] <= known_right + len(unknown):
            raise EvaluationError(
                f"the file states {stated['correct']} correct answers; the data at hand "
                f"shows {known_right} among {len(rows) - len(unknown)}"
            )
        notes["all"] = (
            f"{share}: accuracy is the file's own count of correct answers, which those on disk "
            "do not contradict"
        )
        return {"accuracy": 100 * stated["correct"] / stated["count"]}, notes
    notes["known"] = f"{share}: accuracy counts only the others"
    return {}, notes


def _stored_right(row: Row) -> bool:
    stored = row.verdicts.get("stored", {}).get("index")
    return bool(stored == row.record.gold)


def _metrics(totals: Floats, columns: Sequence[str], known: Sequence[str]) -> dict[str, Floats]:
    parts = totals.reshape(*totals.shape[:-1], len(columns), 4)
    values = 100 * ratio(parts[..., 0], parts[..., 2])
    strict = 100 * ratio(parts[..., 1], parts[..., 2])
    answered = 100 * ratio(parts[..., 1], parts[..., 3])
    everything = {name: values[..., i] for i, name in enumerate(columns) if name in known}
    if "all" in everything:
        return {
            "accuracy": everything.pop("all"),
            **everything,
            "accuracy_unparsed_as_wrong": strict[..., 0],
            "accuracy_answered_only": answered[..., 0],
        }
    return everything


SCIENCEQA = Task(
    name="scienceqa",
    summary="4,241 multiple-choice questions of school science",
    read=read,
    prompts=prompt,
    count=count,
    read_public=read_public,
    media="image",
    generation=Generation(max_new_tokens=128),
)
