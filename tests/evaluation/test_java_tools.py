"""The programs behind the PTB tokenizer and METEOR."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llama_adapter.evaluation import java_tools


def test_a_ctrl_c_in_the_terminal_does_not_reach_java(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is interrupted while captions are scored ends with a checkpoint."""
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}\nimport os\nprint(os.getpgrp())\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    group, _ = java_tools._run_java([], text="")
    assert int(group) != os.getpgrp()
