"""Tar shards: every name is a sample or an invalid record, and nothing leads out of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.data.files import open_source, write_pictures

from llama_adapter.errors import DataError

Member = tuple[str, bytes] | tarfile.TarInfo


def write_shard(path: Path, members: list[Member]) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def found(path: Path | str, **options: Any) -> list[str]:
    """The caption of each sample, or why there is none."""
    source = open_source("webdataset", "caption", path=str(path), **options)
    texts = []
    for index in range(len(source)):
        try:
            texts.append(source[index].conversation.turns[-1].text)
        except DataError as error:
            assert str(error).startswith(source.where(index))  # noqa: PT017
            texts.append("-" + str(error).removeprefix(f"{source.where(index)}: "))
    places = {source.where(index) for index in range(len(source))}
    assert len(places) == len(source)
    return texts


@pytest.fixture
def pixels(tmp_path: Path) -> bytes:
    [name] = write_pictures(tmp_path, 1)
    return (tmp_path / name).read_bytes()


def test_every_name_is_a_sample_or_an_invalid_record(tmp_path: Path, pixels: bytes) -> None:
    members: list[Member] = [
        ("a.png", pixels), ("a.txt", b"One."), ("a.png", pixels), ("a.txt", b"Two."),
        ("b.png", pixels), ("b.jpg", pixels), ("b.txt", b"Three."),
        ("c.png", pixels), ("c.txt", b"Four."), ("c.json", b"{}"), ("c.mask.png", pixels),
        ("d.png", pixels), ("d.txt", b"Five."), ("d.caption", b"Six."),
        ("e.png", pixels), ("f.txt", b"Seven."), ("e.txt", b"Eight."),
        ("README", b"about"), ("._a.png", b"a resource fork"), ("g.png", b""), ("g.txt", b"Nine."),
        ("h.png", pixels), ("h.txt", b"\xff"), ("i.png", pixels), ("i.json", b'{"caption": 1, '),
        ("j.png", pixels), ("j.json", b'{"caption": "\\ud800"}'),
        link("k.png", "/etc/passwd"), ("k.txt", b"Ten."), link("l.png", "a.png"),
    ]  # fmt: skip
    texts = found(write_shard(tmp_path / "a.tar", members))
    assert [text[:28] for text in texts] == [
        "One.", "Two.", "-has several images of one n", "Four.", "-has several texts of one na",
        "-has no text", "-has no image", "-has no image", "-has no text", "-has no image",
        "-'utf-8' codec can't decode ", "-its JSON is not valid JSON:",
        "-message text is not valid U",
        "-its image is a link, and li", "-has no text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, other: data + other, "damaged, or more follows its end"),
        (lambda data, other: data + b"x", "damaged, or more follows its end"),
        (lambda data, other: data[:1100] + b"?" + data[1101:], "damaged, or more follows"),
        (lambda data, other: data[:700], "unexpected end of data"),
    ],
)
def test_shards_that_are_not_read_to_their_end(
    tmp_path: Path, pixels: bytes, damage: Any, message: str
) -> None:
    first = write_shard(tmp_path / "a.tar", [("a.png", pixels), ("a.txt", b"One.")])
    other = write_shard(tmp_path / "b.tar", [("b.png", pixels), ("b.txt", b"Two.")])
    first.write_bytes(damage(first.read_bytes(), other.read_bytes()))
    with pytest.raises(DataError, match=f"a.tar is not a readable tar file: {message}"):
        found(first)


def test_members_of_any_size_are_bounded(tmp_path: Path, pixels: bytes) -> None:
    path = write_shard(tmp_path / "a.tar", [("a.png", pixels), ("a.txt", b"One."), ("b.txt", b"T")])
    huge = tarfile.TarInfo("b.png")
    huge.size = 1 << 33
    with path.open("r+b") as file:
        end = file.seek(512 + 512 * -(-len(pixels) // 512) + 4 * 512)
        file.write(huge.tobuf())
        file.truncate(end + 512 + huge.size + 1024)
    assert found(path) == ["One.", f"-its image has {1 << 33} bytes, at most {1 << 28} are read"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("file://{folder}/x-{{0..999999999}}.tar", "means more than 1000000 shards"),
        ("{folder}/x-{{0..99999999999999999999}}.tar", "no shard"),
        ("{folder}", "is a folder"),
        ("/dev/zero", "not a regular file"),
        ("\0", "no shard"),
    ],
)
def test_patterns_that_mean_no_shards(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(pattern.format(folder=tmp_path))
