from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_adapter.checkpoints.directories import mark_export, output_directory


def test_what_a_killed_run_of_our_number_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("written")
    with output_directory(tmp_path / "out") as stage:
        (stage / "whole").write_text("written")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_an_interrupt_while_replacing_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mark_export(out, kind="merged")
    before = sorted(path.name for path in out.iterdir())
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), output_directory(out, overwrite=True) as stage:
        (stage / "new").write_text("content")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == before
