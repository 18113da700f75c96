"""Bases, descriptions and disks that are damaged or full: one line, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.disk import disk_of

from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.extras import EXTRAS_NAME
from llama_adapter.checkpoints.meta_base import MetaBase
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.errors import CheckpointError

Cli = Callable[..., Any]


def one_line(done: Any) -> str:
    assert done.status == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize("size", [0, 300, 20_000, 100_000])
def test_a_full_disk_leaves_nothing(
    size: int, make_world: Any, cli: Cli, tmp_path: Path, sentencepiece_file: Path
) -> None:
    world = make_world(vocab=400)
    base = world.base()
    (base / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    path = world.save_released("v2-chat")
    here = tmp_path / "here"
    here.mkdir()
    with disk_of(size):
        done = cli("import", path, "--base", base, "--out", here / "out", "--allow-other-base")
    assert "cannot write" in one_line(done)
    assert list(here.iterdir()) == []


@pytest.fixture
def imported(world: Any, tmp_path: Path) -> Path:
    import_released(world.save_released("v2-chat"), base=world.base(), out=tmp_path / "in")
    return tmp_path / "in"


@pytest.mark.parametrize("size", [0, 300, 20_000])
@pytest.mark.parametrize("options", [(), ("--format", "released")])
def test_a_full_disk_at_export(
    options: tuple[str, ...], size: int, imported: Path, cli: Cli, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    with disk_of(size):
        done = cli("export", imported, "--out", here / "deep" / "out", *options)
    assert "cannot write" in one_line(done)
    assert list(here.iterdir()) == []


def test_a_place_that_cannot_be_written(imported: Path, world: Any, cli: Cli) -> None:
    (world.root / "file").write_text("")
    for out in (world.root / "file" / "out", Path("/proc/nowhere/out")):
        assert f"cannot write {out}" in one_line(cli("export", imported, "--out", out))
        path = world.root / "v2-chat.pth"
        done = cli("import", path, "--base", world.root / "base", "--out", out)
        assert f"cannot write {out}" in one_line(done)


@pytest.fixture
def stored(world: Any, tmp_path: Path) -> Path:
    """A base in Hugging Face's layout."""
    directory = tmp_path / "hf"
    directory.mkdir()
    MetaBase(world.base("source")).convert(directory)
    return directory


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


