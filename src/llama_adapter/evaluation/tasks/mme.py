"""MME: two yes/no questions an image in 14 subtasks."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import read_text
from llama_adapter.evaluation.parsing import parse_yes_no
from llama_adapter.evaluation.predictions import Predictions
from llama_adapter.evaluation.records import Floats, Record, Row, Tally, ratio, table
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Task

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
SUBTASKS = PERCEPTION + COGNITION
_SUMS = 4  # right answers, questions, images with both right, images


def read(inputs: Inputs) -> list[Record]:
    """The benchmark's folders, or the 14 template files of {image, question, answer}."""
    folder = inputs.data
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: expected a folder with MME's 14 subtasks")
    records: list[Record] = []
    for subtask in SUBTASKS:
        if (folder / f"{subtask}.txt").exists():
            records += [row.record for row in _rows(folder / f"{subtask}.txt", subtask)]
        elif (folder / subtask).is_dir():
            records += _released(folder / subtask, subtask)
    if not records:
        raise EvaluationError(f"{folder}: lacks MME's subtasks, such as {SUBTASKS[0]}")
    return records


def _released(folder: Path, subtask: str) -> list[Record]:
    """One text file of `question<TAB>answer` lines an image, beside it or in folders apart."""
    parted = folder / "questions_answers_YN"
    texts = sorted((parted if parted.is_dir() else folder).glob("*.txt"))
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    names = {p.stem: p.name for p in sorted(pictures.iterdir()) if p.suffix != ".txt"}
    return [
        _record(subtask, names.get(path.stem, path.stem + ".jpg"), *line.split("\t")[:2], n=n)
        for path in texts
        for n, line in enumerate(filter(str.strip, read_text(path).split("\n")))
    ]


def _record(subtask: str, image: str, question: str, gold: str, *, n: int) -> Record:
    return Record(
        id=f"{subtask}/{image}/{n}",
        questions=(question,),
        gold=gold.strip().lower(),
        images=(f"{subtask}/{image}",),
        facts={"subtask": subtask, "image": image},
    )


def _rows(path: Path, subtask: str) -> list[Row]:
    """Lines of image, question, right answer and, in result files, the model's answer."""
    asked: dict[str, int] = defaultdict(int)
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t", maxsplit=3)
        if len(fields) < 3 or fields[2].strip().lower() not in {"yes", "no"}:
            raise EvaluationError(
                f"{path}: line {number} must be image, question, Yes or No, answer, parted by "
                f"tabs; found {line[:60]!r}"
            )
        image = fields[0]
        record = _record(subtask, image, fields[1], fields[2], n=asked[image])
        asked[image] += 1
        rows.append(Row(record=record, answers=tuple(fields[3:])))
    return rows


def read_public(path: Path) -> Predictions:
    """The 14 files of MME's evaluation tool, with the model's answers in the fourth column."""
    if not path.is_dir():
        raise EvaluationError(f"{path}: expected a folder with MME's 14 result files")
    files = [(path / f"{subtask}.txt", subtask) for subtask in SUBTASKS]
    found = [(file, subtask) for file, subtask in files if file.exists()]
    if not found:
        raise EvaluationError(f"{path}: holds none of MME's result files, such as existence.txt")
    return Predictions(rows=tuple(row for file, subtask in found for row in _rows(file, subtask)))


def count(predictions: Predictions, _: Counting) -> Tally:
    """100 · (accuracy + accuracy+) by subtask, as MME's own tool counts: no answer is wrong."""
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    unanswered = unparsed = 0
    for row in predictions.rows:
        said = parse_yes_no(row.answer)
        unanswered += not row.is_answered
        unparsed += row.is_answered and said is None
        facts = row.record.facts
        images[facts["subtask"], facts["image"]].append(said == row.record.gold)
    sums = np.zeros((len(images), len(SUBTASKS), _SUMS))
    odd = 0
    for unit, ((subtask, _image), right) in enumerate(images.items()):
        odd += len(right) != 2
        sums[unit, SUBTASKS.index(subtask)] = sum(right), len(right), all(right), 1
    present = {subtask for subtask, _ in images}
    missing = [subtask for subtask in SUBTASKS if subtask not in present]
    notes = [f"{odd} images do not have two questions each"] if odd else []
    if unanswered or unparsed:
        notes.append("what is unanswered or not read as yes or no counts as wrong, as published")
    if missing:
        notes.append(f"totals that need them are left out: no {', '.join(missing)}")
    return Tally(
        n=len(predictions.rows),
        sums_UC=table(sums.reshape(len(images), -1), columns=_SUMS * len(SUBTASKS)),
        metrics=partial(_metrics, complete=frozenset(present)),
        unanswered=unanswered,
        unparsed=unparsed,
        notes=tuple(notes),
        protocol={"parse": "yes or no within the first four characters, else wrong"},
    )


def _metrics(totals: Floats, *, complete: frozenset[str]) -> dict[str, Floats]:
    parts = totals.reshape(*totals.shape[:-1], len(SUBTASKS), _SUMS)
    accuracy = ratio(parts[..., 0], parts[..., 1])
    plus = ratio(parts[..., 2], parts[..., 3])
    scores = 100 * (accuracy + plus)
    named = {subtask: scores[..., i] for i, subtask in enumerate(SUBTASKS) if subtask in complete}
    cut = len(PERCEPTION)
    totals_ = {"perception": scores[..., :cut].sum(-1), "cognition": scores[..., cut:].sum(-1)}
    return {**totals_, **named}


MME = Task(
    name="mme",
    summary="2,374 yes/no questions about images in 14 subtasks",
    read=read,
    prompts=lambda record: record.questions,
    count=count,
    read_public=read_public,
    media="image",
    generation=Generation(max_new_tokens=16),
)
