"""ScienceQA: multiple choice with and without images, by subject, context and grade."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    brief,
    field_of,
    id_of,
    keys_of,
    read_any,
    read_json,
    text_of,
)
from llama_adapter.evaluation.parsing import parse_choice, parse_choice_in_any_form
from llama_adapter.evaluation.predictions import Predictions, number
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
SUBSETS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
_MOST_CHOICES = 5
_SUMS = 5  # right as counted, by the strict rule, in any form; answered; all
_LISTS = ("results", "preds", "predictions", "answers")
_IDS = ("question_id", "id", "pid", "qid")
_TEXTS = ("text", "answer", "pred", "prediction", "output", "response")
_BRACKETED = re.compile(r"The answer is \(([A-Z])\)")


def subsets_of(problem: Mapping[str, Any]) -> list[str]:
    """Which columns of the published table a problem counts in."""
    has_image, has_text = bool(problem.get("image")), bool(problem.get("hint"))
    grade = str(problem.get("grade", "")).removeprefix("grade")
    names = [_SUBJECTS.get(str(problem.get("subject")), "")]
    names += ["TXT"] * has_text + ["IMG"] * has_image + ["NO"] * (not (has_image or has_text))
    if grade.isdecimal():
        names.append("G1-6" if int(grade) <= 6 else "G7-12")
    return [name for name in names if name]


def read(inputs: Inputs) -> list[Record]:
    """`problems.json` and `pid_splits.json`; answers alone are read where no problem is on disk."""
    folder, problems = _problems(inputs.data)
    split = inputs.split or "test"
    splits = folder / "pid_splits.json"
    if splits.exists():
        content = _object(splits)
        if not isinstance(content.get(split), list):
            raise EvaluationError(f"{splits}: has no split {split!r}, only {keys_of(content)}")
        ids = [id_of(id_, where=str(splits)) for id_ in content[split]]
    else:
        ids = [id_ for id_, p in problems.items() if p.get("split", split) == split]
    path = folder / "test_img_answers.json"
    letters = _object(path) if path.exists() else {}
    records = [
        _record(id_, problems.get(id_), letters, position=n, where=f"{inputs.data}: problem {id_}")
        for n, id_ in enumerate(ids)
    ]
    if all(record.reference is None for record in records):
        raise EvaluationError(f"{inputs.data}: lacks problems.json (question, choices, answer)")
    return records


def _problems(data: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder of the benchmark's files, and the problems in it by id."""
    if data.is_file():
        found = [data]
    elif data.is_dir():
        found = sorted(data.glob("problems*.json")) or sorted(data.glob("**/problems*.json"))
    else:
        raise EvaluationError(f"{data}: no such file or folder; expected problems.json")
    merged: dict[str, dict[str, Any]] = {}
    for path in found:
        content = _object(path)
        odd = next((id_ for id_, item in content.items() if not isinstance(item, dict)), None)
        if odd is not None:
            raise EvaluationError(f"{path}: {odd} must be a problem, found {brief(content[odd])}")
        merged |= content
    return (found[0].parent if found else data), merged


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise EvaluationError(f"{path}: expected an object, found {brief(content)}")
    return content


def _record(
    id_: str,
    problem: dict[str, Any] | None,
    letters: Mapping[str, str],
    *,
    position: int,
    where: str,
) -> Record:
    aliases = [f"#{position}"]
    if problem is None:
        known = letters.get(id_, "") in [*LETTERS]
        reference = LETTERS.index(letters[id_]) if known else None
        metadata = {"subsets": ["IMG"] if known else [], "is_partial": True, "aliases": aliases}
        return Record(id=id_, questions=("",), reference=reference, metadata=metadata)
    choices = field_of(problem, ("choices",), where=where)
    answer = field_of(problem, ("answer",), where=where)
    if not isinstance(choices, list) or answer not in range(len(choices)):
        found = brief(answer)
        raise EvaluationError(f"{where}: answer must be the place of a choice, found {found}")
    names = [problem["image"]] if problem.get("image") else []
    return Record(
        id=id_,
        questions=(text_of(field_of(problem, ("question",), where=where), where=where),),
        reference=int(answer),
        images=tuple(f"{problem.get('split', 'test')}/{id_}/{name}" for name in names),
        metadata={
            "choices": [text_of(choice, where=where) for choice in choices],
            "hint": text_of(problem.get("hint"), where=where),
            "subsets": subsets_of(problem),
            "aliases": aliases,
        },
    )


