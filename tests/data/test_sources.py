"""Sources: every format as it is found in the world, read by byte offset."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.data.files import open_source, write_alpaca, write_pairs, write_pictures

from llama_adapter.data import SOURCES, Source
from llama_adapter.data.records import JsonRecords
from llama_adapter.errors import DataError


def turns(source: Source, index: int = 0) -> list[tuple[str, str]]:
    return [(m.role, m.text) for m in source[index].conversation.messages]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_records_of_an_array_are_those_of_the_file(tmp_path: Path) -> None:
    nasty = [
        {"text": 'a "quoted\\" brace { and ] bracket', "list": [{"x": [1, {"y": "]"}]}]},
        {"text": "ünï\u2028çødé \\ \n line"},
        {},
        {"nested": {"deep": [[], {}]}},
    ]
    for name, text in {
        "compact": json.dumps(nasty, separators=(",", ":")),
        "indented": json.dumps(nasty, indent=2),
        "unescaped": json.dumps(nasty, ensure_ascii=False),
        "bom": "\ufeff" + json.dumps(nasty),
        "lines": "\n\n".join(json.dumps(record) for record in nasty),
        "crlf": "\r\n".join(json.dumps(record) for record in nasty),
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8", newline="")
        records = JsonRecords(path)
        assert [records[i] for i in range(len(records))] == nasty, name


def test_lines_are_those_an_editor_shows(tmp_path: Path) -> None:
    path = write_alpaca(tmp_path / "a.json", 7)
    records = JsonRecords(path)
    text = path.read_text().splitlines()
    for index in range(7):
        line = int(records.where(index).rpartition(":")[2])
        assert text[line - 1].strip() == "{"
        assert json.loads(f"{{{text[line].strip(' ,')}}}").items() <= records[index].items()


@pytest.mark.parametrize("lines", [False, True])
def test_alpaca(tmp_path: Path, lines: bool) -> None:
    path = write_alpaca(tmp_path / "a.json", 6, lines=lines)
    source = open_source("alpaca", "instruction", path=path)
    assert len(source) == 6
    with_input, without = source[0].conversation, source[1].conversation
    assert with_input.context
    assert without.context is None
    assert [m.role for m in without.messages] == ["user", "assistant"]
    assert source[1].kind == "instruction"


def test_records_are_shown_next_to_unrelated_images(tmp_path: Path) -> None:
    path = write_alpaca(tmp_path / "a.json", 40)
    records = json.loads(path.read_text())
    own = write_pictures(tmp_path / "own", 1)[0]
    records[3]["image"] = own
    path.write_text(json.dumps(records))
    names = write_pictures(tmp_path / "photos", 4)
    captions = [
        {"image": name, "captions": ["a", "b"], "split": "test" if name == names[3] else "train"}
        for name in names
    ]
    images = {
        "path": write(tmp_path / "captions.json", captions),
        "images": tmp_path / "photos",
        "split": "train",
    }
    options = {"path": path, "images": tmp_path / "own"}
    source = open_source("alpaca", "caption", **options, unrelated_images=images)
    shown = [Path(str(image.source)) for n in range(40) for image in source[n].conversation.images]
    assert len(shown) == 40
    assert shown.pop(3) == tmp_path / "own" / own
    assert set(shown) == {tmp_path / "photos" / name for name in names[:3]}
    plain = open_source("alpaca", "instruction", **options)
    for index in (0, 1):
        with_image, without = source[index].conversation, plain[index].conversation
        assert with_image.images
        assert with_image.context == without.context
        assert [m.text for m in with_image.messages] == [m.text for m in without.messages]
    again = open_source("alpaca", "caption", **options, unrelated_images=images)
    assert again[7] == source[7]
    assert "unrelated_images" not in plain.fingerprint()
    assert source.fingerprint() not in (
        plain.fingerprint(),
        open_source("alpaca", "caption", **options).fingerprint(),
    )
    with pytest.raises(
        DataError, match=r"a\.json: unrelated_images belongs to a source of `captions`"
    ):
        open_source("alpaca", "instruction", **options, unrelated_images=images)


def test_a_source_travels_to_another_process(tmp_path: Path) -> None:
    source = open_source("alpaca", "instruction", path=write_alpaca(tmp_path / "a.json", 6))
    first = source[2]
    assert pickle.loads(pickle.dumps(source))[2] == first


def test_sharegpt_keeps_whole_exchanges(tmp_path: Path) -> None:
    talk = [
        {"from": "gpt", "value": "left over from the talk before"},
        {"from": "human", "value": "one?"},
        {"from": "gpt", "value": "1"},
        {"from": "user", "value": "two?"},
        {"from": "chatgpt", "value": "2"},
        {"from": "human", "value": "never answered"},
    ]
    openai = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
    ]
    records = [{"id": "a", "conversations": talk}, {"messages": openai}, {"items": talk[1:3]}]
    source = open_source("sharegpt", "instruction", path=write(tmp_path / "s.json", records))
    assert turns(source) == [
        ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2"),
    ]  # fmt: skip
    assert turns(source, 1)[0] == ("system", "Be brief.")
    assert turns(source, 2) == [("user", "one?"), ("assistant", "1")]


def test_llava_shows_the_picture_beside_the_first_question(tmp_path: Path) -> None:
    name = write_pictures(tmp_path / "photos", 1)[0]
    talk = [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "Noise."},
        {"from": "human", "value": "Really?"},
        {"from": "gpt", "value": "Yes."},
    ]
    records = [
        {"id": "1", "image": name, "conversations": talk},
        {"id": "2", "image": f"train2014/{name}", "QA": [{"q": "What?", "a": "Noise."}]},
        {"id": "3", "image": name, "instruction": "What?", "output": "Noise."},
        {"id": "4", "conversations": [{**talk[2]}, {**talk[3]}]},
    ]
    source = open_source(
        "llava", "instruction", path=write(tmp_path / "l.json", records), images=tmp_path / "photos"
    )
    assert turns(source)[0] == ("user", "What is this?")
    shown = [len(message.images) for message in source[0].conversation.messages]
    assert shown == [1, 0, 0, 0]
    assert all(len(source[i].conversation.images) == 1 for i in (1, 2))
    assert source[3].conversation.images == ()


def test_coco_annotations(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "photos", 3)
    annotations = {
        "info": {"images": "a text, no array"},
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 12, "id": 1, "caption": " Noise in three colours. "},
            {"image_id": 10, "id": 2, "caption": "More noise."},
            {"image_id": 12, "id": 3, "caption": "Noise again."},
        ],
    }
    source = open_source(
        "coco_captions",
        "caption",
        path=write(tmp_path / "c.json", annotations),
        images=tmp_path / "photos",
        questions=["Describe it."],
    )
    assert len(source) == 3
    sample = source[0]
    assert turns(source) == [("user", "Describe it."), ("assistant", "Noise in three colours.")]
    assert sample.conversation.images[0].source == tmp_path / "photos" / names[2]
    groups = source.groups()
    assert groups is not None
    assert groups[0] == groups[2] != groups[1]


def test_karpathys_file_and_lists_of_captions(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "photos", 2)
    karpathy = {
        "images": [
            {"filepath": "val2014", "filename": n, "split": s, "sentids": [1, 2], "imgid": 0,
             "cocoid": 42, "sentences": [{"raw": c, "tokens": [c], "imgid": 0, "sentid": 1}] * 2}
            for n, s, c in zip(names, ("train", "test"), ("One.", "Two."), strict=True)
        ],
        "dataset": "coco",
    }  # fmt: skip
    plain = [{"image": n, "captions": ["One.", "Two."], "split": "train"} for n in names]
    options = {"images": tmp_path / "photos"}
    source = open_source(
        "coco_captions", "caption", path=write(tmp_path / "k.json", karpathy), **options
    )
    assert len(source) == 4
    test = open_source(
        "coco_captions", "caption", path=tmp_path / "k.json", split="test", **options
    )
    assert len(test) == 2
    assert turns(test)[1] == ("assistant", "Two.")
    listed = open_source(
        "coco_captions", "caption", path=write(tmp_path / "p.json", plain), **options
    )
    assert [turns(listed, i)[1][1] for i in range(4)] == ["One.", "Two."] * 2


def test_pairs_as_the_released_code_writes_them(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 4)
    source = open_source("pairs", "caption", path=path)
    assert len(source) == 4
    assert source[0].conversation.images[0].source.is_file()
    quoted = tmp_path / "q.csv"
    quoted.write_text('caption,image\n"a, b\nand c",pictures/picture0.png\nplain,picture1.png\n')
    source = open_source("pairs", "caption", path=quoted, images=tmp_path)
    assert turns(source)[1] == ("assistant", "a, b\nand c")
    assert len(source) == 2
    assert source.where(1).endswith("q.csv:4")


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    names = write_pictures(tmp_path / "photos", 4)
    pixels = [(tmp_path / "photos" / name).read_bytes() for name in names]
    for shard in range(2):
        members = []
        for number in range(2):
            key = f"{shard}{number}"
            members += [
                (f"{key}.png", pixels[2 * shard + number]),
                (f"{key}.json", b'{"caption": "no, the text", "width": 12}'),
                (f"{key}.txt", f"Caption {key}.".encode()),
            ]
        write_shard(tmp_path / f"shard-{shard:03d}.tar", members)
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["{folder}/shard-{{000..001}}.tar", "{folder}/shard-*.tar", "file://{folder}/{name}"]
)
def test_tar_shards(shards: Path, pattern: str) -> None:
    pytest.importorskip("fsspec")
    one = pattern.startswith("file:")
    path = pattern.format(folder=shards, name="shard-001.tar")
    source = open_source("webdataset", "caption", path=path)
    assert len(source) == (2 if one else 4)
    assert turns(source)[1] == ("assistant", "Caption 10." if one else "Caption 00.")
    image = source[0].conversation.images[0]
    first = shards / "photos" / f"picture{2 if one else 0}.png"
    assert image.source == first.read_bytes()


def test_captions_of_shards_in_json(tmp_path: Path, shards: Path) -> None:
    picture = (shards / "photos" / "picture0.png").read_bytes()
    write_shard(tmp_path / "j.tar", [("a.jpg", picture), ("a.json", b'{"text": "From JSON."}')])
    options = {"path": str(tmp_path / "j.tar"), "caption_key": "text"}
    source = open_source("webdataset", "caption", **options)
    assert turns(source)[1] == ("assistant", "From JSON.")


def test_every_type_of_the_design_is_there() -> None:
    assert set(SOURCES) == {
        "alpaca", "sharegpt", "llava", "coco_captions", "pairs", "webdataset", "vqa",
        "caption_questions", "caption_tasks",
    }  # fmt: skip


def test_real_files(real: Path) -> None:
    photos = real / "captions" / "coco_photos"
    counts = {
        ("alpaca", 999): {"path": real / "instructions" / "alpaca_en_demo_999.json"},
        ("coco_captions", 90): {"path": photos / "captions.json", "images": photos},
        ("coco_captions", 1200): {
            "path": real / "captions" / "flickr8k" / "captions.json",
            "images": real / "captions" / "flickr8k",
        },
    }
    for (type_, count), options in counts.items():
        kind = "instruction" if type_ == "alpaca" else "caption"
        source = open_source(type_, kind, **options)
        assert len(source) == count
        assert all(source[i].conversation.turns[-1].text for i in range(count))
