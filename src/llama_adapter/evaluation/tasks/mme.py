"""MME: two yes/no questions an image in 14 subtasks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.jsonfiles import (
    brief,
    items_of,
    read_objects,
    read_text,
    text_of,
)
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
QUESTIONS = dict(
    zip(SUBTASKS, (60, 60, 60, 60, 294, 340, 400, 400, 400, 40, 140, 40, 40, 40), strict=True)
)
"""How many the benchmark asks."""
_SUFFIXES = (".jpg", ".png", ".jpeg")
_ANSWERS = frozenset(("yes", "no"))
_IDS = ("question_id", "id", "image", "image_path")
_ASKED = ("prompt", "question")
_SAID = ("text", "pred", "prediction", "response", "output", "model_answer")
_GOLD = ("gt", "gt_answer", "ground_truth", "answer", "label")
_REQUEST = re.compile(r"\s*(?:please answer yes or no|answer the question using)\b", re.I)
"""What scripts put after a question, or leave out."""
_SUMS = 4  # right answers, questions, images with both right, images


def read(inputs: Inputs) -> list[Record]:
    """The benchmark's folders, or the 14 template files of {image, question, answer}."""
    folder = inputs.data
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: expected a folder with MME's 14 subtasks")
    texts = _subtask_files(folder)
    folders = {_plain(path.name): path for path in sorted(folder.iterdir()) if path.is_dir()}
    records: list[Record] = []
    for subtask in SUBTASKS:
        if subtask in texts:
            records += [row.record for row in _rows(texts[subtask], subtask)]
        elif _plain(subtask) in folders:
            records += _released(folders[_plain(subtask)], subtask)
    if not records:
        raise EvaluationError(f"{folder}: lacks MME's subtasks, such as {SUBTASKS[0]}")
    return records


def _plain(name: str) -> str:
    """A subtask's name as files and folders spell it."""
    return name.lower().replace(" ", "_").replace("-", "_")


def _subtask_files(folder: Path) -> dict[str, Path]:
    """The result files in a folder by subtask."""
    files = {_plain(path.stem): path for path in sorted(folder.glob("*.[tT][xX][tT]"))}
    return {subtask: files[_plain(subtask)] for subtask in SUBTASKS if _plain(subtask) in files}


def _released(folder: Path, subtask: str) -> list[Record]:
    """One text file of `question<TAB>answer` lines an image, next to it or in folders apart."""
    parted = folder / "questions_answers_YN"
    texts = sorted((parted if parted.is_dir() else folder).glob("*.txt"))
    images = folder / "images" if (folder / "images").is_dir() else folder
    names = {p.stem: p.name for p in sorted(images.iterdir()) if p.suffix != ".txt"}
    records = []
    for path in texts:
        name = _Namer(subtask)
        for number, line in enumerate(read_text(path, lenient=True).split("\n"), start=1):
            if not line.strip():
                continue
            fields = _fields(line, before=1)
            if fields is None:
                raise EvaluationError(
                    f"{path}: line {number} must be question and Yes or No, separated by a tab; "
                    f"found {line[:60]!r}"
                )
            image = names.get(path.stem, path.stem + ".jpg")
            records.append(name.record(image, fields[0].strip(), fields[1]))
    return records


def _fields(line: str, *, before: int) -> list[str] | None:
    """Fields before the question's end, the right answer and the rest, if any; None without one.

    A question may hold tabs: the right answer is the first field after it that is a yes or no.
    """
    fields = line.rstrip("\r").split("\t")
    place = next((i for i, f in enumerate(fields) if i >= before and _is_answer(f)), None)
    if place is None:
        return None
    parts = fields[before - 1 : place]
    question = parts[0] if len(parts) == 1 else " ".join(" ".join(parts).split())
    rest = fields[place + 1 :]
    return [*fields[: before - 1], question, fields[place], *["\t".join(rest)] * bool(rest)]


def _is_answer(field: str) -> bool:
    return field.strip().lower() in _ANSWERS


class _Namer:
    """Makes a subtask's records as their lines come, two questions to a unit."""

    def __init__(self, subtask: str) -> None:
        self._subtask = subtask
        self._asked: dict[str, list[str]] = defaultdict(list)

    def record(self, image: str, question: str, reference: str) -> Record:
        """A record named after its right answer: result files differ in the order of the two."""
        reference = reference.strip().lower()
        earlier = self._asked[image]
        again = earlier.count(reference)
        unit = image if len(earlier) < 2 else f"{image}#{len(earlier) // 2 + 1}"
        earlier.append(reference)
        return Record(
            id=f"{self._subtask}/{image}/{reference}" + (f"-{again + 1}" if again else ""),
            questions=(question,),
            reference=reference,
            images=(f"{self._subtask}/{image}",),
            metadata={"subtask": self._subtask, "image": unit},
        )


def _rows(path: Path, subtask: str) -> list[Row]:
    """Lines of image, question, right answer and, in result files, the model's answer."""
    name = _Namer(subtask)
    rows: list[Row] = []
    for number, line in enumerate(read_text(path, lenient=True).split("\n"), start=1):
        if not line.strip():
            continue
        if "\t" not in line and rows and rows[-1].answers:
            # an answer of several lines: what follows the first is not a line of its own
            rows[-1] = replace(rows[-1], answers=(f"{rows[-1].answer}\n{line}",))
            continue
        fields = _fields(line, before=2)
        if fields is None:
            raise EvaluationError(
                f"{path}: line {number} must be image, question, Yes or No, answer, separated by "
                f"tabs; found {line[:60]!r}"
            )
        rows.append(Row(record=name.record(*fields[:3]), answers=tuple(fields[3:])))
    return rows


