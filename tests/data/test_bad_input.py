"""Bad data: one clear error each, that names file, line, what was found and what was expected."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.data.files import (
    open_source,
    stream_of,
    write_alpaca,
    write_pairs,
    write_pictures,
)
from tests.threads import SECONDS

from llama_adapter import LlamaAdapterProcessor
from llama_adapter.data import SampleEncoder, measure
from llama_adapter.errors import DataError

GOOD = {"instruction": "How many?", "input": "", "output": "Two."}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def refusal(call: Any) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read {path}: No such file or directory"),
        ("", "{path} is empty (0 bytes)"),
        ("  \n ", "{path} begins with blanks"),
        ("[]", "{path} holds no records"),
        ("instruction,output\n", "{path}, line 1: expected a JSON array or JSON lines, found"),
        ('[{"a": 1},\n {"b": ', "{path}:2: malformed JSON: the array never ends"),
        ('[{"a": "never', "{path}:1: malformed JSON: a string never ends"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    found = refusal(lambda: open_source("alpaca", "instruction", path=path))
    assert found.startswith(message.format(path=path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(lambda: open_source("alpaca", "instruction", path=tmp_path))


@pytest.mark.parametrize(
    ("type_", "line", "message"),
    [
        ("alpaca", '{"instruction": "a", "output": }', "the record is not valid JSON"),
        ("alpaca", '"just text"', "expected an object, found str"),
        (
            "alpaca",
            '{"instruction": ' + "9" * 5000 + "}",
            "the record is not usable JSON: Exceeds the limit",
        ),
        ("alpaca", '{"a": ' + "[" * 99_999 + "]" * 99_999 + "}", "nested too deeply"),
        ("alpaca", '{"instruction": "a"}', "lacks 'output'; its keys: 'instruction'"),
        ("alpaca", '{"instruction": "a", "output": ["b"]}', "'output' must be text, found list"),
        ("alpaca", '{"instruction": " ", "output": "b"}', "'instruction' is empty"),
        (
            "sharegpt",
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"},'
            ' {"from": "gpt", "value": "c"}]}',
            "turns must alternate: turn 2 is from 'user', expected 'assistant'",
        ),
        (
            "sharegpt",
            '{"conversations": [{"from": "robot", "value": "a"}]}',
            "turn 1 is from 'robot', expected one of human",
        ),
        ("sharegpt", '{"conversations": []}', "holds no question with an answer"),
        ("sharegpt", '{"talk": []}', "lacks 'conversations' or 'items' or 'messages'"),
        (
            "sharegpt",
            '{"conversations": [{"from": "human", "value": 3}]}',
            "turn 1 must hold text, found int",
        ),
        (
            "sharegpt",
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}',
            "an answer is empty",
        ),
    ],
)
def test_records_that_are_broken(tmp_path: Path, type_: str, line: str, message: str) -> None:
    good = json.dumps(GOOD)
    path = write(tmp_path / "a.jsonl", f"{good}\n\n{line}\n{good}\n")
    source = open_source(type_, "instruction", path=path)
    assert len(source) == 3
    found = refusal(lambda: source[1])
    assert found.startswith(f"{path}:3: ")
    assert message in found


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "absent.jpg"}, "image 'absent.jpg' is not in"),
        ({"image": 7}, "image must be a file name, found 7"),
        ({"image": "a text, " * 1000}, "File name too long"),
        ({}, "has 1 <image> marks, but 0 images"),
    ],
)
def test_llava_records_whose_picture_is_absent(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    path = write(tmp_path / "l.json", [{**record, "conversations": talk}])
    source = open_source("llava", "instruction", path=path, images=tmp_path)
    found = refusal(lambda: source[0])
    assert found.startswith(f"{path}:1")
    assert message in found


def test_caption_files_whose_pictures_are_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", [{"image": "gone.jpg", "captions": ["Noise."]}])
    found = refusal(lambda: open_source("coco_captions", "caption", path=path, images="nowhere"))
    assert found == "image folder nowhere does not exist"
    source = open_source("coco_captions", "caption", path=path, images=tmp_path)
    assert "image 'gone.jpg' is not in" in refusal(lambda: source[0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": [{"id": 1, "file_name": "a"}]}, "has no array 'annotations'"),
        ({"annotations": [{"image_id": 1}]}, "has no array 'images'"),
        ({"images": [{"name": "a"}], "annotations": [{"a": 1}]}, "'images' name no file"),
    ],
)
def test_json_that_is_no_caption_file(tmp_path: Path, value: Any, message: str) -> None:
    path = write(tmp_path / "c.json", value)
    found = refusal(lambda: open_source("coco_captions", "caption", path=path, images=tmp_path))
    assert str(path) in found
    assert message in found


def test_captions_of_an_unknown_picture(tmp_path: Path) -> None:
    value = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 2, "caption": "Noise."}],
    }
    path = write(tmp_path / "c.json", value)
    source = open_source("coco_captions", "caption", path=path, images=tmp_path)
    assert "image_id 2 is none of the file's images" in refusal(lambda: source[0])


def test_tables_without_header_or_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", "pictures/a.png\tA red star.\n")
    found = refusal(lambda: open_source("pairs", "caption", path=path))
    assert found.startswith(f"{path}, line 1: expected a tab-separated header such as 'url'")
    path = write(tmp_path / "h.tsv", "url\tcaption\n")
    assert "has a header, but no rows" in refusal(
        lambda: open_source("pairs", "caption", path=path)
    )
    path = write(tmp_path / "s.tsv", "url\tcaption\nonly one cell\n")
    source = open_source("pairs", "caption", path=path)
    assert refusal(lambda: source[0]) == f"{path}:2: expected 2 columns, found 1"


def test_shards_that_are_none(tmp_path: Path) -> None:
    assert "no shard" in refusal(
        lambda: open_source("webdataset", "caption", path=str(tmp_path / "x-{0..3}.tar"))
    )
    path = write(tmp_path / "x.tar", "this is no archive" * 100)
    found = refusal(lambda: open_source("webdataset", "caption", path=str(path)))
    assert "is not a readable tar file" in found


def test_captions_need_pictures(tmp_path: Path) -> None:
    source = open_source("alpaca", "caption", path=write_alpaca(tmp_path / "a.json", 2))
    assert "a caption needs an image, found none" in refusal(lambda: source[0])


def test_a_sample_longer_than_the_row(processor: LlamaAdapterProcessor, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [GOOD, {**GOOD, "output": "many words " * 100}])
    source = open_source("alpaca", "instruction", path=path)
    encoder = SampleEncoder(processor, row_length=128)
    found = refusal(lambda: encoder.cut(source[1]))
    assert found.startswith(f"{path}:1 record 2: exchange 1 has ")
    assert "a row holds 128" in found
    cut_off = SampleEncoder(processor, row_length=256, too_long="truncate")
    assert [cut.tokens for cut in cut_off.cut(source[1])] == [256]


def test_too_many_invalid_records_stop_with_the_list(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    records = [GOOD] * 97 + [{"instruction": "unanswered"}] * 3
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    source = open_source("alpaca", "instruction", path=path)
    pieces = measure(source, SampleEncoder(processor, row_length=256))
    assert [fault.where for fault in pieces.invalid] == [f"{path}:{n}" for n in (98, 99, 100)]
    pieces.refuse_beyond(0.03, name="alpaca")
    found = refusal(lambda: pieces.refuse_beyond(0.02, name="alpaca"))
    assert "3 of 100 records are invalid, more than the 2.0% of max_invalid" in found
    assert f"{path}:99: lacks 'output'" in found


def test_pictures_that_break_in_training_are_skipped_and_listed(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path, 10, pictures=5)
    source = open_source("pairs", "caption", path=path)
    stream = stream_of(source, processor, "caption", rows=4, max_invalid=0.2)
    (tmp_path / "pictures" / "picture1.png").write_bytes(b"damaged")
    batch = next(stream)
    assert {fault.where for fault in batch.invalid} == {f"{path}:3", f"{path}:8"}
    assert all("cannot decode image" in fault.reason for fault in batch.invalid)
    assert not {f"{path}:3", f"{path}:8"} & set(batch.sample_ids)
    assert len(batch.inputs["pixel_values"]) == len(batch.sample_ids)
    assert len(stream.invalid) == 2
    (tmp_path / "pictures" / "picture2.png").unlink()
    found = refusal(lambda: [next(stream) for _ in range(4)])
    assert "4 of 10 records are invalid" in found


def test_the_limit_of_invalid_pictures_goes_on_after_a_resume(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path, 10, pictures=5)
    source = open_source("pairs", "caption", path=path)
    before, after = (
        stream_of(source, processor, "caption", rows=4, max_invalid=0.2) for _ in range(2)
    )
    first, second = (tmp_path / "pictures" / f"picture{number}.png" for number in (1, 2))
    content = first.read_bytes()
    first.write_bytes(b"damaged")
    next(before)
    assert len(before.invalid) == 2
    after.load_state_dict(before.state_dict())
    assert after.invalid == before.invalid
    # found broken again, they count once
    assert all(next(after) for _ in range(4))
    assert len(after.invalid) == 2
    first.write_bytes(content)
    after.load_state_dict(before.state_dict())
    second.unlink()
    found = refusal(lambda: [next(after) for _ in range(4)])
    assert "of 10 records are invalid, more than the 20.0%" in found
    assert f"{path}:3" in found


def test_the_limit_of_invalid_pictures_is_of_all_processes_together(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path, 12, pictures=12)
    source = open_source("pairs", "caption", path=path)
    streams = [
        stream_of(source, processor, "caption", rows=4, rank=rank, world=4, max_invalid=0.2)
        for rank in range(4)
    ]

    def step(*damaged: int) -> list[str | None]:
        """What each process is told after steps in which these records cannot be read."""
        for number in damaged:
            (tmp_path / "pictures" / f"picture{number}.png").write_bytes(b"damaged")
        gathered: list[Any] = [None] * 4
        together = threading.Barrier(4, timeout=SECONDS)

        def told(rank: int) -> str | None:
            def gather(own: Any) -> list[Any]:
                gathered[rank] = own
                together.wait()
                return gathered

            for _ in range(3):  # with all processes every record comes
                next(streams[rank])
            try:
                streams[rank].share_invalid(gather)
            except DataError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(told, range(4)))

    assert step(3) == [None] * 4  # one of the three that a process reads, and of twelve
    assert {stream.invalid for stream in streams} == {streams[0].invalid}
    assert [fault.where for fault in streams[0].invalid] == [f"{path}:5"]
    told = step(0, 8)
    assert all("3 of 12 records are invalid, more than the 20.0%" in str(one) for one in told)


def test_several_pictures_for_a_model_that_reads_one(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    names = write_pictures(tmp_path, 2)
    talk = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Both."}]
    path = write(tmp_path / "l.json", [{"image": names, "conversations": talk}])
    source = open_source("llava", "instruction", path=path, images=tmp_path)
    encoder = SampleEncoder(processor, row_length=256)
    assert "holds 2 images, but visual_scope 'all' reads one" in refusal(
        lambda: encoder.cut(source[0])
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\n\n", "holds blank lines alone, expected a header and rows"),
        (b"url\tcapt\xffion\na.png\tNoise.\n", "line 1: 'utf-8' codec can't decode"),
    ],
)
def test_tables_without_a_header_that_can_be_read(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "p.tsv"
    path.write_bytes(content)
    assert message in refusal(lambda: open_source("pairs", "caption", path=path))


def test_a_caption_keeps_unicode_s_other_line_ends(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    path = tmp_path / "p.csv"
    path.write_text(f"image,caption\n{name},one\u2028two\n{name},one\x0ctwo\n")
    source = open_source("pairs", "caption", path=path)
    captions = [source[i].conversation.turns[-1].text.split() for i in range(2)]
    assert captions == [["one", "two"], ["one", "two"]]


def test_numbers_that_name_no_picture(tmp_path: Path) -> None:
    [name] = write_pictures(tmp_path, 1)
    images = [{"id": 1, "file_name": name}, {"id": 10**25, "file_name": name}]
    captions = [{"image_id": n, "caption": "Noise."} for n in (1, 10**25, None, "1", 1.0, 2)]
    path = write(tmp_path / "c.json", {"images": images, "annotations": captions})
    source = open_source("coco_captions", "caption", path=path, images=tmp_path)
    assert source.groups().tolist() == [1, 3, 0, 1, 1, 2]
    assert [source[i].conversation.turns[-1].text for i in (0, 1, 3, 4)] == ["Noise."] * 4
    assert "an image's id must be a number or text" in refusal(lambda: source[2])
    assert "image_id 2 is none of the file's images" in refusal(lambda: source[5])


def test_no_shards_at_all() -> None:
    for path in ([], "shards-{5..2}.tar"):
        assert "means no shard" in refusal(
            lambda p=path: open_source("webdataset", "caption", path=p)
        )
