"""What a record holds is read, or the record is invalid: nothing is dropped in silence."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.files import open_source, write_pictures
from tests.processing.test_video import encode

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.config import IGNORE_INDEX
from llama_adapter.data import Sample, SampleEncoder
from llama_adapter.data.packing import assemble
from llama_adapter.data.records import JsonRecords
from llama_adapter.errors import DataError, LlamaAdapterError

ALPACA = {"instruction": "How many?", "input": "two stars", "output": "Two."}
TALK = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def only(folder: Path, type_: str, record: dict[str, Any], **options: Any) -> Sample:
    path = write(folder / "one.jsonl", json.dumps(record))
    return open_source(type_, "instruction", path=path, **options)[0]


def said(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in sample.conversation.messages]


def shown(sample: Sample) -> list[list[str]]:
    return [[r.source.name for r in m.images] for m in sample.conversation.turns]


def refusal(call: Any) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- files: everything in them is a record ------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}][{"b": 2}]', [{"a": 1}, {"b": 2}]),
        ('[{"a": 1}]\n\n[{"b": 2}, {"c": 3}]\n', [{"a": 1}, {"b": 2}, {"c": 3}]),
        ('[{"a": 1}, 7, null, "x", [2], true, {"b": 2}]', [{"a": 1}, *[None] * 5, {"b": 2}]),
        ('[{"a": 1}] and so on', [{"a": 1}, None]),
        ('[{"a": 1},]', [{"a": 1}, None]),
        ('[{"a": 1} {"b": 2}]', [None]),
        ('{"a": 1}{"b": 2}', [{"a": 1}, {"b": 2}]),
        ('{"a": 1}\n["x"]\n7\n{"b": 2}', [{"a": 1}, None, None, {"b": 2}]),
        ('{\n "a": 1\n}\n{\n "b": [\n  {"c": 2}\n ]\n}\n', [{"a": 1}, {"b": [{"c": 2}]}]),
        ('{"a": \n{"b": 2}\n{"c": 3}\n', [None, {"b": 2}, {"c": 3}]),
        ('{"data": [{"a": 1}, {"b": 2}]}', [{"a": 1}, {"b": 2}]),
        ('{"version": "1.0", "rows": [{"a": 1},\n null]}', [{"a": 1}, None]),
        ('{"turns": [{"a": 1}]}', [{"turns": [{"a": 1}]}]),
        ('{"x": [1], "y": [2]}', [{"x": [1], "y": [2]}]),
        ('\ufeff{"a": 1}\n\ufeff{"b": 2}', [{"a": 1}, {"b": 2}]),
        ('[{"a": 1, "a": 2}, {"a": "\\ud83d\\ude00"}]', [None, {"a": "😀"}]),
    ],
)
def test_every_value_of_a_file_is_a_record(tmp_path: Path, text: str, expected: list[Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    records = JsonRecords(path, record_keys=("turns",))
    found = []
    for index in range(len(records)):
        try:
            found.append(records[index])
        except DataError as error:
            assert str(error).startswith(f"{path}:")  # noqa: PT017
            found.append(None)
    assert found == expected
    places = [records.where(index) for index in range(len(records))]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}'.encode("utf-16"), "is UTF-16, expected UTF-8 text"),
        ('[{"a": 1}'.encode("utf-16-le"), "is UTF-16, expected UTF-8 text"),
        ('[{"a": 1}'.encode("utf-32"), "is UTF-32, expected UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "is compressed (gzip)"),
        (b'[{"a": 1}}', "malformed JSON: an array ends with '}'"),
        (b'{\n"a": 1\n', "malformed JSON: the object never ends"),
        (b'{"data": [{}], "data": [{}]}', "key 'data' occurs twice"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert message in refusal(lambda: JsonRecords(path))


def test_files_without_an_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    sources = [
        (type_, name)
        for type_ in ("alpaca", "sharegpt", "pairs")
        for name in ("pipe.json", "/dev/zero")
    ]
    for type_, name in sources:
        found = refusal(lambda t=type_, n=name: open_source(t, "caption", path=tmp_path / n))
        assert "not a regular file" in found
    for name, start in (
        ("a.json", b"[{"),
        ("b.jsonl", b'{"a": 1}\n'),
        ("c.tsv", b"url\tcaption\n"),
    ):
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(6 << 30)
        type_ = "pairs" if name == "c.tsv" else "alpaca"
        found = refusal(lambda t=type_, n=name: open_source(t, "caption", path=tmp_path / n))
        assert "more than 67108864 bytes" in found


# --- keys of records ----------------------------------------------------------------------------


def test_alpaca_with_a_system_message_and_earlier_turns(tmp_path: Path) -> None:
    record = {**ALPACA, "system": "Be brief.", "history": [["one?", "1"], ["two?", "2"]]}
    expected = [
        ("system", "Be brief."), ("user", "one?"), ("assistant", "1"), ("user", "two?"),
        ("assistant", "2"), ("user", "How many?\ntwo stars"), ("assistant", "Two."),
    ]  # fmt: skip
    assert said(only(tmp_path, "alpaca", record)) == expected
    assert only(tmp_path, "alpaca", ALPACA).conversation.context == "two stars"


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "How many?", "context": "two stars", "response": "Two.", "category": "qa"},
        {"id": "t", "instruction": "How many?", "motivation_app": "Grammarly",
         "instances": [{"input": "two stars", "output": "Two."}]},
        {**ALPACA, "text": "### Instruction:\nHow many?\n\n### Response:\nTwo."},
        {**ALPACA, "system": "", "history": [], "tools": "[]", "images": None, "score": 0.5},
    ],
)  # fmt: skip
def test_relatives_of_alpaca(tmp_path: Path, record: dict[str, Any]) -> None:
    sample = only(tmp_path, "alpaca", record)
    assert said(sample) == [("user", "How many?"), ("assistant", "Two.")]
    assert sample.conversation.context == "two stars"


def test_llavas_input_is_read_beside_its_image(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    sample = only(tmp_path, "llava", {**ALPACA, "image": name}, images=tmp_path)
    assert sample.conversation.context == "two stars"
    assert shown(sample) == [[name], []]


@pytest.mark.parametrize(
    ("type_", "record", "message"),
    [
        ("alpaca", {**ALPACA, "tools": '[{"name": "search"}]'}, "key 'tools' is not read"),
        ("alpaca", {**ALPACA, "image": "a.png"}, "shows image 'a.png', but the source names no"),
        ("alpaca", {**ALPACA, "image_id": 42}, "key 'image_id' is not read"),
        ("alpaca", {**ALPACA, "audio": "a.wav"}, "key 'audio' is not read"),
        ("alpaca", {**ALPACA, "rejected": "Three."}, "key 'rejected' is not read"),
        ("alpaca", {**ALPACA, "response": "Three."}, "'output' and 'response' both hold"),
        ("alpaca", {**ALPACA, "history": "x"}, "'history' must be a list of [question, answer]"),
        ("alpaca", {"instruction": "a", "instances": [{"output": "b"}] * 2}, "holds 2 answers"),
        ("alpaca", {**ALPACA, "output": "\ud800"}, "is the lone surrogate"),
        ("sharegpt", {"conversations": TALK, "image": "a.png"}, "the source names no folder"),
        ("sharegpt", {"conversations": TALK, "messages": TALK}, "both hold something"),
        ("sharegpt", {"conversations": TALK, "tools": "[1]"}, "key 'tools' is not read"),
        (
            "sharegpt",
            {"messages": [{"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b", "tool_calls": [{"id": "x"}]}]},
            "turn 2: key 'tool_calls' is not read",
        ),
        (
            "sharegpt",
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "x": "y"}]}]},
            "a part must be of type text, image, image_url or video",
        ),
        (
            "sharegpt",
            {"conversations": [TALK[0], {**TALK[1], "weight": 0.5}]},
            "turn 2 has weight 0.5, expected 0 or 1",
        ),
        (
            "sharegpt",
            {"system": "a", "conversations": [{"from": "system", "value": "b"}, *TALK]},
            "has a system message of its own and one among its turns",
        ),
    ],
)  # fmt: skip
def test_content_that_nobody_reads(
    tmp_path: Path, type_: str, record: dict[str, Any], message: str
) -> None:
    found = refusal(lambda: only(tmp_path, type_, record))
    assert found.startswith(f"{tmp_path / 'one.jsonl'}:1: ")
    assert message in found


def test_a_recipe_lists_keys_that_are_not_needed(tmp_path: Path) -> None:
    record = {**ALPACA, "rejected": "Three.", "tools": "[1]"}
    sample = only(tmp_path, "alpaca", record, ignore=["rejected", "tools"])
    assert said(sample)[-1] == ("assistant", "Two.")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "How many?", "prompt_id": "f0", "conversations": TALK},  # UltraChat, No Robots
        {"conversations": TALK, "instruction": "How many?", "response": " Two.\n"},
        {"conversations": TALK, "createdAt": "23", "avatarUrl": "h", "docId": "d"},
        {"conversations": TALK, "created_at": "2023", "openai_moderation": [{"flagged": False}]},
        {"conversations": ["How many?", "Two."], "source": "stackexchange"},  # LIMA
    ],
)  # fmt: skip
def test_what_real_conversations_bring_along(tmp_path: Path, record: dict[str, Any]) -> None:
    assert said(only(tmp_path, "sharegpt", record)) == [
        ("user", "How many?"),
        ("assistant", "Two."),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": TALK, "prompt": "How many stars?"}, "key 'prompt' is not read"),
        ({"conversations": TALK, "grid": "[[0, 1]]"}, "key 'grid' is not read"),
        ({"conversations": ["a", {"from": "gpt", "value": "b"}]}, "found str in it"),
        ({"conversations": [None, *TALK]}, "found NoneType in it"),
        ({"conversations": "a"}, "must be a list of objects, found str"),
        ({"conversations": ["a", " "]}, "an answer is empty"),
    ],
)
def test_what_resembles_it(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    assert message in refusal(lambda: only(tmp_path, "sharegpt", record))


def test_llama_factorys_conversations(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 2)
    record = {
        "system": "Be brief.",
        "images": names,
        "conversations": [
            {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Noise."},
            {"from": "human", "value": "And\n<image>"}, {"from": "gpt", "value": "More."},
        ],
    }  # fmt: skip
    sample = only(tmp_path, "sharegpt", record, images=tmp_path)
    assert said(sample)[:2] == [("system", "Be brief."), ("user", "What?")]
    assert said(sample)[3] == ("user", "And")
    assert shown(sample) == [[names[0]], [], [names[1]], []]


@pytest.mark.parametrize("history", [[], [["Hi.", "Hello."]]])
@pytest.mark.parametrize("instruction", ["", " ", "What?"])
def test_an_input_beside_an_empty_instruction_is_the_question(
    tmp_path: Path, instruction: str, history: list[list[str]]
) -> None:
    record = {"instruction": instruction, "input": "A star.", "output": "Red.", "history": history}
    conversation = only(tmp_path, "alpaca", record).conversation
    asked = [m.text for m in conversation.messages if m.role == "user"]
    if instruction.strip():
        joined = ["What?\nA star."] if history else ["What?"]
        assert (asked[-1:], conversation.context) == (joined, None if history else "A star.")
    else:
        assert (asked[-1:], conversation.context) == (["A star."], None)
    for lacking in (
        {"input": "A star.", "output": "Red."},
        {**record, "instruction": " ", "input": ""},
    ):
        assert "'instruction'" in refusal(lambda record=lacking: only(tmp_path, "alpaca", record))


def test_contents_in_parts(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 3)
    pixel = "data:image/png;base64,iVBORw0KGgo="
    content = [
        {"type": "text", "text": "One"},
        {"type": "image_url", "image_url": {"url": names[0], "detail": "low"}},
        {"type": "image", "image": names[1], "text": None},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": pixel}},
        {"type": "text", "text": "two?"},
    ]
    record = {
        "images": [names[2]],
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "Noise."},
        ],
    }
    sample = only(tmp_path, "llava", record, images=tmp_path)
    assert said(sample)[:2] == [("system", "Be brief."), ("user", "One\ntwo?")]
    sources = [ref.source for ref in sample.conversation.images]
    assert sources[:3] == [tmp_path / name for name in names]
    assert isinstance(sources[3], bytes)
    content[3]["image"] = "https://example.com/x.png"
    assert "is remote" in refusal(lambda: only(tmp_path, "llava", record, images=tmp_path))


def test_an_answer_of_weight_0_is_not_scored(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second", "weight": 1},
    ]
    encoder = SampleEncoder(processor, row_length=256)
    sample = only(tmp_path, "sharegpt", {"messages": turns})
    encoded = encoder.encode(sample, 0, 2)
    scored = [
        i
        for i, label in zip(encoded.input_ids, encoded.labels, strict=True)
        if label != IGNORE_INDEX
    ]
    assert processor.tokenizer.decode(scored) == "second<|im_end|>"
    turns[3]["weight"] = 0
    sample = only(tmp_path, "sharegpt", {"messages": turns})
    assert "holds no answer token to learn" in refusal(lambda: encoder.cut(sample))


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "/proc/self/environ", "a/../../secret.png", "..\\secret.png", "link.png",
     "C:\\photos\\picture0.png", "\\\\server\\share\\picture0.png", "folder/secret.png",
     "{outside}"],
)  # fmt: skip
def test_images_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "photos"
    write_pictures(folder, 1)
    (folder / "a").mkdir()
    [secret] = write_pictures(tmp_path / "x", 1)
    outside = (tmp_path / "x" / secret).rename(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "folder").symlink_to(tmp_path)
    name = name.format(outside=outside)
    record = {"image": name, "conversations": TALK}
    found = refusal(lambda: only(tmp_path, "llava", record, images=folder))
    assert "is outside the folder" in found
    assert "`images_outside: true`" in found
    if "\\\\" not in name and ":" not in name:
        sample = only(tmp_path, "llava", record, images=folder, images_outside=True)
        assert sample.conversation.images


def test_a_snapshot_of_the_hub_is_read(tmp_path: Path) -> None:
    """Its files are links to the `blobs` beside the snapshots."""
    [name] = write_pictures(tmp_path / "datasets--x" / "blobs", 1)
    folder = tmp_path / "datasets--x" / "snapshots" / "0ab1" / "images"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to(f"../../../blobs/{name}")
    (folder / "b.png").symlink_to(tmp_path / "one.jsonl")
    record = {"image": "a.png", "conversations": TALK}
    assert shown(only(tmp_path, "llava", record, images=folder)) == [["a.png"], []]
    record = {"image": "b.png", "conversations": TALK}
    assert "is outside" in refusal(lambda: only(tmp_path, "llava", record, images=folder))


@pytest.mark.parametrize("type_", ["coco_captions", "pairs"])
def test_captions_of_images_outside_are_refused(tmp_path: Path, type_: str) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "photos").mkdir()
    path = write(tmp_path / "c.json", [{"image": "../picture0.png", "caption": "Noise."}])
    options = {"path": path, "images": tmp_path / "photos"}
    source = open_source(type_, "caption", **options)
    assert "is outside the folder" in refusal(lambda: source[0])
    assert open_source(type_, "caption", images_outside=True, **options)[0].conversation.images


def test_names_as_other_systems_write_them(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_pictures(folder / "a", 1)
    composed, apart = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    (folder / "a" / "picture0.png").rename(folder / "a" / apart)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for name in (f"a/{composed}", f"a\\{apart}", f"a\\{composed}", f"{folder}/a/{apart}"):
        record = {"image": name, "conversations": TALK}
        for images in (folder, link):
            [found] = only(tmp_path, "llava", record, images=images).conversation.images
            assert found.source.samefile(folder / "a" / apart)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a\0.png", "null byte"), ("\ud800.png", "surrogate"), ("x" * 300, "name too long"),
     ("pipe.png", "is not in"), (".", "is outside"), ({"bytes": "abc"}, "must be a file name")],
)  # fmt: skip
def test_names_that_no_file_has(tmp_path: Path, name: Any, message: str) -> None:
    (tmp_path / "photos").mkdir()
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    record = {"image": name, "conversations": TALK}
    found = refusal(lambda: only(tmp_path, "llava", record, images=tmp_path / "photos"))
    assert message.lower() in found.lower()


def test_videos_beside_images_in_a_row(processor: LlamaAdapterProcessor, tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    encode(tmp_path / "a.mp4", count=12)
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
    records = [
        {"video": "a.mp4", "conversations": talk},
        {"image": name, "conversations": TALK},
        {"video": "../a.mp4", "conversations": talk},
        {"video": name, "conversations": talk},
        {"videos": ["a.mp4", "a.mp4"], "conversations": talk},
    ]
    path = write(tmp_path / "v.json", records)
    source = open_source("llava", "instruction", path=path, images=tmp_path)
    assert said(source[0]) == [("user", "What?"), ("assistant", "Grey.")]
    assert "is outside the folder" in refusal(lambda: source[2])
    assert "does not end as a video's name does" in refusal(lambda: source[3])
    assert "has 1 <video> marks, but 2 videos" in refusal(lambda: source[4])
    encoder = SampleEncoder(processor, row_length=256)
    prepared = [encoder.encode_sample(source[index], 0, 1) for index in range(2)]
    inputs = assemble([prepared], processor, padding="packed", row_length=256)
    pixels = inputs["pixel_values"]
    assert pixels.ndim == 5
    assert torch.equal(pixels[0], prepared[0].pixels[0])
    assert all(torch.equal(frame, prepared[1].pixels[0]) for frame in pixels[1])
    sizes = [len(p.encoded) for p in prepared]
    assert inputs["image_index"][0, : sum(sizes)].tolist() == [0] * sizes[0] + [1] * sizes[1]


# --- captions -----------------------------------------------------------------------------------


def test_blips_lists_of_captions(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    records = [
        {"image": name, "caption": "One.", "image_id": "coco_1"},
        {"image": name, "caption": ["Two.", "Three."]},
        {"image": name, "caption": []},
        None,
        {"image": name, "caption": "Four.", "question": "What?"},
    ]
    for type_ in ("coco_captions", "pairs"):
        path = write(tmp_path / "blip.json", records)
        source = open_source(type_, "caption", path=path, images=tmp_path)
        assert len(source) == 6
        texts = [source[i].conversation.turns[-1].text for i in range(3)]
        assert texts == ["One.", "Two.", "Three."]
        assert source.groups().tolist() == [0, 0, 0, 0, 3, 0]  # what cannot be read is of no image
        assert "caption must be text" in refusal(lambda s=source: s[3])
        assert "expected an object" in refusal(lambda s=source: s[4])
        assert "key 'question' is not read" in refusal(lambda s=source: s[5])


def test_an_image_may_have_very_many_captions(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    count = 70_000
    path = write(tmp_path / "c.json", [{"image": name, "captions": list(map(str, range(count)))}])
    source = open_source("coco_captions", "caption", path=path, images=tmp_path)
    assert len(source) == count
    for index in (0, 32_767, 32_768, 65_536, count - 1):
        assert source[index].conversation.turns[-1].text == str(index)
        assert source.where(index).endswith(f"caption {index + 1}")


def test_cocos_images_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    images = [
        {"id": "1", "file_name": name}, {"id": 2, "file_name": name}, {"id": 2, "file_name": "x"},
        None, {"id": 3}, {"id": 4, "file_name": "\ud800"},
    ]  # fmt: skip
    annotations = [{"image_id": number, "caption": "Noise."} for number in (1, 2, 4)]
    path = write(tmp_path / "c.json", {"images": images, "annotations": annotations})
    source = open_source("coco_captions", "caption", path=path, images=tmp_path)
    assert len(source) == 6
    assert source[0].conversation.turns[-1].text == "Noise."
    reasons = [refusal(lambda i=i: source[i]) for i in range(1, 6)]
    for reason, expected in zip(
        reasons,
        (
            "stands for several",
            "surrogate",
            "stands for a second",
            "an object",
            "file_name must be",
        ),
        strict=True,
    ):
        assert expected in reason


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['"one, two",{n}', '5" nails,{n}'], ["one, two", '5" nails']),
        (['"two\nlines",{n}', "b,{n}"], ["two\nlines", "b"]),
        (["a,{n},more", "b,{n},"], [None, "b"]),
        (["a,{n}\rb,{n}", "c,{n}"], [None, "c"]),
        (["a", "b,{n}"], [None, "b"]),
        (['"a""b",{n}', '"a" b,{n}'], ['a"b', "a b"]),
    ],
)
def test_every_row_of_a_table_is_counted(
    tmp_path: Path, rows: list[str], expected: list[str | None]
) -> None:
    [name] = write_pictures(tmp_path, 1)
    text = "\n".join(["caption,image", *rows]).format(n=name) + "\n"
    path = tmp_path / "t.csv"
    path.write_text(text, newline="")
    source = open_source("pairs", "caption", path=path)
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].conversation.turns[-1].text)
        except LlamaAdapterError:
            found.append(None)
    assert found == expected


@pytest.mark.parametrize(
    ("header", "message"),
    [("image,caption,caption", "two columns are called 'caption'"), ("image\rcaption", "carriage")],
)
def test_headers_that_are_refused(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\na,b,c\n", newline="")
    assert message in refusal(lambda: open_source("pairs", "caption", path=path))


def test_columns_that_nobody_reads(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    header = "url\tpath\tcaption\twidth\tquestion\n"
    path = write(tmp_path / "t.tsv", f"{header}http://x/y.png\t{name}\tNoise.\t12\t\n"
                 f"http://x/y.png\t{name}\tNoise.\t12\tWhat?\n")  # fmt: skip
    source = open_source("pairs", "caption", path=path)
    assert source[0].conversation.turns[-1].text == "Noise."
    assert "column 'question' is not read" in refusal(lambda: source[1])
    source = open_source("pairs", "caption", path=path, ignore=["question"])
    assert source[1].conversation.turns[-1].text == "Noise."
