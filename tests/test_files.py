"""Reading is bounded and says what is wrong; writing leaves the old content or the new."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_adapter.checkpoints.directories import output_directory
from llama_adapter.errors import CheckpointError, ConfigError, DataError
from llama_adapter.files import (
    atomic_file,
    expanded,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
    read_yaml,
    write_atomically,
)
from llama_adapter.home import home


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(bytes(100))
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(6 << 30)
    for name, reason in (
        ("pipe", "not a regular file"),
        ("missing", "No such file"),
        ("long", "it has 100 bytes, at most 99 are read"),
        ("sparse", "at most 99 are read"),
        (".", "it is a folder"),
    ):
        with pytest.raises(DataError, match=reason):
            read_bytes(tmp_path / name, error=DataError, limit=99)
    for device in ("/dev/zero", "/dev/stdin", "\0"):
        with pytest.raises(DataError, match=r"not a regular file|null byte|cannot read"):
            read_bytes(Path(device), error=DataError)
    assert read_bytes(tmp_path / "long", error=DataError, limit=100) == bytes(100)


def test_a_file_whose_size_is_not_told_is_read_within_the_limit() -> None:
    """Files of /proc say that they have 0 bytes."""
    with pytest.raises(DataError, match="more than 10 bytes"):
        read_bytes(Path("/proc/self/status"), error=DataError, limit=10)


def test_text_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"ab\xff")
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfab")
    with pytest.raises(ConfigError, match=r"odd is not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "odd", error=ConfigError)
    assert read_text(tmp_path / "marked", error=ConfigError) == "ab"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"b": {"a": 1, "a": 2}}', "key 'a' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
    ],
)
def test_json_that_is_damaged_deep_or_ambiguous(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_json(tmp_path / "x.json", error=ConfigError)
    assert "x.json" in str(caught.value)


def test_json_that_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    assert parse_json("[1]", name="x", error=ConfigError) == [1]
    with pytest.raises(ConfigError, match="must hold a JSON object, found list"):
        read_json_object(tmp_path / "x.json", error=ConfigError)


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "with its aliases written out"),
        ("a: &a [*a]", "an alias contains itself"),
        ("a: 1\na: 2", "key 'a' occurs twice"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!float x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: 2020-13-41", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: " + "1" * 5000, "not valid YAML"),
    ],
)
def test_yaml_that_is_damaged_deep_or_endless(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_yaml(tmp_path / "x.yaml", error=ConfigError)
    assert "\n" not in str(caught.value)


def test_yaml_with_ordinary_aliases() -> None:
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}"
    found = parse_yaml(text, name="x", error=ConfigError)
    assert found == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"ne")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_nothing_is_written_for_a_user_whom_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go into a folder called `~nobody-here`, wherever the program was started."""
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(CheckpointError, match="no user has that name"),
        output_directory(Path("~nobody-here/out")),
    ):
        pytest.fail("it was begun")
    monkeypatch.setenv("LLAMA_ADAPTER_HOME", "~nobody-here/home")
    with pytest.raises(ConfigError, match="LLAMA_ADAPTER_HOME is '~nobody-here/home', but no user"):
        home()
    assert list(tmp_path.iterdir()) == []
    assert expanded("~nobody-here/a.png") == Path("~nobody-here/a.png")