def read_public(path: Path) -> Predictions:
    """The 14 files of MME's evaluation tool, with the model's answers in the fourth column.

    Also lines of {question_id: subtask/image, prompt, text}, as LLaVA's scripts write them.
    """
    if path.suffix.lower() in (".jsonl", ".json") and not path.is_dir():
        return _read_lines(path)
    if not path.is_dir():
        raise EvaluationError(f"{path}: expected a folder with MME's 14 result files")
    found = _subtask_files(path)
    if not found:
        inner = {p: files for p in sorted(path.glob("**/")) if (files := _subtask_files(p))}
        if len(inner) > 1:
            names = ", ".join(str(p.relative_to(path)) for p in list(inner)[:4])
            raise EvaluationError(f"{path}: holds several results, {names}; name one of them")
        found = next(iter(inner.values()), {})
    lines = sorted(path.glob("*.jsonl"))
    if not found and len(lines) == 1:
        return _read_lines(lines[0])
    if not found:
        raise EvaluationError(f"{path}: holds none of MME's result files, such as existence.txt")
    rows = [_as_answer(row) for name, file in found.items() for row in _rows(file, name)]
    return Predictions(rows=tuple(rows))


def _read_lines(path: Path) -> Predictions:
    """An answer a line; its right answer need not be there, then the data's question tells which.

    Raises EvaluationError where a line names no subtask of MME.
    """
    items, is_cut = read_objects(path)
    namers = {_plain(subtask): (subtask, _Namer(subtask)) for subtask in SUBTASKS}
    rows = []
    for line in items_of(items, f"{path}: line"):
        item, where = line.fields, line.where
        folder, _, image = line.id(*_IDS).replace("\\", "/").rpartition("/")
        said = next((key for key in _SAID if key in item), "answer")
        answers = (line.text(said),)
        reference = text_of(
            next((item[k] for k in _GOLD if k in item and k != said), None), where=where
        )
        category = text_of(item.get("category"), where=where) or folder.split("/")[-1]
        if _plain(category) not in namers:
            raise EvaluationError(f"{where}: {brief(category)} is not a subtask of MME")
        subtask, namer = namers[_plain(category)]
        asked = text_of(next((item[k] for k in _ASKED if k in item), None), where=where)
        asked = _REQUEST.split(asked)[0]
        if _is_answer(reference):
            rows.append(
                _as_answer(Row(record=namer.record(image, asked, reference), answers=answers))
            )
            continue
        stem, places = PurePosixPath(image).stem, ("yes", "no", "yes-2", "no-2")
        aliases = [f"{subtask}/{stem}{s}/{place}" for s in ("", *_SUFFIXES) for place in places]
        metadata = {"subtask": subtask, "image": image, "aliases": aliases}
        record = Record(id=f"{subtask}/{image}", questions=(asked,), metadata=metadata)
        rows.append(Row(record=record, answers=answers))
    return Predictions.of_file(rows, path, is_cut=is_cut)


def _as_answer(row: Row) -> Row:
    """An answer is found by subtask, image and right answer, whatever the image's suffix.

    Some converters write `0001.txt`, the file of the questions, for `0001.jpg`, or put a folder
    before it; the question may be worded for the model.
    """
    subtask, _, rest = row.record.id.partition("/")
    image, _, reference = rest.rpartition("/")
    stem = PurePosixPath(image.replace("\\", "/")).stem
    aliases = [f"{subtask}/{stem}{suffix}/{reference}" for suffix in ("", *_SUFFIXES)]
    metadata = {**row.record.metadata, "aliases": aliases}
    return replace(row, record=replace(row.record, questions=("",), metadata=metadata))


def count(predictions: Predictions, _: Counting) -> Tally:
    """100 · (accuracy + accuracy+) by subtask, as MME's own tool counts: no answer is wrong."""
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    asked: Counter[str] = Counter()
    unanswered = unparsed = 0
    if any(row.record.reference is None for row in predictions.rows):
        raise EvaluationError("mme needs the right answers; give --data")
    for row in predictions.rows:
        said = parse_yes_no(row.answer)
        unanswered += not row.is_answered
        unparsed += row.is_answered and said is None
        subtask, image = row.record.required("subtask"), row.record.required("image")
        if subtask not in SUBTASKS:
            raise EvaluationError(f"{row.record.id[:60]}: {brief(subtask)} is not a subtask of MME")
        asked[subtask] += 1
        images[subtask, str(image)].append(said == row.record.reference)
    sums = np.zeros((len(images), len(SUBTASKS), _SUMS))
    odd = 0
    for unit, ((subtask, _image), right) in enumerate(images.items()):
        odd += len(right) != 2
        sums[unit, SUBTASKS.index(subtask)] = sum(right), len(right), all(right), 1
    present = {subtask for subtask, _ in images}
    missing = [subtask for subtask in SUBTASKS if subtask not in present]
    notes = [f"{odd} images do not have two questions each"] if odd else []
    if (unanswered or unparsed) and unanswered < len(predictions.rows):
        notes.append("what is unanswered or not read as yes or no counts as wrong, as published")
    short = [
        f"{n} of {QUESTIONS[name]} of {name}" for name, n in asked.items() if n < QUESTIONS[name]
    ]
    if short:
        notes.append(f"the benchmark asks more than is here: {', '.join(short)}")
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
    part=lambda record: str(record.metadata["subtask"]),
    media="image",
    generation=Generation(max_new_tokens=16),
)
