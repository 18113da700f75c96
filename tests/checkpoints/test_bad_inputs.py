"""Every bad input is one line that names file, tensor, found and expected; nothing stays behind."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_adapter.checkpoints.torch_files import read_torch_file, read_torchscript
from llama_adapter.errors import CheckpointError

Cli = Callable[..., Any]
HEADS = ("--visual-heads", 4, "--prompt-length", 3)


@pytest.fixture
def bring_in(world: Any, cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Run the import of a checkpoint that has been spoilt; `out` must not come to be."""
    (tmp_path / "here").mkdir()

    def run(checkpoint: Path, *options: object, base: Path | None = None) -> str:
        base = base or world.root / "base"
        if not base.exists():
            world.base()
        out = tmp_path / "here" / "out"
        done = cli("import", checkpoint, "--base", base, "--out", out, *HEADS, *options)
        assert done.status == 2, done.stderr
        assert done.stdout == ""
        assert list((tmp_path / "here").iterdir()) == []
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def spoilt(world: Any, kind: str, change: Callable[[dict[str, Any]], None]) -> Path:
    content = world.released(kind)
    change(content.get("model", content))
    return world.save_released(kind, content)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_truncated(keep: int, world: Any, bring_in: Any) -> None:
    path = world.save_released("v2-chat")
    path.write_bytes(path.read_bytes()[:keep])
    message = bring_in(path)
    assert str(path) in message
    assert "truncated" in message
    assert f"{keep} bytes" in message


def test_missing(world: Any, bring_in: Any) -> None:
    assert "nowhere.pth is missing" in bring_in(world.root / "nowhere.pth")


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("this-must-never-run"),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_is_not_run(how: str, world: Any, bring_in: Any) -> None:
    path = world.root / "evil.pth"
    if how == "torch":
        torch.save({"model": Code()}, path)
    else:
        path.write_bytes(pickle.dumps(Code(), protocol=2))
    message = bring_in(path)
    assert "evil.pth holds code (" in message
    assert not Path("this-must-never-run").exists()


def test_unknown_content(world: Any, bring_in: Any) -> None:
    path = world.save_released("other", {"encoder.weight": torch.zeros(2, 2)})
    message = bring_in(path)
    assert "found 1 tensors such as encoder.weight" in message
    for needed in ("adapter_query.weight", "visual_query.weight", "wq_scale"):
        assert needed in message


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, torch.zeros(3)])
def test_no_tensors_by_name(content: Any, world: Any, bring_in: Any) -> None:
    assert "is not a released LLaMA-Adapter checkpoint" in bring_in(
        world.save_released("odd", content)
    )


def test_mixed_content(world: Any, bring_in: Any) -> None:
    path = spoilt(world, "v2-chat", lambda t: t.update({"visual_query.weight": torch.zeros(3, 32)}))
    assert "mixture" in bring_in(path)
    path = spoilt(world, "v1-text", lambda t: t.update({"other.weight": torch.zeros(3)}))
    assert "other.weight" in bring_in(path)


def test_a_stranger_among_the_tensors(world: Any, bring_in: Any) -> None:
    path = spoilt(
        world,
        "v2-chat",
        lambda t: t.update({"layers.0.attention.wq.bias": t["layers.0.attention.wq_bias"]}),
    )
    assert "layers.0.attention.wq.bias" in bring_in(path)


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("v1-text", "adapter_query.weight", [12, 64]),
        ("v2-chat", "layers.0.attention_norm.weight", [64]),
        ("v2-chat-adapter", "adapter_query.weight", [12, 64]),
    ],
)
def test_width(
    kind: str, name: str, shape: list[int], make_world: Any, bring_in: Any, tmp_path: Path
) -> None:
    wide = make_world(dim=64, heads=8, kv_heads=8, root_name="wide")
    message = bring_in(wide.save_released(kind))
    assert f"tensor {name} has shape {shape}" in message
    assert "expected width 48" in message
    assert "base" in message


@pytest.mark.parametrize("kind", ["v1-text", "v2-chat", "v2-chat-adapter"])
@pytest.mark.parametrize("depth", [4, 6])
def test_depth(kind: str, depth: int, make_world: Any, bring_in: Any) -> None:
    other = make_world(layers=depth, root_name="other")
    message = bring_in(other.save_released(kind))
    assert f"layers.{max(depth, 5) - 1}." in message
    assert f"{depth} layers" in message
    assert "has 5" in message