def prompt(record: Record) -> tuple[str, ...]:
    """Context, question and lettered options, and how to answer."""
    choices = record.texts("choices")
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    hint = record.metadata.get("hint") or "N/A"
    text = f"Context: {hint}\nQuestion: {record.question}\nOptions: {options}\n"
    return (text + 'Reply in the form "The answer is X."',)


def read_public(path: Path) -> Predictions:
    """The official {results, outputs}, maps of id to answer, lists, or {question_id, text} lines.

    Lists without ids (multimodal chain of thought's `preds`) are in the order of the split.
    """
    content, is_cut = read_any(path, marks=_IDS)
    outputs: Mapping[str, Any] = {}
    stated = None
    if isinstance(content, dict):
        stated = {key: content[key] for key in ("acc", "correct", "count") if key in content}
        if isinstance(content.get("outputs"), dict):
            outputs = content["outputs"]
        inner = next((content[key] for key in _LISTS if key in content), content)
        content = inner if isinstance(inner, dict | list) else content
    given = list(_answers(content, where=str(path)))
    # where all of them are numbers, they are the places of choices
    are_places = all(_place(answer) is not None for _, answer, _ in given)
    rows = [
        _stored(id_, _choice(answer), outputs.get(id_))
        if outputs or are_places
        else Row(record=Record(id=id_, questions=(asked,)), answers=(_as_text(answer),))
        for id_, answer, asked in given
    ]
    return Predictions.of_file(rows, path, is_cut=is_cut, stated=stated)


def _answers(content: Any, *, where: str) -> Iterator[tuple[str, Any, str]]:
    """Ids and answers, in whatever way they are paired, and what was asked next to a place."""
    if isinstance(content, dict):
        for id_, item in content.items():
            is_object = isinstance(item, dict)
            said = _said(item, where=f"{where}: {brief(id_)}") if is_object else item
            yield str(id_), said, ""
        return
    if not isinstance(content, list):
        raise EvaluationError(f"{where}: expected answers by id, found {brief(content)}")
    for n, item in enumerate(content):
        if isinstance(item, dict):
            place = f"{where}: item {n + 1}"
            id_ = id_of(field_of(item, _IDS, where=place), where=place)
            asked = text_of(item.get("question"), where=place) if id_[:1] == "#" else ""
            yield id_, _said(item, where=place), asked
        else:
            yield f"#{n}", item, ""


def _said(item: Mapping[str, Any], *, where: str) -> Any:
    """The answer in an object; null says that there is none."""
    name = next((name for name in _TEXTS if name in item), None)
    return field_of(item, _TEXTS, where=where) if name is None else item[name]


def _place(answer: Any) -> int | None:
    """The place of a choice that is given by number; -1 is how files write that there is none."""
    if isinstance(answer, str) and re.fullmatch(r"-?\d{1,2}", answer.strip()):
        answer = int(answer)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) else None


def _choice(answer: Any) -> int | None:
    is_letter = isinstance(answer, str) and re.fullmatch(r"[A-Za-z]", answer.strip())
    return LETTERS.index(answer.strip().upper()) if is_letter else _place(answer)


def _as_text(answer: Any) -> str:
    place = None if isinstance(answer, str) else _place(answer)
    if place is not None:
        return LETTERS[place] if 0 <= place < len(LETTERS) else ""
    text = "" if answer is None else str(answer)
    bracketed = _BRACKETED.findall(text)
    # multimodal chain of thought puts its letters in brackets, always
    return bracketed[0] if len(bracketed) == 1 else text


def _stored(id_: str, place: int | None, output: Any) -> Row:
    """The official files keep the place that was counted: guessed where no letter was found."""
    chosen = place if place is not None and 0 <= place < len(LETTERS) else None
    given = LETTERS[chosen] if chosen is not None else ""
    return Row(
        record=Record(id=id_, questions=("",)),
        answers=(given if output is None else str(output),),
        verdicts={"stored": {"index": chosen}},
    )


