"""Converted bases against a forward pass in Meta's own layout, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llama_adapter.checkpoints import meta_base
from llama_adapter.checkpoints.bases import describe_stored
from llama_adapter.checkpoints.meta_base import MetaBase
from llama_adapter.model.references import describe_model


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate_neighbours(x_THD: Tensor, theta: float) -> Tensor:
    """Meta's rotation: neighbouring numbers are one complex number."""
    length, _, size = x_THD.shape
    frequencies = theta ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(x_THD.reshape(*x_THD.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def meta_forward(world: Any, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    theta = world.extra.get("rope_theta", 10000.0)
    head = world.dim // world.heads
    x = tensors["tok_embeddings.weight"][tokens]
    causal = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)
    for layer in range(world.layers):

        def w(name: str, layer: int = layer) -> Tensor:
            return tensors[f"layers.{layer}.{name}.weight"]

        h = rms(x, w("attention_norm"))
        q = rotate_neighbours((h @ w("attention.wq").T).view(len(tokens), -1, head), theta)
        k = rotate_neighbours((h @ w("attention.wk").T).view(len(tokens), -1, head), theta)
        v = (h @ w("attention.wv").T).view(len(tokens), -1, head)
        repeat = world.heads // world.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / head**0.5 + causal
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(len(tokens), -1)
        x = x + mixed @ w("attention.wo").T
        h = rms(x, w("ffn_norm"))
        up = F.silu(h @ w("feed_forward.w1").T) * (h @ w("feed_forward.w3").T)
        x = x + up @ w("feed_forward.w2").T
    return rms(x, tensors["norm.weight"]) @ tensors["output.weight"].T


LLAMA_3 = {"rope_theta": 500000.0, "ffn_dim_multiplier": 1.3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 2, "extra": LLAMA_3},
        {"dim": 64, "heads": 4, "kv_heads": 4},
    ],
    ids=["llama-1", "llama-2-70b", "llama-3", "fixture"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_converted_base_computes_the_same(
    options: dict[str, Any], shards: int, make_world: Any, tmp_path: Path
) -> None:
    world = make_world(**options)
    tensors = world.base_tensors()
    is_llama_3 = "extra" in options
    base = MetaBase(world.base(tensors=tensors, shards=shards, embedding_rows=is_llama_3))
    base.convert(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == world.vocab or not is_llama_3
    tokens = torch.tensor([1, 5, 9, 77, 30, 2, 64, 8])
    with torch.no_grad():
        found = model(tokens[None]).logits[0]
    torch.testing.assert_close(found, meta_forward(world, tensors, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("embedding_rows", [True, False])
@pytest.mark.parametrize("shards", [2, 4])
def test_shards_join_to_the_very_same_tensors(
    shards: int, embedding_rows: bool, make_world: Any, tmp_path: Path
) -> None:
    world = make_world(dim=64, heads=8, kv_heads=8, vocab=112)
    tensors = world.base_tensors()
    for name, count in (("one", 1), ("many", shards)):
        (tmp_path / name).mkdir()
        source = world.base(f"base-{name}", tensors=tensors, shards=count,
                            embedding_rows=embedding_rows)  # fmt: skip
        MetaBase(source).convert(tmp_path / name)
    one, many = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_large_bases_come_in_several_files(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = MetaBase(world.base())
    (tmp_path / "one").mkdir()
    base.convert(tmp_path / "one")
    monkeypatch.setattr(meta_base, "FILE_BYTES", 60_000)
    monkeypatch.setattr(meta_base, "MAPPED_BYTES", 10_000)
    (tmp_path / "many").mkdir()
    base.convert(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == base.num_bytes
    one = LlamaForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = LlamaForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert describe_stored(tmp_path / "one", reference="x") == describe_stored(
        tmp_path / "many", reference="x"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_stay_in_their_dtype(dtype: torch.dtype, make_world: Any, tmp_path: Path) -> None:
    MetaBase(make_world(dtype=dtype).base()).convert(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_tied_embeddings(world: Any, tmp_path: Path) -> None:
    tensors = world.base_tensors()
    del tensors["output.weight"]
    MetaBase(world.base(tensors=tensors)).convert(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_llama_3_1_stretches_its_rotation(make_world: Any) -> None:
    world = make_world(extra={"rope_theta": 500000.0, "use_scaled_rope": True})
    config = MetaBase(world.base()).config
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.max_position_embeddings == 131072


def test_a_stored_base_is_described_without_loading_it(world: Any, tmp_path: Path) -> None:
    MetaBase(world.base()).convert(tmp_path)
    loaded = describe_model(LlamaForCausalLM.from_pretrained(tmp_path))
    assert describe_stored(tmp_path, reference=loaded["name_or_path"]) == loaded


def test_files_from_before_torch_1_6(world: Any, tmp_path: Path) -> None:
    base = world.base()
    path = base / "consolidated.00.pth"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    MetaBase(base).convert(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.vocab_size == world.vocab
