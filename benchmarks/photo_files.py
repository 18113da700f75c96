"""The files that recipes/photos*.yaml and docs/photos.md read, made of the original downloads.

`benchmarks/photo_ids.json` names the test photos and questions of the published numbers, and COCO's
photos that the adapter was trained on: a part of Flickr8k's official test split, and a division of
COCO's and VQAv2's that is our own, by photo.

python -m benchmarks.photo_files flickr8k Flickr8k.token.txt --train Flickr_8k.trainImages.txt \
    --val Flickr_8k.devImages.txt --photos Flicker8k_Dataset --out flickr8k
python -m benchmarks.photo_files coco captions_train2014.json captions_val2014.json \
    --photos train2014 val2014 --out coco
python -m benchmarks.photo_files vqav2 --questions v2_OpenEnded_mscoco_*_questions.json \
    --annotations v2_mscoco_*_annotations.json --photos train2014 val2014 --out coco

With `--photos` the photos that are needed become links (copies on another disk) in `images` next to
the file. COCO's are called by their numbers there, `000000000009.jpg`, as in its release of 2017.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.cli.output import refusals
from llama_adapter.errors import DataError
from llama_adapter.files import read_json, read_text, write_atomically

IDS = Path(__file__).with_name("photo_ids.json")
_LARGEST = 1 << 30  # bytes; VQAv2's annotations of training are 400 MB


def flickr8k(options: argparse.Namespace) -> Path:
    """`captions.json` of Flickr8k, with the official training and validation photos."""
    splits = {}
    for split in ("train", "val"):
        splits |= dict.fromkeys(_text(getattr(options, split)).split(), split)
    splits |= dict.fromkeys(_ids("flickr8k")["test"], "test")
    captions = defaultdict(list)
    for number, line in enumerate(_text(options.tokens).splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise DataError(
                f"{options.tokens}: line {number} is {line[:80]!r}; expected name, number, tab and "
                "caption, as in Flickr8k.token.txt"
            )
        captions[name.partition("#")[0]].append(caption)
    for split in ("train", "val"):
        named = [name for name, of in splits.items() if of == split]
        without = [name for name in named if name not in captions]
        if len(without) > len(named) // 100:  # the official lists name a photo that has none
            raise DataError(
                f"{getattr(options, split)}: {len(without)} of {len(named)} photos have no caption "
                f"in {options.tokens}, such as {without[0][:80]!r}"
            )
    known = ((name, split, captions.get(name)) for name, split in sorted(splits.items()))
    return _write(
        options.out / "captions.json",
        [
            {"image": f"images/{name}", "captions": found, "split": split}
            for name, split, found in known
            if found
        ],
        wanted=_ids("flickr8k")["test"],
        found=captions,
        photos=options.photos,
    )


def coco(options: argparse.Namespace) -> Path:
    """`captions.json` of COCO's photos that are captioned here."""
    splits = {number: split for split, some in _ids("coco_captions").items() for number in some}
    captions = defaultdict(list)
    for path in options.captions:
        for row in _rows(path, "annotations", {"image_id": int, "caption": str}):
            captions[row["image_id"]].append(row["caption"])
    return _write(
        options.out / "captions.json",
        [
            {"image": _image(number), "captions": captions[number], "split": split}
            for number, split in sorted(splits.items())
            if number in captions
        ],
        wanted=splits,
        found=captions,
        photos=options.photos,
    )


def vqav2(options: argparse.Namespace) -> Path:
    """`vqa.json`: VQAv2's questions of the test split here, and those that V2 does without; of
    the latter, `unseen.json` has 892 as test questions, on photos whose captions are not learned.
    """
    splits = {number: split for split, some in _ids("vqav2").items() for number in some}
    asked = {
        row["question_id"]: row["question"]
        for path in options.questions
        for row in _rows(path, "questions", {"question_id": int, "question": str})
        if row["question_id"] in splits
    }
    answered = {
        row["question_id"]: row
        for path in options.annotations
        for row in _rows(
            path, "annotations", {"question_id": int, "image_id": int, "answers": list}
        )
        if row["question_id"] in splits
    }
    records = []
    for number, split in sorted(splits.items()):
        row = answered.get(number)
        if row is None or number not in asked:
            continue
        records.append(
            {
                "image": _image(row["image_id"]),
                "question": asked[number],
                "question_id": number,
                "question_type": row.get("question_type"),
                "answer_type": row.get("answer_type"),
                "answer": row.get("multiple_choice_answer"),
                "answers": [_answer(each, question=number) for each in row["answers"]],
                "split": split,
            }
        )
    found = {record["question_id"]: record for record in records}
    path, photos = options.out / "vqa.json", options.photos
    _write(path, records, wanted=splits, found=found, photos=photos)
    unseen = _ids("vqav2_unseen")["test"]
    records = [found[number] | {"split": "test"} for number in unseen if number in found]
    _write(options.out / "unseen.json", records, wanted=unseen, found=found, photos=None)
    return path


