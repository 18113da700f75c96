from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_info_counts_what_the_model_counts(cli: Cli, adapter_dir: Path) -> None:
    from llama_adapter import LlamaAdapterForConditionalGeneration

    described = json.loads(cli("info", adapter_dir, "--json").stdout)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(adapter_dir)
    for group in ("vision", "language"):
        counted = sum(p.numel() for p in model.group_parameters(group))
        assert described["trainable"][group] == counted
    assert described["layers"] == {"base": 2, "static": [1], "visual": [0]}
    assert described["processor"]["template"] == "toy"
    assert described["adapter"]["prompt_length"] == 2
    assert described["notes"] == []


def test_info_for_people_says_the_same(cli: Cli, adapter_dir: Path) -> None:
    shown = cli("info", adapter_dir).stdout
    described = json.loads(cli("info", adapter_dir, "--json").stdout)
    assert f"{described['trainable']['total']:,}" in shown
    assert "prompt_length" in shown


def test_a_base_that_is_not_here_is_a_note(cli: Cli, adapter_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapter_dir, moved)
    path = moved / "adapter_config.json"
    content = json.loads(path.read_text())
    content["base"]["name_or_path"] = "somewhere/else"
    path.write_text(json.dumps(content))
    described = json.loads(cli("info", moved, "--json").stdout)
    assert described["notes"] == ["the base is not on this machine"]


@pytest.mark.parametrize(
    "missing", ["adapter_config.json", "adapter_model.safetensors", "processor_config.json"]
)
def test_a_missing_file_is_named(missing: str, cli: Cli, adapter_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_dir, broken)
    (broken / missing).unlink()
    done = cli("info", broken)
    assert (done.status, done.stdout) == (2, "")
    assert missing in done.stderr
