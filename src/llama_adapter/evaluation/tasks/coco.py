"""COCO Caption: one caption an image, compared with several references."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.captions import caption_metrics, caption_sums
from llama_adapter.evaluation.jsonfiles import brief, field_of, find_file, id_of, items_of, read_any
from llama_adapter.evaluation.predictions import Predictions
from llama_adapter.evaluation.records import Record, Row, Tally
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Task

_IDS = (
    "image_name", "file_name", "filename", "image", "image_id", "img_id", "cocoid", "imgid",
    "image_path", "img_path", "img",
)  # fmt: skip
_Names = tuple[Any, ...]
_CAPTIONS = ("caption", "prediction", "pred", "text", "answer")
_KARPATHY_NAMES = ("filename", "cocoid", "imgid")
_WRAPPERS = ("annotations", "predictions", "results", "images", "references")
_FILES = ("references.json", "captions.json", "dataset_coco.json", "*captions*.json", "*.json")


def image_key(name: Any) -> str:
    """One name for an image, however a file writes it.

    >>> image_key("COCO_val2014_000000391895.jpg"), image_key(391895), image_key("a/dog.png")
    ('391895', '391895', 'dog')
    """
    stem = re.split(r"[\\/]", str(name))[-1]
    stem = re.sub(r"\.(jpe?g|png|gif|webp|bmp)$", "", stem, flags=re.IGNORECASE)
    coco = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", stem)
    return str(int(coco[1])) if coco else stem


def read(inputs: Inputs) -> list[Record]:
    """References: COCO annotations, Karpathy's file, lists or maps of image and captions."""
    path = find_file(inputs.data, _FILES, what="captions")
    content, _ = read_any(path, marks=_IDS)
    split = inputs.split or "test"
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        pairs = _from_annotations(content, where=str(path))
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        pairs = _from_karpathy(content, split, where=str(path))
    else:
        if isinstance(content, list):
            content = [item for item in content if _is_of(item, split)]
        pairs = _pairs(content, ("captions", "caption", "references", "refs"), where=str(path))
    merged: dict[str, tuple[_Names, list[str]]] = {}
    for names, captions in pairs:
        merged.setdefault(image_key(names[0]), (names, []))[1].extend(captions)
    if not merged:
        raise EvaluationError(f"{path}: holds no captions (for split {split!r})")
    bare = next((key for key, (_, captions) in merged.items() if not captions), None)
    if bare is not None:
        raise EvaluationError(f"{path}: image {brief(bare)} has no captions")
    return [
        Record(
            id=key,
            questions=("",),
            reference=captions,
            images=(_file_name(names),),
            metadata={"aliases": [alias for alias in map(image_key, names[1:]) if alias != key]},
        )
        for key, (names, captions) in merged.items()
    ]


def _is_of(item: Any, split: str) -> bool:
    """Whether an item belongs to the split; one that names none belongs to any."""
    return not isinstance(item, dict) or item.get("split", split) == split


def _file_name(names: _Names) -> str:
    """The name that looks like a file's, for finding the image."""
    return next((name for name in names if isinstance(name, str) and "." in name), str(names[0]))


def _texts(value: Any, *, where: str) -> list[str]:
    """Captions in a text, an object that holds one, or a list of either."""
    match value:
        case str():
            return [value]
        case None:
            return []
        case list():
            return [text for item in value for text in _texts(item, where=where)]
        case dict():
            return _texts(
                field_of(value, (*_CAPTIONS, "raw", "sentence"), where=where), where=where
            )
        case _:
            raise EvaluationError(f"{where}: expected a caption, found {brief(value)}")


def _pairs(content: Any, keys: Sequence[str], *, where: str) -> list[tuple[_Names, list[str]]]:
    """Image names and captions from a list of objects, a map, or texts in the images' order."""
    if isinstance(content, dict):
        inner = next((content[key] for key in _WRAPPERS if key in content), None)
        if isinstance(inner, list | dict):
            return _pairs(inner, keys, where=where)
        return [((k,), _texts(v, where=f"{where}: {brief(k)}")) for k, v in content.items()]
    if not isinstance(content, list):
        raise EvaluationError(f"{where}: expected images and captions, found {brief(content)}")
    pairs: list[tuple[_Names, list[str]]] = []
    for number, item in enumerate(content):
        place = f"{where}: item {number + 1}"
        if isinstance(item, dict):
            # `id` numbers the captions where images have a name of their own
            given = _names(map(item.get, _IDS)) or (field_of(item, (*_IDS, "id"), where=place),)
            names = (*(id_of(name, where=place) for name in given), f"#{number}")
            pairs.append((names, _texts(field_of(item, keys, where=place), where=place)))
        else:
            pairs.append(((f"#{number}",), _texts(item, where=place)))
    return pairs


