"""What a long command says where no terminal shows a bar."""

from __future__ import annotations

import re

import pytest

from llama_adapter.cli import progress


def test_a_log_gets_a_line_once_a_stage_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    advance = progress.lines("answers", 3)
    advance(1)
    assert capsys.readouterr().err == ""
    advance(2)
    advance(1)  # more than was announced is not said again
    assert re.fullmatch(r"answers: 3 of 3 in \d+ s\n", capsys.readouterr().err)


def test_a_log_gets_lines_while_a_stage_is_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    advance = progress.lines("image features", 2_000)
    advance(1_000)
    said = capsys.readouterr().err
    assert re.fullmatch(r"image features: 1,000 of 2,000 in \d+ s\n", said)
