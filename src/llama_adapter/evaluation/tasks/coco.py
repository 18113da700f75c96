"""COCO Caption: one caption an image, compared with several references."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.captions import caption_metrics, caption_sums
from llama_adapter.evaluation.jsonfiles import field_of, find_file, read_json, read_objects
from llama_adapter.evaluation.predictions import Predictions, without_repeats
from llama_adapter.evaluation.records import Record, Row, Tally
from llama_adapter.evaluation.tasks.base import Counting, Generation, Inputs, Task

_IDS = ("image_id", "image_name", "image", "file_name", "filename", "cocoid", "id")
_Names = tuple[Any, ...]
_CAPTIONS = ("caption", "prediction", "pred", "text", "answer")
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
    """References: COCO annotations, Karpathy's file, or a list of {image, captions}."""
    path = find_file(inputs.data, _FILES, what="captions")
    content = read_json(path)
    split = inputs.split or "test"
    if isinstance(content, dict) and "annotations" in content:
        pairs = _from_annotations(content)
    elif isinstance(content, dict) and "images" in content:
        pairs = _from_karpathy(content, split)
    elif isinstance(content, dict):
        pairs = [((name,), _texts(value)) for name, value in content.items()]
    else:
        pairs = _from_list(content, where=str(path))
    merged: dict[str, tuple[_Names, list[str]]] = {}
    for names, captions in pairs:
        merged.setdefault(image_key(names[0]), (names, []))[1].extend(captions)
    if not merged:
        raise EvaluationError(f"{path}: holds no captions (for split {split!r})")
    return [
        Record(
            id=key,
            questions=("",),
            gold=captions,
            images=(str(names[0]),),
            facts={"aliases": [alias for alias in map(image_key, names[1:]) if alias != key]},
        )
        for key, (names, captions) in merged.items()
    ]


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(text) for text in value]


def _from_annotations(content: dict[str, Any]) -> list[tuple[_Names, list[str]]]:
    files = {image["id"]: image.get("file_name") for image in content.get("images", ())}
    return [
        (_names([files.get(a["image_id"]), a["image_id"]]), [a["caption"]])
        for a in content["annotations"]
    ]


def _from_karpathy(content: dict[str, Any], split: str) -> list[tuple[_Names, list[str]]]:
    return [
        (
            _names([item.get("filename"), item.get("cocoid"), item.get("imgid")]),
            [sentence["raw"] for sentence in item["sentences"]],
        )
        for item in content["images"]
        if item.get("split") == split
    ]


def _from_list(content: Sequence[dict[str, Any]], *, where: str) -> list[tuple[_Names, list[str]]]:
    pairs = []
    for number, item in enumerate(content, start=1):
        place = f"{where}: item {number}"
        field_of(item, _IDS, where=place)
        captions = field_of(item, ("captions", "caption", "references"), where=place)
        # a file name first: pictures are looked up by it
        names = _names([item.get(key) for key in (*_IDS[1:], _IDS[0])])
        pairs.append((names, _texts(captions)))
    return pairs


def _names(values: Iterable[Any]) -> _Names:
    return tuple(value for value in values if value is not None)


def read_public(path: Path) -> Predictions:
    """COCO's result format, and lists or maps of image and caption."""
    if path.is_dir():
        path = find_file(path, ("*.json", "*.jsonl"), what="one file of captions")
    content = read_json(path) if path.suffix == ".json" else read_objects(path)[0]
    if isinstance(content, dict):
        given = [(name, _texts(caption)) for name, caption in content.items()]
    else:
        given = [
            (
                field_of(item, _IDS, where=f"{path}: item {number}"),
                _texts(field_of(item, _CAPTIONS, where=f"{path}: item {number}")),
            )
            for number, item in enumerate(content, start=1)
        ]
    rows = [
        Row(record=Record(id=image_key(name), questions=("",)), answers=tuple(captions[:1]))
        for name, captions in given
    ]
    kept, notes = without_repeats(rows, where=str(path))
    return Predictions(rows=tuple(kept), notes=notes)


def count(predictions: Predictions, counting: Counting) -> Tally:
    """Corpus metrics over the images that have a caption, as COCO's own code does."""
    answered = [row for row in predictions.rows if row.is_answered]
    if any(not row.record.gold for row in answered):
        raise EvaluationError("coco-caption needs the reference captions; give --data")
    sums = caption_sums(
        [row.answer for row in answered],
        [row.record.gold for row in answered],
        tokenizer=counting.tokenizer,
    )
    notes = []
    if len(answered) < len(predictions.rows):
        missing = len(predictions.rows) - len(answered)
        notes.append(f"{missing} images without a caption are left out, as COCO's own code does")
    if sums.is_approximate:
        notes.append(
            "APPROXIMATION: without Java the PTB tokenizer is replaced by a plain one "
            "(up to 0.4 CIDEr off)" + ("" if sums.has_meteor else " and METEOR is left out")
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
    generation=Generation(max_new_tokens=32),
)
