"""Damaged data files of every type: what is read equals a plain strict parse, the rest is counted.

References are written here once more, in the plainest way, and share no code with the sources.
"""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.data.files import open_source, write_pictures
from tests.fuzzing import Campaign, mutated_bytes, mutated_json

from llama_adapter.data import Source
from llama_adapter.errors import DataError, LlamaAdapterError

Said = list[tuple[str, str]]
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 3)
    return folder


@dataclass(frozen=True)
class Layout:
    """Records of a type, and what one of them says to a plain reader."""

    type: str
    records: list[Any]
    said: Callable[[dict[str, Any]], Sequence[Said | None]]
    """One entry for each sample of the record, None for an invalid one; it raises on odd ones."""
    wrap: Callable[[list[Any]], Any] | None = None
    """The one value around the records; None: any form of records will do."""


def _text(value: Any) -> str:
    assert isinstance(value, str)
    assert value.strip()
    return value


def _alpaca(record: dict[str, Any]) -> list[Said]:
    said = [("system", record["system"])] if (record.get("system") or "").strip() else []
    for question, answer in record.get("history") or []:
        said += [("user", _text(question)), ("assistant", _text(answer))]
    question, context = _text(record["instruction"]), record.get("input") or ""
    if record.get("history") and context.strip():
        question = f"{question}\n{context}"
    elif context.strip():
        said.insert(0, ("context", context))
    return [[*said, ("user", question), ("assistant", _text(record["output"]))]]


def _talk(record: dict[str, Any]) -> list[Said]:
    turns = [(_SPEAKERS[turn["from"]], turn["value"]) for turn in record["conversations"]]
    system = turns[:1] if turns[0][0] == "system" else []
    turns = turns[len(system) :]
    if (record.get("system") or "").strip():
        system = [("system", record["system"])]
    while turns and turns[0][0] != "user":
        turns.pop(0)
    if turns[-1][0] == "user":
        turns.pop()
    if record.get("image"):
        marks = ("<image>\n", "\n<image>", "<image>")
        for mark in marks:
            turns = [(role, text.replace(mark, "")) for role, text in turns]
    return [[*system, *turns]]


def _captions(record: dict[str, Any]) -> list[Said | None]:
    given = record["captions"] if "captions" in record else record["caption"]
    return [_caption(each) for each in (given if isinstance(given, list) else [given])]


def _karpathy(record: dict[str, Any]) -> list[Said | None]:
    return [_caption(each["raw"]) for each in record["sentences"]]


def _caption(value: Any) -> Said | None:
    return [("assistant", value.strip())] if isinstance(value, str) and value.strip() else None


def _question(record: dict[str, Any]) -> list[Said]:
    return [[("user", _text(record["question"])), ("assistant", _text(record["answer"]))]]


ALPACA = [
    {"instruction": f"How many {n}?", "input": "two stars" * (n % 2), "output": f"{n}."}
    for n in range(4)
]
TURNS = [
    {"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"},
    {"from": "human", "value": "two?"}, {"from": "gpt", "value": "2"},
]  # fmt: skip
SEEN = {"from": "human", "value": "<image>\nWhat is this?"}
LAYOUTS = (
    Layout("alpaca", [
        *ALPACA,
        {**ALPACA[1], "system": "Be brief.", "history": [["one?", "1"]]},
        {**ALPACA[0], "id": "x", "category": "qa", "score": 0.5},
    ], _alpaca),
    Layout("sharegpt", [
        {"id": "a", "conversations": TURNS},
        {"conversations": [TURNS[1], *TURNS]},
        {"conversations": TURNS[:3]},
        {"system": "Be brief.", "conversations": TURNS},
    ], _talk),
    Layout("llava", [
        {"id": "1", "image": "picture0.png", "conversations": [SEEN, TURNS[1]]},
        {"image": "picture1.png", "conversations": [SEEN, *TURNS[1:]]},
        {"id": "2", "conversations": TURNS},
    ], _talk),
    Layout("coco_captions", [
        {"image": "picture0.png", "captions": ["One.", "Two."]},
        {"image": "picture1.png", "caption": "Three."},
        {"image": "picture2.png", "caption": ["Four."], "width": 12},
    ], _captions),
    Layout("pairs", [
        {"image": "picture0.png", "caption": "One."},
        {"image": "picture1.png", "captions": ["Two.", "Three."]},
    ], _captions),
    Layout("vqa", [
        {"image": "picture0.png", "question": "a?", "answer": "yes", "question_id": 7},
        {"image": "picture1.png", "question": "b?", "answer": "no", "answer_type": "yes/no"},
    ], _question),
    Layout("coco_captions", [
        {"image_id": 1, "id": 1, "caption": "One."}, {"image_id": 2, "id": 2, "caption": "Two."},
        {"image_id": 1, "id": 3, "caption": "Three."},
    ], _captions, lambda records: {
        "info": {"year": 2014},
        "images": [{"id": n, "file_name": f"picture{n}.png"} for n in (1, 2)],
        "annotations": records,
    }),
    Layout("coco_captions", [
        {"filename": f"picture{n}.png", "sentences": [{"raw": "One."}, {"raw": "Two."}]}
        for n in range(3)
    ], _karpathy, lambda records: {"dataset": "coco", "images": records}),
)  # fmt: skip