@pytest.mark.parametrize("layer", [1, 3, 4])
@pytest.mark.parametrize("kind", ["v1-text", "v2-chat-adapter", "v2-multimodal-bias"])
def test_one_gate_missing(kind: str, layer: int, world: Any, bring_in: Any) -> None:
    prefix = "llama." if "multimodal" in kind else ""
    name = f"{prefix}layers.{layer}.attention.gate"
    path = spoilt(world, kind, lambda tensors: tensors.pop(name))
    vision = ("--vision", world.save_clip()) if prefix else ()
    message = bring_in(path, *vision)
    assert str(path) in message
    assert name in message
    assert "lacks tensor" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("v1-text", "layers.2.attention.gate"),
        ("v2-chat", "layers.3.feed_forward.w2_scale"),
        ("v2-multimodal-bias", "llama.layers.4.attention.wq.bias"),
        ("v2-multimodal-lora-bias", "llama.layers.1.attention.lora_wk_l2.weight"),
        ("v2-multimodal-bias", "visual_blocks.0.attn.qkv.weight"),
    ],
)
def test_wrong_shape(kind: str, name: str, world: Any, bring_in: Any) -> None:
    expected: list[int] = []

    def grow(tensors: dict[str, Any]) -> None:
        expected.extend(tensors[name].shape)
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    path = spoilt(world, kind, grow)
    vision = ("--vision", world.save_clip()) if "multimodal" in kind else ()
    message = bring_in(path, *vision)
    assert f"{path}: tensor {name} has shape [{2 * expected[0]}" in message
    assert f"expected {expected}" in message


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("v1-text", "adapter_query.weight", []),
        ("v2-multimodal-bias", "visual_query.weight", [32]),
        ("v2-multimodal-bias", "visual_query.weight", [0, 32]),
        ("v2-multimodal-lora-bias", "llama.layers.0.attention.lora_wq_l1.weight", []),
    ],
)
def test_no_matrix(kind: str, name: str, shape: list[int], world: Any, bring_in: Any) -> None:
    path = spoilt(world, kind, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    message = bring_in(path)
    assert f"{path}: tensor {name} has shape {shape}, expected [rows, width]" in message


@pytest.mark.parametrize("reader", [read_torch_file, read_torchscript])
def test_flipped_bytes(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    """The pickle of an archive with one byte changed: read all the same, or CheckpointError."""
    torch.save({"a.b": torch.zeros(2), "c": torch.ones(1)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in contents if name.endswith("/data.pkl"))
    refusals = 0
    for at in range(2, len(contents[pickled])):
        damaged = bytearray(contents[pickled])
        damaged[at] ^= 1 + at * 37 % 255
        path = tmp_path / "damaged.pth"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, bytes(damaged) if name == pickled else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it makes of some of them
            try:
                reader(path)
            except CheckpointError:
                refusals += 1
    assert refusals > 20


def test_one_tensor_missing(world: Any, bring_in: Any) -> None:
    path = spoilt(world, "v2-chat", lambda t: t.pop("layers.2.attention.wo_bias"))
    assert "lacks tensor layers.2.attention.wo_bias of shape [48]; found 79" in bring_in(path)


def test_config_and_content_disagree(world: Any, bring_in: Any) -> None:
    content = world.released("v2-multimodal-bias")
    content["config"]["w_lora"] = True
    path = world.save_released("v2-multimodal-bias", content)
    assert "config says w_lora True" in bring_in(path, "--vision", world.save_clip())


def test_nan_is_a_warning_that_names_the_tensor(world: Any, cli: Cli, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["layers.2.attention.wo_bias"][3:5] = float("nan")

    path = spoilt(world, "v2-chat", spoil)
    done = cli("import", path, "--base", world.base(), "--out", tmp_path / "out")
    assert done.status == 0
    assert "layers.2.attention.wo_bias holds 2 values that are not finite, of 48" in done.stderr
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["layers.2.attention.o_proj.bias"].isnan().sum() == 2


def test_vision_is_needed(world: Any, bring_in: Any) -> None:
    message = bring_in(world.save_released("v2-multimodal-bias"))
    assert "--vision is needed" in message


def test_vision_of_another_size(world: Any, bring_in: Any) -> None:
    path = world.save_released("v2-multimodal-bias")
    message = bring_in(path, "--vision", world.save_clip(out=24))
    assert f"{path}: tensor clip_proj.weight has shape [32, 20]" in message
    assert "expected [32, 24] for the vision encoder" in message


@pytest.mark.parametrize("name", ["conv1.weight", "proj", "transformer.resblocks.0.ln_1.bias"])
def test_damaged_vision_tower(name: str, world: Any, bring_in: Any) -> None:
    tensors = world.clip()
    del tensors[f"visual.{name}"]
    torch.save(tensors, world.root / "clip.pt")
    path = world.save_released("v2-multimodal-bias")
    message = bring_in(path, "--vision", world.root / "clip.pt")
    assert "clip.pt" in message
    assert "lacks" in message


def test_vision_directory_that_is_no_clip(world: Any, bring_in: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    path = world.save_released("v2-multimodal-bias")
    assert str(empty) in bring_in(path, "--vision", empty)


def test_base_without_params(world: Any, bring_in: Any) -> None:
    base = world.base()
    (base / "params.json").unlink()
    message = bring_in(world.save_released("v2-chat"))
    assert f"{base / 'params.json'} is missing" in message


def test_base_that_is_none(world: Any, bring_in: Any, tmp_path: Path) -> None:
    path = world.save_released("v2-chat")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither params.json" in bring_in(path, base=empty)
    message = bring_in(path, base=path)
    assert "is not a directory" in message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("n_layers", 4, "has 5 layers, params.json says 4"),
        ("dim", 96, "tensor tok_embeddings.weight has shape [113, 48], expected [113, 96]"),
        ("multiple_of", 100, "tensor layers.0.feed_forward.w1.weight has shape"),
        ("vocab_size", 200, "holds 113 tokens, params.json says 200"),
        ("n_heads", "six", "n_heads must be a positive integer, found 'six'"),
        ("norm_eps", "x", "params.json: norm_eps must be a positive number, found 'x'"),
        ("vocab_size", "many", "vocab_size must be a positive integer, found 'many'"),
        ("multiple_of", 0, "multiple_of must be a positive integer, found 0"),
        ("ffn_dim_multiplier", [1], "ffn_dim_multiplier must be a positive number, found [1]"),
        ("rope_theta", -1, "rope_theta must be a positive number, found -1"),
    ],
)
def test_params_that_lie(key: str, value: Any, says: str, world: Any, bring_in: Any) -> None:
    base = world.base()
    params = {**json.loads((base / "params.json").read_text()), key: value}
    (base / "params.json").write_text(json.dumps(params))
    assert says in bring_in(world.save_released("v2-chat"))


def test_null_in_params_is_as_good_as_absent(world: Any, cli: Cli, tmp_path: Path) -> None:
    base = world.base()
    params = {**world.params(), "vocab_size": None, "norm_eps": None}
    (base / "params.json").write_text(json.dumps(params))
    path = world.save_released("v2-chat")
    done = cli("import", path, "--base", base, "--out", tmp_path / "out")
    assert done.status == 0, done.stderr


def test_damaged_base(world: Any, bring_in: Any) -> None:
    base = world.base()
    (base / "params.json").write_text("{")
    assert "is not valid JSON" in bring_in(world.save_released("v2-chat"))
    (base / "params.json").write_text(json.dumps(world.params()))
    shard = base / "consolidated.00.pth"
    shard.write_bytes(shard.read_bytes()[:-5000])
    message = bring_in(world.save_released("v2-chat"))
    assert f"{shard} is truncated" in message


def test_a_shard_is_missing(world: Any, bring_in: Any) -> None:
    base = world.base(shards=3)
    (base / "consolidated.01.pth").unlink()
    assert "lacks consolidated.01.pth" in bring_in(world.save_released("v2-chat"))


def test_a_base_tensor_is_missing(world: Any, bring_in: Any) -> None:
    tensors = world.base_tensors()
    del tensors["layers.3.attention.wk.weight"]
    base = world.base(tensors=tensors)
    message = bring_in(world.save_released("v2-chat"))
    assert f"{base / 'consolidated.00.pth'} lacks tensor layers.3.attention.wk.weight" in message


def test_another_base_needs_a_word(make_world: Any, cli: Cli, tmp_path: Path) -> None:
    world = make_world(kv_heads=2)
    call = ("import", world.save_released("v1-text"), "--base", world.base(), *HEADS)
    done = cli(*call, "--out", tmp_path / "out")
    assert done.status == 2
    assert "2 key heads for 6 heads" in done.stderr
    assert "--allow-other-base" in done.stderr
    done = cli(*call, "--out", tmp_path / "out", "--allow-other-base")
    assert done.status == 0
    assert "not a base that" in done.stderr


def test_existing_output(world: Any, cli: Cli, tmp_path: Path) -> None:
    call = ("import", world.save_released("v2-chat"), "--base", world.base(), "--out")
    out = tmp_path / "out"
    assert cli(*call, out).status == 0
    before = sorted(out.iterdir())
    done = cli(*call, out)
    assert done.status == 2
    assert f"{out} exists" in done.stderr
    assert "--overwrite" in done.stderr
    assert sorted(out.iterdir()) == before
    assert cli(*call, out, "--overwrite").status == 0


def test_overwrite_spares_what_is_not_ours(world: Any, cli: Cli, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    base = world.base()
    call = ("import", world.save_released("v2-chat"), "--base", base, "--overwrite", "--out")
    assert "no model" in cli(*call, precious).stderr
    assert (precious / "thesis.txt").read_text() == "years"
    done = cli(*call, base)
    assert done.status == 2
    assert "is inside the output directory" in done.stderr
    assert (base / "params.json").exists()


def test_gate_is_checked(world: Any, bring_in: Any) -> None:
    assert "--gate must be tanh or raw" in bring_in(
        world.save_released("v1-text"), "--gate", "sigmoid"
    )


def test_raw_gates_are_for_v1(world: Any, bring_in: Any) -> None:
    message = bring_in(world.save_released("v2-chat"), "--gate", "raw")
    assert "is v2-chat: --gate raw is for v1-text files only" in message