def change_tensors(path: Path, **changes: Any) -> None:
    tensors = {**load_file(path), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: cut(d / "model.safetensors", 0.5), "model.safetensors is damaged"),
        (lambda d: cut(d / "model.safetensors", 0), "model.safetensors is damaged"),
        (lambda d: cut(d / "config.json", 0.5), "config.json"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
        (lambda d: edit(d / "config.json", num_hidden_layers=10**12), "num_hidden_layers 1e"),
        (lambda d: edit(d / "config.json", num_hidden_layers=6), "lacks tensor model.layers.5."),
        (lambda d: edit(d / "config.json", num_hidden_layers=4), "has tensor model.layers.4."),
        (lambda d: edit(d / "config.json", vocab_size=500), "embed_tokens.weight has shape"),
        (lambda d: edit(d / "config.json", intermediate_size=10**15), "intermediate_size 1e"),
        (lambda d: edit(d / "config.json", hidden_size="x"), "config"),
        (lambda d: edit(d / "config.json", num_attention_heads=0), "config"),
        (lambda d: change_tensors(d / "model.safetensors", **{NORM: None}), f"lacks tensor {NORM}"),
        (
            lambda d: change_tensors(d / "model.safetensors", **{NORM: torch.ones(48).int()}),
            f"tensor {NORM} has shape [48] and dtype I32",
        ),
        (
            lambda d: change_tensors(d / "model.safetensors", odd=torch.ones(48)),
            "has tensor odd, which",
        ),
        (lambda d: index(d, {"weight_map": {"a": "../x.safetensors"}}), "is not next to it"),
        (lambda d: index(d, {"weight_map": {"a": 1}}), "no weight_map of file names"),
        (lambda d: index(d, {"weight_map": {"a": "b.safetensors"}}), "b.safetensors is missing"),
        (lambda d: index(d, []), "must hold a JSON object"),
        (lambda d: index(d, {}), "no weight_map"),
    ],
)
def test_hugging_face_bases(
    damage: Callable[[Path], Any], says: str, stored: Path, world: Any, cli: Cli, tmp_path: Path
) -> None:
    path = world.save_released("v2-chat")
    damage(stored)
    done = cli("import", path, "--base", stored, "--out", tmp_path / "out", "--allow-other-base")
    assert says in one_line(done)
    assert not (tmp_path / "out").exists()


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def index(directory: Path, content: Any) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b'{"adapter_len"', "is not valid JSON"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[]", "must hold a JSON object"),
        (b'{"adapter_len": "10"}', "adapter_len must be a positive integer, found '10'"),
        (b'{"adapter_len": 1e999}', "adapter_len must be a positive integer, found inf"),
        (b'{"adapter_len": 10000000000}', "adapter_len must be a positive integer"),
        (b'{"adapter_len": 10, "adapter_len": 3}', "occurs twice"),
        (b'{"visual": [4]}', "visual must be an object"),
        (b'{"visual": {"v_num_heads": -4}}', "v_num_heads must be a positive integer, found -4"),
        (b'{"visual": {"v_num_heads": true}}', "v_num_heads must be a positive integer"),
    ],
)
def test_descriptions_beside_a_file(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as refused:
        Overrides.next_to(tmp_path / "adapter.pth")
    assert "meta.json" in str(refused.value)


def test_a_chat_adapter_has_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"adapter_len": 0}')
    assert Overrides.next_to(tmp_path / "adapter.pth") == Overrides()


def test_a_description_of_something_else_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"title": "my run", "visual": {"size": 224}}')
    assert Overrides.next_to(tmp_path / "adapter.pth") == Overrides()


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "v9"), ("kind", "gone"), ("is_wrapped", "yes"), ("config", [1]), ("dtypes", []),
     ("dtypes", {"a": "float99"}), ("dtypes", {"a": "float32"}), ("absent", ["nothing"]),
     ("absent", 3), ("more", 1)],
)  # fmt: skip
def test_what_an_import_kept_is_damaged(
    key: str, value: Any, imported: Path, cli: Cli, tmp_path: Path
) -> None:
    path = imported / EXTRAS_NAME
    origin = imported_origin(path)
    origin[key] = value
    kept = {name: part for name, part in origin.items() if part != "gone"}
    save_file(load_file(path), path, metadata={"format": "pt", "released": json.dumps(kept)})
    done = cli("export", imported, "--out", tmp_path / "out", "--format", "released")
    assert EXTRAS_NAME in one_line(done)
    assert not (tmp_path / "out").exists()
    assert cli("info", imported).status in (0, 2)


def imported_origin(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["released"])


def test_an_adapter_that_lacks_a_tensor_is_not_exported(
    imported: Path, cli: Cli, tmp_path: Path
) -> None:
    name = "layers.3.attention.o_proj.bias"
    change_tensors(imported / "adapter_model.safetensors", **{name: None})
    done = cli("export", imported, "--out", tmp_path / "out", "--format", "released")
    assert f"tensor {name} has shape None, expected [48]" in one_line(done)


@pytest.mark.parametrize("kind", ["v2-chat", "v1-text"])
def test_info_of_what_is_no_adapter_directory(
    kind: str, world: Any, imported: Path, stored: Path, cli: Cli, tmp_path: Path
) -> None:
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for path in (world.save_released(kind), world.root / "base", stored, peft, tmp_path / "x"):
        one_line(cli("info", path))
    edit(imported / "base" / "config.json", num_hidden_layers=10**12)
    done = cli("info", imported, "--json")
    assert done.status == 0
    assert json.loads(done.stdout)["base_parameters"] is None