OWN_KEYS = {
    "instruction", "output", "conversations", "image", "captions", "caption", "question", "answer",
}  # fmt: skip
"""An object with one of these is a record, not a wrapper around some."""


def _written(layout: Layout, records: list[Any], rng: random.Random) -> str:
    """The records in one of the forms that a file may have."""
    indent = rng.choice((None, 1))
    if layout.wrap is not None:
        return json.dumps(layout.wrap(records), indent=indent)
    form = rng.randrange(5)
    if form == 0:
        return json.dumps(records, indent=indent)
    if form == 1:
        return "\n".join(map(json.dumps, records)) + "\n"
    if form == 2:
        return "\n".join(json.dumps(record, indent=1) for record in records)
    if form == 3:
        cut = rng.randrange(len(records) + 1)
        return json.dumps(records[:cut]) + "\n" + json.dumps(records[cut:])
    return json.dumps({"data": records}, indent=indent)


def _parsed(text: str, layout: Layout) -> list[Any] | None:
    """The records of a text by a strict parse; None where it is no sequence of JSON values."""
    values: list[Any] = []
    decoder, at = json.JSONDecoder(), 0
    try:
        while (at := at + len(text[at:]) - len(text[at:].lstrip(" \t\r\n"))) < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except (ValueError, RecursionError):
        return None
    if layout.wrap is not None:
        return None
    found = [v for value in values for v in (value if isinstance(value, list) else [value])]
    if len(values) == 1 and isinstance(values[0], dict) and not OWN_KEYS & set(values[0]):
        lists = [value for value in values[0].values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    return found


def _said(source: Source, index: int) -> Said | None:
    """What a sample says; None where its record is invalid."""
    try:
        sample = source[index]
    except DataError as error:
        message = str(error)
        assert message.startswith(source.where(index).partition(" caption")[0])
        assert "\n" not in message
        return None
    talk = sample.conversation
    context = [("context", talk.context)] if talk.context else []
    return [*context, *((message.role, message.text) for message in talk.messages)]


def _ends_with(found: Said, expected: Said) -> bool:
    """Of captions the answers alone are compared, for the source itself asks for them."""
    return found == expected or (len(expected) == 1 and found[-1:] == expected)


def test_json_of_every_layout(photos: Path, tmp_path: Path) -> None:
    """Samples equal the reference's; each record is a sample or invalid; whole ones are samples."""
    campaign = Campaign("data json", inputs=240)
    for number, rng in enumerate(campaign):
        layout = LAYOUTS[number % len(LAYOUTS)]
        records = [rng.choice(layout.records) for _ in range(rng.randint(1, 6))]
        whole = list(records)
        damage = rng.randrange(3)
        if damage == 1:
            place = rng.randrange(len(records))
            records[place] = mutated_json(records[place], rng)
        data = _written(layout, records, rng).encode()
        if damage == 2:
            data = mutated_bytes(data, rng)
        ending = rng.choice((".json", ".jsonl"))
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(data)
        is_text = layout.type in {"alpaca", "sharegpt"}
        options = {} if is_text else {"images": photos}
        kind = "caption" if layout.type in {"coco_captions", "pairs"} else "instruction"

        def accepted(source: Source, layout: Any = layout, data: bytes = data) -> None:
            found = [_said(source, index) for index in range(len(source))]
            _check(found, layout, data, whole, is_damaged=damage > 0)  # noqa: B023

        campaign.attempt(lambda: open_source(layout.type, kind, path=path, **options),  # noqa: B023
                         accepted=accepted)  # fmt: skip
        path.unlink()


def _check(
    found: list[Said | None], layout: Layout, data: bytes, whole: list[Any], *, is_damaged: bool
) -> None:
    if not is_damaged:
        expected = [said for record in whole for said in layout.said(record)]
        assert len(found) == len(expected)
        assert all(a is not None and _ends_with(a, b) for a, b in zip(found, expected, strict=True))
        return
    try:
        records = _parsed(data.decode(), layout)
    except UnicodeDecodeError:
        records = None
    if layout.wrap is not None:
        return
    if records is None:
        assert None in found, "a file that is no JSON lost nothing"
        return
    samples = iter(found)
    for record in records:
        try:
            expected = layout.said(record) or [None]
        except Exception:  # whatever a plain reader trips over
            expected = [None]
        for one in expected:
            said = next(samples)
            if said is None:
                assert record not in layout.records, "a record that is whole is no sample"
            else:
                assert one is not None
                assert _ends_with(said, one)
    assert list(samples) == []


# --- tables -------------------------------------------------------------------------------------

CELLS = (
    "A red star.", "one, two", 'a "quoted" word', "two\nlines", "5\" nails", '"', "", " ", "\u2028",
    "tab\there", "ünï", "x" * 200, "0", "a,b,c",
)  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_tables(photos: Path, tmp_path: Path, ending: str) -> None:
    """As many samples and invalid records as Python's csv finds rows, and the same cells."""
    campaign = Campaign(f"data {ending}", inputs=60)
    for number, rng in enumerate(campaign):
        rows = [["image", "caption"]] + [
            [f"picture{rng.randrange(3)}.png", rng.choice(CELLS)] for _ in range(rng.randint(1, 6))
        ]
        if ending == ".csv":
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
            data = text.getvalue().encode()
        else:
            data = "".join("\t".join(row) + "\n" for row in rows).encode()
        if rng.randrange(2):
            data = mutated_bytes(data, rng)
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(data)

        def accepted(source: Source, data: bytes = data) -> None:
            found = [_said(source, index) for index in range(len(source))]
            expected = _rows(data, ending)
            if expected is None:
                assert None in found
                return
            assert len(found) == len(expected)
            is_whole = data.startswith((b"image,caption", b"image\tcaption"))
            for said, row in zip(found, expected, strict=True):
                if said is not None:
                    assert said[-1][1] in {cell.strip() for cell in row}
                elif is_whole and len(row) == 2 and row[0] in {f"picture{n}.png" for n in range(3)}:
                    assert not row[1].strip()

        campaign.attempt(
            lambda: open_source("pairs", "caption", path=path, images=photos),  # noqa: B023
            accepted=accepted,
        )
        path.unlink()


def _rows(data: bytes, ending: str) -> list[list[str]] | None:
    """Rows behind the header; None where a line end or the coding is odd."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if ending == ".tsv":
        lines = [line.rstrip("\r") for line in text.split("\n")]
        return [line.split("\t") for line in lines if not line.encode().isspace() and line][1:]
    if "\r" in text.replace("\r\n", "\n"):
        return None
    rows = list(csv.reader(io.StringIO(text, newline="")))
    return [row for row in rows if row and not (len(row) == 1 and row[0].encode().isspace())][1:]


# --- shards -------------------------------------------------------------------------------------


def test_shards(photos: Path, tmp_path: Path) -> None:
    """As many samples and invalid records as tarfile finds groups of names, with their bytes."""
    pixels = [(photos / f"picture{n}.png").read_bytes() for n in range(3)]
    campaign = Campaign("data shards", inputs=90)
    for number, rng in enumerate(campaign):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(
            path, "w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        ) as t:
            for each in range(rng.randint(1, 4)):
                members = [("png", rng.choice(pixels)), ("txt", f"Caption {each}.".encode())]
                members += [("json", b'{"caption": "other"}')] * rng.randrange(2)
                members += [members[0]] * (rng.randrange(4) == 0)
                for suffix, content in members[rng.randrange(5) == 0 :]:
                    info = tarfile.TarInfo(f"{each}.{suffix}")
                    info.size = len(content)
                    t.addfile(info, io.BytesIO(content))
        if rng.randrange(2):
            path.write_bytes(mutated_bytes(path.read_bytes(), rng))

        def accepted(source: Source, path: Path = path) -> None:
            expected = _groups(path)
            assert len(source) == len(expected)
            for index, group in enumerate(expected):
                said = _said(source, index)
                if said is None:
                    continue
                image = source[index].conversation.images[0].source
                assert image in group.values()
                captions = [c for n, c in group.items() if n.endswith((".txt", ".json"))]
                assert any(said[-1][1] in c.decode(errors="replace") for c in captions)

        campaign.attempt(
            lambda: open_source("webdataset", "caption", path=str(path)),  # noqa: B023
            accepted=accepted,
        )
        path.unlink()


def _groups(path: Path) -> list[dict[str, bytes]]:
    groups: list[dict[str, bytes]] = []
    last = None
    with tarfile.open(path, "r:") as archive:
        for member in archive.getmembers():
            key = member.name.rpartition("/")[0], member.name.rpartition("/")[2].partition(".")[0]
            if member.isdir() or member.name.rpartition("/")[2].startswith((".", "__")):
                continue
            if key != last or member.name in groups[-1]:
                groups.append({})
            last = key
            file = archive.extractfile(member) if member.isfile() else None
            groups[-1][member.name] = file.read() if file is not None else b""
    return groups


def test_a_refusal_is_one_of_ours(tmp_path: Path) -> None:
    """Files of nothing but noise."""
    campaign = Campaign("data noise", inputs=60)
    for rng in campaign:
        path = tmp_path / f"x{rng.choice(('.json', '.jsonl', '.csv', '.tsv', '.tar'))}"
        start = rng.choice((b"", b"[", b"{", b'{"a": ', b"image,caption\n", b"\xef\xbb\xbf["))
        path.write_bytes(start + rng.randbytes(rng.randrange(2000)))
        layout = rng.choice(LAYOUTS)

        def check(source: Source) -> None:
            assert all(_said(source, index) is None for index in range(len(source)))

        types = {"path": path, "images": tmp_path} if layout.type != "webdataset" else {}
        campaign.attempt(
            lambda: open_source(layout.type, "caption", **types),  # noqa: B023
            accepted=check,
            refusals=LlamaAdapterError,
        )
