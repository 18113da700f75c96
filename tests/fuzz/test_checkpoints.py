"""Damaged released files, Meta bases, CLIP files and tokenizers: refused, or read as they are."""

from __future__ import annotations

import json
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints.conftest import KINDS, World
from tests.checkpoints.conftest import sentencepiece_file as sentencepiece_file
from tests.fuzzing import Campaign, mutated_bytes, mutated_json_text
from torch import Tensor

from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.meta_base import MetaBase
from llama_adapter.checkpoints.released import Released, read_released
from llama_adapter.checkpoints.settings import Overrides
from llama_adapter.checkpoints.tokenizers import convert_tokenizer
from llama_adapter.checkpoints.vision_encoder import read_openai_clip

OVERRIDES = Overrides(prompt_length=2, projector_heads=4)
Tensors = dict[str, Tensor]


@pytest.fixture
def small(tmp_path: Path) -> World:
    """A base of two layers and width 16."""
    (tmp_path / "world").mkdir()
    return World(
        root=tmp_path / "world", dim=16, layers=2, heads=2, kv_heads=2, vocab=40, multiple_of=8,
        prompt_length=2, prompt_layers=1,
    )  # fmt: skip


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_released_files(kind: str, small: World) -> None:
    path = small.save_released(kind)
    whole, expected = path.read_bytes(), read_released(path)
    campaign = Campaign(f"bytes of a {kind} file", inputs=25)

    def as_it_was(found: Released) -> None:
        assert (found.kind, found.file_config) == (expected.kind, expected.file_config)
        same(found.tensors, expected.tensors)

    for rng in campaign:
        path.write_bytes(mutated_bytes(whole, rng))
        campaign.attempt(lambda: read_released(path), accepted=as_it_was)
    assert campaign.counts["refused"] > campaign.counts["accepted"]


def test_pickles_of_released_files(small: World) -> None:
    """With checksums that fit, a damaged pickle can only say other things: no value is made up."""
    path = small.save_released("v2-multimodal-lora-bias")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    stored = b"".join(content for name, content in members.items() if "/data/" in name)
    campaign = Campaign("pickle of a released file", inputs=60)

    def from_the_file(found: Released) -> None:
        for tensor in found.tensors.values():
            content = bytes(tensor.untyped_storage())
            assert content in stored

    for rng in campaign:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, mutated_bytes(content, rng) if name == pickled else content)
        campaign.attempt(lambda: read_released(path), accepted=from_the_file)
    assert campaign.counts["refused"] > campaign.counts["accepted"]


ODD: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.int(), lambda t: t.bool(), lambda t: t.to(torch.complex64), lambda t: t[None],
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to("meta"), lambda t: t.to_sparse(),
    lambda t: t.reshape(-1), lambda t: t[:0], lambda t: torch.zeros(()), lambda t: None,
    lambda t: torch.cat([t, t]), lambda t: t[:1].expand(10**9, *t.shape[1:]), lambda t: "x",
    lambda t: t * float("inf"), lambda t: t.double() * 1e300, lambda t: [t],
)  # fmt: skip
"""What no tensor of these files may become."""
ALIKE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.nn.Parameter, lambda t: t.double(), lambda t: torch.stack([t, t], -1)[..., 0],
)  # fmt: skip
"""What it may become without a difference."""


def changed(tensors: Tensors, rng: random.Random) -> dict[str, Any]:
    """One tensor made odd, renamed, moved to another name, dropped or added; or written alike."""
    content: dict[str, Any] = dict(tensors)
    name = rng.choice(list(content))
    kind = rng.randrange(8)
    if kind == 0:
        del content[name]
    elif kind == 1:
        content[f"{name}x"] = content.pop(name)
    elif kind == 2:
        content[rng.choice(("odd", "layers.7.odd.weight", "layers." + "9" * 5000))] = content[name]
    elif kind == 3:
        content[name] = rng.choice(ALIKE)(content[name])
    elif kind == 4:
        content[3] = content.pop(name)  # type: ignore[index]
    else:
        content[name] = rng.choice(ODD)(content[name])
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_released_files(kind: str, small: World, tmp_path: Path) -> None:
    content = small.released(kind)
    tensors = content.get("model", content)
    base, vision = small.base(), small.save_clip() if "multimodal" in kind else None
    out, path = tmp_path / "out", small.root / "changed.pth"
    campaign = Campaign(f"tensors of a {kind} file", inputs=3)

    def bring_in(given: dict[str, Any]) -> Tensors:
        torch.save({**content, "model": given} if "model" in content else given, path)
        import_released(
            path, base=base, vision=vision, out=out, overrides=OVERRIDES, overwrite=True
        )
        return load_file(out / "adapter_model.safetensors")

    expected = bring_in(tensors)
    for rng in campaign:
        given = changed(tensors, rng)
        if kind == "v1-text":  # gates in both layers: twice the prompts are those of both
            given["adapter_query.weight"] = tensors["adapter_query.weight"]
        unused = [n for n in tensors if n not in given and n.endswith("0.attention.gate")]
        odd = any(
            isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
            and value.layout is torch.strided and value.itemsize > 1
            and value.numel() < 10**6 and not value.isfinite().all() for value in given.values()
        )  # fmt: skip

        def as_it_was(found: Tensors, odd: bool = odd, unused: list[str] = unused) -> None:
            if not odd:  # values of the file itself that are not finite are a warning
                same(found, expected)
            assert odd or unused or len(found) == len(expected)

        campaign.attempt(lambda given=given: bring_in(given), accepted=as_it_was)
        assert not list(tmp_path.glob(".out*"))


