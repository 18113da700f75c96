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


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(missing: str, cli: Cli, adapter_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_dir, broken)
    (broken / missing).unlink()
    done = cli("info", broken)
    assert (done.status, done.stdout) == (2, "")
    assert missing in done.stderr


def test_without_a_processor_it_says_what_needs_one(
    cli: Cli, adapter_dir: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapter_dir, moved)
    (moved / "processor_config.json").unlink()
    described = json.loads(cli("info", moved, "--json").stdout)
    assert described["processor"] is None
    assert "chat and eval need it" in described["notes"][-1]


def test_parts_and_share_of_the_base(cli: Cli, adapter_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    described = json.loads(cli("info", adapter_dir, "--json").stdout)
    trainable, parts = described["trainable"], described["parts"]
    assert sum(parts.values()) == trainable["total"]
    assert {"static prompts", "gates", "biases", "scales", "norms"} < parts.keys()
    base = AutoModelForCausalLM.from_pretrained(described["base"]["name_or_path"])
    numbers = sum(p.numel() for p in base.parameters())
    assert described["base_parameters"] == numbers
    assert trainable["percent_of_base"] == pytest.approx(
        100 * trainable["total"] / numbers, abs=1e-4
    )
    assert described["memory_bytes"]["base (bfloat16)"] == 2 * numbers


def test_the_paper_counts(cli: Cli) -> None:
    """V2 §5.1 on LLaMA-7B: 14M in all, biases and scales 0.04 percent (§4.1)."""
    described = json.loads(cli("info", "--shape", "llama-7b", "--json").stdout)
    assert described["base_parameters"] == 6_738_415_616
    parts = described["parts"]
    layers, dim, ffn = 32, 4096, 11008
    assert parts["static prompts"] == 31 * 10 * dim
    assert parts["biases"] == parts["scales"] == layers * (5 * dim + 2 * ffn)
    assert parts["norms"] == (2 * layers + 1) * dim
    assert parts["gates"] == 32 * 32
    assert round(100 * (parts["biases"] + parts["scales"]) / 6_738_415_616, 2) == 0.04
    assert 13_000_000 < described["trainable"]["total"] < 14_500_000


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("13b", 13_015_864_320), ("llama-65b", 65_285_660_672), ("3-8b", 8_030_261_248)],
)
def test_shapes_need_no_weights(shape: str, parameters: int, cli: Cli) -> None:
    described = json.loads(cli("info", "--shape", shape, "--json").stdout)
    assert described["base_parameters"] == parameters


def test_shapes_and_presets_are_known_by_name(cli: Cli) -> None:
    assert "known: llama-7b" in cli("info", "--shape", "llama-7c").stderr
    assert "unknown preset 'v3'" in cli("info", "--shape", "7b", "--preset", "v3").stderr
    assert cli("info").status == 2
    assert cli("info", "toy", "--shape", "7b").status == 2
    assert "an adapter has its own setting" in cli("info", "toy", "--preset", "v1").stderr


def test_a_run_is_told_where_its_adapter_is(cli: Cli, adapter_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_dir, tmp_path / "run" / "adapter")
    refused = cli("info", tmp_path / "run")
    assert refused.status == 2
    assert f"a run? its adapter is {tmp_path / 'run' / 'adapter'}" in refused.stderr
