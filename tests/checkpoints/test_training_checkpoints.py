"""Checkpoints of the authors' training scripts: what was trained is taken and nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.meta_base import MetaBase
from llama_adapter.checkpoints.released import read_released
from llama_adapter.checkpoints.released_export import export_released
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.errors import CheckpointError

Cli = Callable[..., Any]
OVERRIDES = Overrides(prompt_length=3, projector_heads=4)
KINDS = ("v1-text", "v2-multimodal-bias", "v2-multimodal-lora-bias", "v2-chat-adapter")
NORMS = ("attention_norm.weight", "ffn_norm.weight", "norm.weight")


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("this-must-never-run"),)


def training_checkpoint(
    kind: str,
    adapter: dict[str, Tensor],
    base: dict[str, Tensor],
    *,
    prefix: str = "",
    **more: Any,
) -> dict[str, Any]:
    """What `misc.save_model` of the authors' code writes: the whole model and its optimizer."""
    inside = "llama." if "multimodal" in kind else ""
    trained_norms = kind != "v1-text"
    own = {
        f"{inside}{name}": tensor.half()
        for name, tensor in base.items()
        if not (trained_norms and name.endswith(NORMS))
    }
    encoder = {"clip.visual.proj": torch.ones(3, 3), "clip.logit_scale": torch.ones(())}
    everything = {**own, **(encoder if inside else {}), **adapter}
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in adapter.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    return {
        "model": {f"{prefix}{name}": tensor for name, tensor in everything.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 4,
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": argparse.Namespace(lr=9e-3, llama_model_path=Path("x"), blr=None, seed=0),
        **more,
    }


def import_file(world: Any, path: Path, out: Path, **options: Any) -> Any:
    is_visual = "multimodal" in path.name
    vision = world.save_clip() if is_visual else None
    return import_released(path, vision=vision, out=out, overrides=OVERRIDES, **options)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", KINDS)
def test_it_becomes_what_the_extracted_file_becomes(
    kind: str, prefix: str, world: Any, tmp_path: Path
) -> None:
    base = world.base_tensors()
    directory = world.base(tensors=base)
    released = world.released(kind)
    adapter = released.get("model", released)
    if kind == "v2-chat-adapter":
        adapter["norm.weight"] = 1 + world.random(world.dim)
    extracted = world.save_released(kind, {"model": adapter})
    import_file(world, extracted, tmp_path / "extracted", base=directory)
    content = training_checkpoint(kind, adapter, base, prefix=prefix)
    path = world.root / f"{kind}-checkpoint-4.pth"
    torch.save(content, path)
    report = import_file(world, path, tmp_path / "trained", base=directory)
    trained, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("trained", "extracted")
    )
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    (said,) = [w for w in report.warnings if "training run" in w]
    for part in ("the base's own", "'optimizer'", "'epoch'", "'scaler'", "'args'"):
        assert part in said
    assert ("the vision encoder's 2 tensors" in said) == ("multimodal" in kind)
    back = torch.load(export_released(tmp_path / "trained", out=tmp_path / "back"))["model"]
    assert back.keys() == adapter.keys()
    assert all(torch.equal(back[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize("layout", ["meta", "shards", "hugging-face"])
@pytest.mark.parametrize("kind", ["v1-text", "v2-multimodal-bias"])
def test_it_belongs_to_the_base_it_was_trained_on(
    kind: str, layout: str, world: Any, tmp_path: Path
) -> None:
    base = world.base_tensors()
    directory = world.base(tensors=base, shards=2 if layout == "shards" else 1)
    if layout == "hugging-face":
        MetaBase(directory).convert(tmp_path)
        directory = tmp_path
    released = world.released(kind)
    content = training_checkpoint(kind, released.get("model", released), base)
    path = world.root / f"{kind}-checkpoint-4.pth"
    torch.save(content, path)
    import_file(world, path, tmp_path / "out", base=directory)
    inside = "llama." if "multimodal" in kind else ""
    for name in ("layers.2.attention.wk.weight", "output.weight"):
        changed = {**content["model"]}
        changed[f"{inside}{name}"] = changed[f"{inside}{name}"] + 0.01
        torch.save({**content, "model": changed}, path)
        with pytest.raises(CheckpointError, match=f"{name} is not that of the base"):
            import_file(world, path, tmp_path / "other", base=directory)
        report = import_file(world, path, tmp_path / name, base=directory, allow_other_base=True)
        assert any(f"{name} is not that of the base" in w for w in report.warnings)


def test_code_in_the_settings_stays_out(
    world: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = world.base_tensors()
    directory = world.base(tensors=base)
    hostile = argparse.Namespace(lr=Code())
    content = training_checkpoint("v1-text", world.released("v1-text"), base, args=hostile)
    torch.save(content, world.root / "evil.pth")
    done = cli("import", world.root / "evil.pth", "--base", directory, "--out", tmp_path / "out")
    assert done.status == 2
    assert "evil.pth holds code (" in done.stderr
    assert not Path("this-must-never-run").exists()
    assert not (tmp_path / "out").exists()


def test_norms_of_v2_are_kept(world: Any) -> None:
    """V1 freezes norms, V2 learns them: the same names, told apart by what stands beside them."""
    base = world.base_tensors()
    for kind, has_norms in (("v1-text", False), ("v2-multimodal-bias", True)):
        released = world.released(kind)
        adapter = released.get("model", released)
        torch.save(training_checkpoint(kind, adapter, base), world.root / "c.pth")
        found = read_released(world.root / "c.pth")
        assert any(name.endswith("norm.weight") for name in found.tensors) == has_norms
        assert found.tensors.keys() == adapter.keys()


def litgpt(*names: str) -> dict[str, Any]:
    inner = ["attn.gating_factor", "attn.adapter_wte.weight", *names]
    return {"model": {f"transformer.h.{n}.{name}": torch.ones(2) for n in (2, 3) for name in inner}}


@pytest.mark.parametrize(("more", "says"), [
    ({"lm_head.adapter_bias": torch.ones(9)}, "a bias and a scale of lm_head"),
    ({}, "an adapter of litgpt, whose layout is not read"),
])  # fmt: skip
def test_adapters_of_litgpt_are_called_that(
    more: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    content = litgpt("attn.qkv.adapter_bias", "attn.qkv.adapter_scale", "norm_1.weight")
    content["model"] |= more
    torch.save(content, tmp_path / "lit_model.pth.adapter_v2")
    with pytest.raises(CheckpointError, match=says):
        read_released(tmp_path / "lit_model.pth.adapter_v2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"peft_type": "LORA", "r": 8}', "is a peft adapter (LORA), not one of LLaMA-Adapter"),
        ('{"model_type": "llama_adapter", "base": {"name_or_path": "b"}}', "directory already"),
        ("{}", "is an adapter directory of another library"),
        ("[", "with a damaged adapter_config.json"),
        ("[]", "with a damaged adapter_config.json"),
        (None, "is a directory; expected"),
    ],
)
def test_directories_in_place_of_files(
    content: str | None, says: str, world: Any, cli: Cli, tmp_path: Path
) -> None:
    directory = tmp_path / "given"
    directory.mkdir()
    if content is not None:
        (directory / "adapter_config.json").write_text(content)
    done = cli("import", directory, "--base", world.base(), "--out", tmp_path / "out")
    assert done.status == 2
    assert says in done.stderr
    if content is not None:
        path = world.save_released("v1-text")
        done = cli("import", path, "--base", directory, "--out", tmp_path / "out")
        assert done.status == 2
        assert says in done.stderr
        assert "expected a model" in done.stderr


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda t: t.to(torch.int8), "has dtype torch.int8, expected torch.float32"),
        (lambda t: t.to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn"),
        (lambda t: t.to(torch.complex64), "has dtype torch.complex64"),
        (lambda t: t.bool(), "has dtype torch.bool"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.to("meta"), "has no values"),
        (lambda t: t.double() * 1e300, "not finite in torch.float32"),
    ],
)
def test_odd_tensors(
    value: Callable[[Tensor], Tensor], says: str, world: Any, tmp_path: Path
) -> None:
    content = world.released("v2-chat")
    name = "layers.3.attention.wo_bias"
    content["model"][name] = value(content["model"][name])
    with pytest.raises(CheckpointError, match=f"{name}.*{says}"):
        import_released(
            world.save_released("v2-chat", content), base=world.base(), out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["parameter", "sliced", "float16", "float64", "bfloat16"])
def test_tensors_that_are_right_all_the_same(how: str, world: Any, tmp_path: Path) -> None:
    content = world.released("v2-chat")
    name = "layers.3.attention.wo_bias"
    plain = content["model"][name].half().float()
    content["model"][name] = {
        "parameter": lambda: torch.nn.Parameter(plain),
        "sliced": lambda: torch.stack([plain, plain], 1)[:, 0],
        "float16": plain.half,
        "float64": plain.double,
        "bfloat16": plain.bfloat16,
    }[how]()
    import_released(
        world.save_released("v2-chat", content), base=world.base(), out=tmp_path / "out"
    )
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = stored["layers.3.attention.o_proj.bias"]
    assert torch.equal(found, plain.bfloat16().float() if how == "bfloat16" else plain)


def test_a_second_gate_without_lora_is_used(world: Any, tmp_path: Path) -> None:
    content = world.released("v2-multimodal-bias")
    for layer in range(world.layers):
        content["model"][f"llama.layers.{layer}.attention.new_gate"] = torch.full((1, 1, 1, 1), 1.5)
    path = world.save_released("v2-multimodal-bias", content)
    report = import_file(world, path, tmp_path / "out", base=world.base())
    assert report.config.gate_scale
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["layers.4.attention.gate_scale"] == 1.5