def _ids(name: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = json.loads(IDS.read_text())[name]
    return found


def _image(number: int) -> str:
    return f"images/{number:012d}.jpg"


def _text(path: Path) -> str:
    return read_text(path, error=DataError, limit=_LARGEST)


def _answer(given: Any, *, question: int) -> str:
    answer = given.get("answer") if isinstance(given, dict) else None
    if not isinstance(answer, str):
        raise DataError(
            f"question {question}: an answer is {given!r:.60}, expected an object with a text "
            "'answer'"
        )
    return answer


def _rows(path: Path, key: str, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    content = read_json(path, error=DataError, limit=_LARGEST)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected an object with a list {key!r}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: {key}[{number}] is {row!r:.40}, expected an object")
        missing = [field for field in fields if field not in row]
        if missing:
            raise DataError(f"{path}: {key}[{number}] lacks {', '.join(missing)}")
        for field, kind in fields.items():
            if not isinstance(row[field], kind):
                raise DataError(
                    f"{path}: {key}[{number}]: {field} is {row[field]!r:.40}, expected "
                    f"{kind.__name__}"
                )
    return rows


def _write(
    path: Path,
    records: Sequence[dict[str, Any]],
    *,
    wanted: Iterable[Any],
    found: Any,
    photos: Sequence[Path] | None,
) -> Path:
    missing = [each for each in wanted if each not in found]
    if missing:
        raise DataError(
            f"{path} would lack {len(missing)} of those in {IDS.name}, such as {missing[0]}: "
            f"give all files of the download"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if photos is not None:
        _place(photos, path.parent, sorted({record["image"] for record in records}))
    write_atomically(path, json.dumps(records, indent=1) + "\n")
    return path


def _place(folders: Sequence[Path], out: Path, names: Sequence[str]) -> None:
    """Link, or copy from another disk, the photos of these names into `out`."""
    found = {
        path.name.rpartition("_")[2] if path.name.startswith("COCO_") else path.name: path
        for folder in folders
        for path in folder.glob("*.jpg")
    }
    missing = [name for name in names if Path(name).name not in found]
    if missing:
        shown = ", ".join(map(str, folders))
        raise DataError(f"{shown}: {len(missing)} of {len(names)} photos lack, first {missing[0]}")
    for name in names:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            continue
        try:
            os.link(found[target.name].resolve(), target)
        except OSError:
            write_atomically(target, found[target.name].read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("flickr8k", help=flickr8k.__doc__)
    one.add_argument("tokens", type=Path, help="Flickr8k.token.txt: NAME#NUMBER, a tab, a caption")
    one.add_argument("--train", type=Path, required=True, help="Flickr_8k.trainImages.txt")
    one.add_argument("--val", type=Path, required=True, help="Flickr_8k.devImages.txt")
    one.set_defaults(make=flickr8k)
    two = commands.add_parser("coco", help=coco.__doc__)
    two.add_argument("captions", type=Path, nargs="+", help="captions_*.json")
    two.set_defaults(make=coco)
    three = commands.add_parser("vqav2", help=vqav2.__doc__)
    three.add_argument("--questions", type=Path, nargs="+", required=True)
    three.add_argument("--annotations", type=Path, nargs="+", required=True)
    three.set_defaults(make=vqav2)
    for command in (one, two, three):
        command.add_argument("--out", type=Path, required=True, help="the folder for the file")
        command.add_argument("--photos", type=Path, nargs="+", metavar="DIR", help="of the photos")
    options = parser.parse_args()
    with refusals():
        print(options.make(options))


if __name__ == "__main__":
    main()