def _from_annotations(content: dict[str, Any], *, where: str) -> list[tuple[_Names, list[str]]]:
    images = content.get("images")
    files = {
        str(image["id"]): image.get("file_name")
        for image in (images if isinstance(images, list) else ())
        if isinstance(image, dict) and "id" in image
    }
    pairs = []
    for item in items_of(content["annotations"], f"{where}: annotation"):
        # what is published refers to the number, which need not be that of the file's name
        names = _names([item.id("image_id"), files.get(str(item.value("image_id")))])
        pairs.append((names, _texts(item.value("caption"), where=item.where)))
    return pairs


def _from_karpathy(
    content: dict[str, Any], split: str, *, where: str
) -> list[tuple[_Names, list[str]]]:
    pairs = []
    for item in items_of(content["images"], f"{where}: image"):
        if item.fields.get("split", split) != split:
            continue
        item.value(*_KARPATHY_NAMES)
        names = _names(map(item.fields.get, _KARPATHY_NAMES))
        pairs.append((names, _texts(item.value("sentences"), where=item.where)))
    return pairs


def _names(values: Iterable[Any]) -> _Names:
    return tuple(value for value in values if value is not None)


def read_public(path: Path) -> Predictions:
    """COCO's result format, and lists or maps of image and caption."""
    if path.is_dir():
        path = find_file(path, ("*.json", "*.jsonl", "*.csv"), what="one file of captions")
    content, is_cut = read_any(path, marks=_IDS)
    given = _pairs(content, _CAPTIONS, where=str(path))
    rows = [_row(names, captions) for names, captions in given]
    several = sum(len(captions) > 1 for _, captions in given)
    notes = [f"{several} images have several captions: the first counts"] if several else []
    return Predictions.of_file(rows, path, is_cut=is_cut, notes=notes)


def _row(names: _Names, captions: Sequence[str]) -> Row:
    metadata = {"aliases": [name for name in map(image_key, names[1:]) if name[:1] != "#"]}
    record = Record(id=image_key(names[0]), questions=("",), metadata=metadata)
    return Row(record=record, answers=tuple(captions[:1]))


def count(predictions: Predictions, counting: Counting) -> Tally:
    """Corpus metrics over the images that have a caption, as COCO's own code does."""
    answered = [row for row in predictions.rows if row.is_answered]
    if any(not row.record.reference for row in answered):
        raise EvaluationError("coco-caption needs the reference captions; give --data")
    if not answered:
        raise EvaluationError(f"none of {len(predictions.rows)} images has a caption")
    sums = caption_sums(
        [row.answer for row in answered],
        [row.record.reference for row in answered],
        tokenizer=counting.tokenizer,
    )
    notes = []
    if len(answered) < len(predictions.rows):
        missing = len(predictions.rows) - len(answered)
        notes.append(f"{missing} images without a caption are left out, as COCO's own code does")
    if sums.is_approximate:
        notes.append(
            "APPROXIMATION: without Java the PTB tokenizer is replaced by a plain one "
            "(up to 0.5 BLEU-1 and 0.4 CIDEr off)"
            + ("" if sums.has_meteor else " and METEOR is left out")
        )
    return Tally(
        n=len(answered),
        sums_UC=sums.sums_UC,
        metrics=caption_metrics,
        unanswered=len(predictions.rows) - len(answered),
        notes=tuple(notes),
        protocol={"tokenizer": sums.tokenizer, "approximate": sums.is_approximate},
    )


COCO_CAPTION = Task(
    name="coco-caption",
    summary="captions of COCO's Karpathy test images",
    read=read,
    prompts=lambda _: ("Generate caption of this image",),
    count=count,
    read_public=read_public,
    media="image",
    inputs=("split",),
    generation=Generation(max_new_tokens=32),
)