def count(predictions: Predictions, _: Counting) -> Tally:
    """Accuracy by subset; an answer without a readable letter counts as wrong.

    Where a result file stores the choice it counted, that one counts, as published (there,
    guesses replace unreadable answers); `accuracy_unparsed_as_wrong` shows the other way.
    """
    rows = predictions.rows
    columns = ("all", *SUBSETS)
    sums, unanswered, unparsed, in_other_forms = [], 0, 0, 0
    for row in rows:
        given = row.record.texts("choices") or [""] * _MOST_CHOICES
        parsed = parse_choice(row.answer, choices=len(given))
        stored = row.verdicts.get("stored", {}).get("index", parsed)
        loose = parse_choice_in_any_form(row.answer, choices=given) if parsed is None else parsed
        unanswered += not row.answer.strip()
        unparsed += bool(row.answer.strip()) and parsed is None
        in_other_forms += loose is not None and parsed is None
        reference = row.record.reference
        line = np.zeros((len(columns), _SUMS))
        if reference is not None:
            counted = (
                stored == reference,
                parsed == reference,
                loose == reference,
                row.is_answered,
                1,
            )
            for name in {"all", *row.record.texts("subsets")}.intersection(columns):
                line[columns.index(name)] = counted
        sums.append(line.ravel())
    fixed, notes = _coverage(rows, predictions.stated)
    known = [name for name in columns if name not in notes]
    if in_other_forms and "all" in known:
        notes["forms"] = (
            f"{in_other_forms} answers name a choice in another form, such as (B) or its words: "
            "they are right only in accuracy_any_form"
        )
    return Tally(
        n=len(rows),
        sums_UC=table(sums, columns=_SUMS * len(columns)),
        metrics=lambda totals: _metrics(totals, columns, known, any_form=in_other_forms > 0),
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
    unknown = [row for row in rows if row.record.reference is None]
    if len(unknown) == len(rows):
        raise EvaluationError("scienceqa needs the right answers; give --data")
    partial = [row for row in rows if row.record.metadata.get("is_partial")]
    notes = {}
    if partial:
        text = f"problems of {len(partial)} of {len(rows)} records are not on disk"
        # which records have images is known as soon as all answers to those are there
        hidden = [name for name in SUBSETS if name != "IMG"]
        notes = dict.fromkeys(hidden, f"{text}: {', '.join(hidden)} are not counted")
    if not unknown:
        return {}, notes
    share = f"right answers of {len(unknown)} of {len(rows)} records are not on disk"
    count = number(stated.get("count", len(rows))) if stated else None
    correct = _stated_correct(stated, len(rows)) if stated and count == len(rows) else None
    if correct is not None:
        known_right = sum(_stored_right(row) for row in rows if row.record.reference is not None)
        if not known_right <= correct <= known_right + len(unknown):
            raise EvaluationError(
                f"the file states {correct:.0f} correct answers; the data at hand "
                f"shows {known_right} among {len(rows) - len(unknown)}"
            )
        notes["all"] = (
            f"{share}: accuracy is the file's own count of correct answers, which those on disk "
            "do not contradict"
        )
        return {"accuracy": 100 * correct / len(rows)}, notes
    notes["known"] = f"{share}: accuracy counts only the others"
    return {}, notes


def _stated_correct(stated: Mapping[str, Any], count: int) -> float | None:
    """How many answers a file says to be right, or the number that its percentage means."""
    percent = number(stated.get("acc"))
    if number(stated.get("correct")) is None and percent is not None:
        return round(percent * count / 100)
    return number(stated.get("correct"))


def _stored_right(row: Row) -> bool:
    stored = row.verdicts.get("stored", {}).get("index")
    return bool(stored == row.record.reference)


def _metrics(
    totals: Floats, columns: Sequence[str], known: Sequence[str], *, any_form: bool
) -> dict[str, Floats]:
    parts = totals.reshape(*totals.shape[:-1], len(columns), _SUMS)
    stored, strict, loose, answered, all_ = np.moveaxis(parts, -1, 0)
    values = 100 * ratio(stored, all_)
    everything = {name: values[..., i] for i, name in enumerate(columns) if name in known}
    if "all" not in everything:
        return everything
    ways = {
        "accuracy_unparsed_as_wrong": 100 * ratio(strict, all_)[..., 0],
        "accuracy_answered_only": 100 * ratio(strict, answered)[..., 0],
    }
    if any_form:
        ways["accuracy_any_form"] = 100 * ratio(loose, all_)[..., 0]
    return {"accuracy": everything.pop("all"), **everything, **ways}


SCIENCEQA = Task(
    name="scienceqa",
    summary="4,241 multiple-choice questions of school science",
    read=read,
    prompts=prompt,
    count=count,
    read_public=read_public,
    media="image",
    inputs=("split",),
    generation=Generation(max_new_tokens=128),
)