def converted(base: Path, out: Path) -> Tensors:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    MetaBase(base).convert(out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 2])
def test_bytes_of_meta_bases(shards: int, small: World, tmp_path: Path) -> None:
    base, out = small.base(shards=shards), tmp_path / "out"
    paths = sorted(base.glob("*.pth"))
    whole = [path.read_bytes() for path in paths]
    expected = converted(base, out)
    campaign = Campaign(f"bytes of a Meta base, {shards} shards", inputs=60)
    for rng in campaign:
        at = rng.randrange(shards)
        paths[at].write_bytes(mutated_bytes(whole[at], rng))
        campaign.attempt(lambda: converted(base, out), accepted=lambda found: same(found, expected))
        paths[at].write_bytes(whole[at])
    assert campaign.counts["refused"] > campaign.counts["accepted"]


@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_of_meta_bases(shards: int, small: World, tmp_path: Path) -> None:
    base, out = small.base(shards=shards), tmp_path / "out"
    paths = sorted(base.glob("*.pth"))
    whole: list[Tensors] = [torch.load(path) for path in paths]
    expected = converted(base, out)
    campaign = Campaign(f"tensors of a Meta base, {shards} shards", inputs=40)

    def alike(found: Tensors) -> None:
        embedding = "model.embed_tokens.weight"  # whose dtype is that of the base
        if found[embedding].dtype == torch.float64 and found[embedding].abs().max() > 1e100:
            return
        same({name: tensor.float() for name, tensor in found.items()}, expected)

    for rng in campaign:
        at = rng.randrange(shards)
        torch.save(changed(whole[at], rng), paths[at])
        campaign.attempt(lambda: converted(base, out), accepted=alike)
        torch.save(whole[at], paths[at])
    assert campaign.counts["refused"] > campaign.counts["accepted"]


def test_params_of_meta_bases(small: World) -> None:
    base = small.base()
    path = base / "params.json"
    params = {**small.params(), "n_kv_heads": 2, "rope_theta": 10000.0, "use_scaled_rope": False,
              "ffn_dim_multiplier": 1.0}  # fmt: skip
    path.write_text(json.dumps(params))
    whole = MetaBase(base).config
    campaign = Campaign("params.json", inputs=100)

    def as_it_says(found: MetaBase) -> None:
        says = {k: v for k, v in json.loads(path.read_bytes()).items() if v is not None}
        config = found.config
        assert config.rms_norm_eps == says.get("norm_eps", 1e-5)
        assert config.rope_parameters["rope_theta"] == says.get("rope_theta", 10000.0)
        is_scaled = config.rope_parameters["rope_type"] == "llama3"
        assert is_scaled == says.get("use_scaled_rope", False)
        assert config.num_attention_heads == says["n_heads"]
        assert config.num_key_value_heads == says.get("n_kv_heads", says["n_heads"])
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
            assert getattr(config, key) == getattr(whole, key)

    for rng in campaign:
        path.write_bytes(mutated_json_text(params, rng))
        campaign.attempt(lambda: MetaBase(base), accepted=as_it_says)
    assert campaign.counts["refused"] > campaign.counts["accepted"]


def test_bytes_of_tokenizers(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece

    whole, path = sentencepiece_file.read_bytes(), tmp_path / "tokenizer.model"
    text = "the quick brown fox jumps over 12 lazy dogs"
    campaign = Campaign("tokenizer.model", inputs=60)

    def as_it_says(found: Any) -> None:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        assert found.encode(text, add_special_tokens=False) == model.encode(text)

    for rng in campaign:
        path.write_bytes(mutated_bytes(whole, rng))
        campaign.attempt(
            lambda: convert_tokenizer(path, vocab_size=400, context_length=2048),
            accepted=as_it_says,
        )


class Holder(torch.nn.Module):
    """A module of modules that has tensors by any names, as OpenAI's towers have."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def torchscript(tensors: Tensors, path: Path) -> Path:
    root = Holder()
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        module: torch.nn.Module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Holder())
            module = getattr(module, parent)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.save(torch.jit.script(root), path)
    return path


@pytest.mark.parametrize("layout", ["torchscript", "plain"])
def test_bytes_of_vision_towers(layout: str, small: World) -> None:
    path = small.save_clip()
    if layout == "torchscript":
        torchscript(small.clip(), path)
    whole = path.read_bytes()
    expected = {n: t.detach() for n, t in read_openai_clip(path).state_dict().items()}
    campaign = Campaign(f"bytes of a CLIP file, {layout}", inputs=20)

    def as_it_was(found: Any) -> None:
        same({n: t.detach() for n, t in found.state_dict().items()}, expected)

    for rng in campaign:
        path.write_bytes(mutated_bytes(whole, rng))
        campaign.attempt(lambda: read_openai_clip(path), accepted=as_it_was)
