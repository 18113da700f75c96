"""Files of torch.save and torch.jit.save: read as they were written, or refused in one line."""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter.checkpoints.torch_files import (
    INERT,
    Inert,
    read_tensors,
    read_torch_file,
    read_torchscript,
)
from llama_adapter.errors import CheckpointError

Change = Callable[[dict[str, bytes]], None]


def rewritten(source: Path, target: Path, change: Change, compression: int = 0) -> Path:
    """A copy of an archive whose members were changed, with checksums that fit them."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def member(members: dict[str, bytes], ending: str) -> str:
    return next(name for name in members if name.endswith(ending))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(100.0), "b": {"c": torch.ones(3, 4).T}}, tmp_path / "saved.pth")
    return tmp_path / "saved.pth"


@pytest.mark.parametrize("mmap", [False, True])
def test_what_torch_writes_is_read(mmap: bool, saved: Path) -> None:
    content = read_torch_file(saved, mmap=mmap)
    assert torch.equal(content["a"], torch.arange(100.0))
    assert torch.equal(content["b"]["c"], torch.ones(4, 3))


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(9)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_torch_file(tmp_path / "a.pth")["a"], torch.arange(9))


def test_a_flipped_bit_anywhere_is_refused_or_without_effect(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "damaged.pth").write_bytes(damaged)
        try:
            content = read_torch_file(tmp_path / "damaged.pth")
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(content["a"], torch.arange(100.0))
            assert torch.equal(content["b"]["c"], torch.ones(4, 3))
    assert refused > 100


@pytest.mark.parametrize("mmap", [False, True])
def test_members_must_have_the_size_of_their_tensors(
    mmap: bool, saved: Path, tmp_path: Path
) -> None:
    def shorten(members: dict[str, bytes]) -> None:
        name = member(members, "/data/0")
        members[name] = members[name][:-8]

    path = rewritten(saved, tmp_path / "short.pth", shorten)
    with pytest.raises(CheckpointError, match="storage 0 has 392 bytes, expected 100 values"):
        read_torch_file(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_compressed_members_are_refused(mmap: bool, saved: Path, tmp_path: Path) -> None:
    path = rewritten(saved, tmp_path / "small.pth", lambda _: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read_torch_file(path, mmap=mmap)


def test_a_bomb_is_not_unpacked(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("saved/data.pkl", b"")
        with archive.open("saved/data/0", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="is compressed"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("saved/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="is compressed"):
        read_tensors(path)


def test_an_expanded_tensor_is_not_written_out(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="would take 4398046511104 bytes"):
        read_torch_file(tmp_path / "a.pth")
    torch.save({"a": torch.zeros(1).expand(1, 32, 1, 1)}, tmp_path / "a.pth")
    assert read_torch_file(tmp_path / "a.pth")["a"].shape == (1, 32, 1, 1)


class Own(Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "tensor a has no values"),
        (torch.ones(2).untyped_storage(), "bare storage"),
        (torch.ones(3).as_subclass(Own), "holds code"),
    ],
    ids=["sparse", "meta", "storage", "subclass"],
)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors(value: Any, says: str, tmp_path: Path) -> None:
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=says) as refused:
        read_torch_file(tmp_path / "a.pth")
    assert "\n" not in str(refused.value)


def test_settings_of_a_training_script_are_left_out(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, out=Path("x"), names=["a"])
    torch.save({"model": {"a": torch.ones(2)}, "args": args}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds code \(argparse.Namespace\)"):
        read_torch_file(tmp_path / "a.pth")
    content = read_torch_file(tmp_path / "a.pth", inert=INERT)
    assert isinstance(content["args"], Inert)
    assert torch.equal(content["model"]["a"], torch.ones(2))


class Touches:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.made_of = what, arguments

    def __reduce__(self) -> Any:
        return self.made_of


HOSTILE = (
    Touches(Path.touch, Path("this-must-never-run")),
    Touches(eval, "open('this-must-never-run', 'w')"),
    Touches(exec, "open('this-must-never-run', 'w')"),
    Touches(getattr, argparse.Namespace, "__init__"),
    Touches(argparse.ArgumentParser, "x"),
    Touches(argparse.FileType("w"), "this-must-never-run"),
)


@pytest.mark.parametrize("evil", HOSTILE)
def test_code_stays_out_beside_settings(
    evil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hidden = argparse.Namespace(lr=evil)
    for content in ({"args": hidden}, {"args": evil}, argparse.Namespace(x=[evil])):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="holds code"):
            read_torch_file(tmp_path / "a.pth", inert=INERT)
    assert not Path("this-must-never-run").exists()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(20, 30)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Tower()), tmp_path / "script.pt")
    return tmp_path / "script.pt"


def test_torchscript(script: Path, tmp_path: Path) -> None:
    tensors = read_torchscript(script)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "inner.weight": (30, 20),
        "inner.bias": (30,),
    }
    whole, refused = script.read_bytes(), 0
    for at in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            found = read_torchscript(tmp_path / "damaged.pt")
        except CheckpointError:
            refused += 1
        else:
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert refused > 50


def test_torchscript_with_a_short_storage(script: Path, tmp_path: Path) -> None:
    def lengthen(members: dict[str, bytes]) -> None:
        members[member(members, "/data/0")] += bytes(4)

    path = rewritten(script, tmp_path / "long.pt", lengthen)
    with pytest.raises(CheckpointError, match="storage 0 has 2404 bytes, expected 600 values"):
        read_torchscript(path)


def test_torchscript_whose_pickle_asks_for_memory(script: Path, tmp_path: Path) -> None:
    def ask(members: dict[str, bytes]) -> None:
        name = member(members, "script/data.pkl")
        members[name] = (
            pickle.PROTO
            + b"\2"
            + pickle.NONE
            + pickle.LONG_BINPUT
            + struct.pack("<I", 2**31)
            + b"."
        )

    path = rewritten(script, tmp_path / "memo.pt", ask)
    with pytest.raises(CheckpointError, match="its pickle has an entry 2147483648"):
        read_torchscript(path)
