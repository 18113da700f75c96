"""Converted bases against a forward pass in Meta's own layout, written out here."""

from __future__ import annotations

import json
import zipfile
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
from llama_adapter.errors import CheckpointError
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


LLAMA_3_2 = {"rope_theta": 500000.0, "use_scaled_rope": True}


def test_tied_embeddings(make_world: Any, tmp_path: Path) -> None:
    world = make_world(extra=LLAMA_3_2)
    tensors = world.base_tensors()
    del tensors["output.weight"]
    MetaBase(world.base(tensors=tensors)).convert(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("extra", [{}, {"rope_theta": 500000.0}])
def test_output_weights_that_are_missing_are_not_made_up(
    extra: dict[str, Any], make_world: Any
) -> None:
    """Only LLaMA 3.2 has none of its own; any other base without them is incomplete."""
    world = make_world(extra=extra)
    tensors = world.base_tensors()
    del tensors["output.weight"]
    with pytest.raises(CheckpointError, match=r"00.pth lacks tensor output.weight, and params.js"):
        MetaBase(world.base(tensors=tensors))


def test_a_wide_base_is_never_tied(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_base, "WIDEST_TIED", 47)
    world = make_world(extra=LLAMA_3_2)
    tensors = world.base_tensors()
    del tensors["output.weight"]
    with pytest.raises(CheckpointError, match=r"lacks tensor output.weight"):
        MetaBase(world.base(tensors=tensors))


@pytest.mark.parametrize(
    "name",
    ["layers.5.attention.wq.weight", "layers.0.attention.wq.bias", "layers.0.attention.wz.weight",
     "tok_embeddings.weights", "vision_model.proj.weight", "output.bias"],
)  # fmt: skip
def test_names_that_the_layout_does_not_know(name: str, world: Any) -> None:
    tensors = world.base_tensors()
    tensors[name] = tensors["layers.0.attention.wq.weight"]
    with pytest.raises(CheckpointError, match=f"{name}|00.pth has 6 layers, params.json says 5"):
        MetaBase(world.base(tensors=tensors))


@pytest.mark.parametrize(
    "name", ["rope.freqs", "layers.0.attention.inner_attention.rope.freqs",
             "layers.3.attention.rotary_emb.inv_freq"],
)  # fmt: skip
def test_names_of_what_is_computed_are_harmless(name: str, world: Any) -> None:
    MetaBase(world.base(tensors={**world.base_tensors(), name: torch.ones(4)}))


def resave(path: Path, **changes: Any) -> None:
    torch.save({**torch.load(path), **changes}, path)


@pytest.mark.parametrize("name", ["norm.weight", "layers.2.ffn_norm.weight"])
def test_shards_that_contradict_each_other(name: str, world: Any, tmp_path: Path) -> None:
    base = world.base(shards=3)
    path = base / "consolidated.02.pth"
    changed = torch.load(path)[name]
    changed[5] += 1e-3
    resave(path, **{name: changed})
    with pytest.raises(CheckpointError, match=f"02.pth: tensor {name} differs from its copy in"):
        MetaBase(base).convert(tmp_path)


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(shard: int, value: float, world: Any, tmp_path: Path) -> None:
    base = world.base(shards=2)
    path = base / f"consolidated.0{shard}.pth"
    changed = torch.load(path)["layers.1.feed_forward.w2.weight"]
    changed[7, 3:5] = value
    resave(path, **{"layers.1.feed_forward.w2.weight": changed})
    with pytest.raises(
        CheckpointError, match=f"0{shard}.pth: tensor layers.1.feed_forward.w2.weig"
    ):
        MetaBase(base).convert(tmp_path)


def test_values_that_do_not_fit_the_dtype_they_end_in(make_world: Any, tmp_path: Path) -> None:
    world = make_world(dtype=torch.float16)
    tensors = world.base_tensors()
    tensors["norm.weight"] = tensors["norm.weight"].float()
    MetaBase(world.base("fits", tensors=tensors)).convert(tmp_path)
    tensors["norm.weight"][3] = 70000.0
    with pytest.raises(
        CheckpointError, match=r"norm.weight holds 1 values .* finite in torch.float"
    ):
        MetaBase(world.base("large", tensors=tensors)).convert(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_dtypes_that_no_weights_have(dtype: torch.dtype, world: Any) -> None:
    tensors = world.base_tensors()
    tensors["layers.1.attention.wk.weight"] = tensors["layers.1.attention.wk.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=f"layers.1.attention.wk.weight has dtype {dtype}"):
        MetaBase(world.base(tensors=tensors))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "parameter", "gradient"])
def test_tensors_that_lie_oddly_in_their_storage(how: str, world: Any, tmp_path: Path) -> None:
    tensors, name = world.base_tensors(), "layers.1.attention.wo.weight"
    plain = tensors[name].clone()
    if how == "expanded":
        plain = plain[:1].expand(48, 48).clone()
    tensors[name] = {
        "transposed": lambda: plain.T.contiguous().T,
        "sliced": lambda: torch.cat([plain, plain], 1)[:, :48],
        "expanded": lambda: plain[:1].expand(48, 48),
        "parameter": lambda: torch.nn.Parameter(plain),
        "gradient": lambda: plain.clone().requires_grad_(),
    }[how]()
    MetaBase(world.base(tensors=tensors)).convert(tmp_path)
    found = load_file(tmp_path / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(found, plain)


def test_a_shard_with_a_flipped_bit(world: Any, tmp_path: Path) -> None:
    base = world.base()
    path = base / "consolidated.00.pth"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    opened = MetaBase(base)  # what is mapped is not read yet
    with pytest.raises(CheckpointError, match=r"00.pth is truncated or damaged .*CRC"):
        opened.convert(tmp_path)
    with pytest.raises(CheckpointError, match=r"00.pth is truncated or damaged .*CRC"):
        opened.read("model.norm.weight")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_mapping_would_read_as_garbage(compression: int, world: Any) -> None:
    path = world.base() / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            is_cut = compression == zipfile.ZIP_STORED and name.endswith("/data/4")
            archive.writestr(name, content[:-4] if is_cut else content)
    with pytest.raises(CheckpointError, match=r"is compressed|storage 4 has \d+ bytes, expected"):
        MetaBase(path.parent)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"dim": 48, "dim": 96}', "[" * 100_000, '{"dim": ' + "1" * 5000 + "}",
     b"\xff\xfe{}"],
)  # fmt: skip
def test_params_that_are_no_object(content: str | bytes, world: Any) -> None:
    path = world.base() / "params.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"params.json") as refused:
        MetaBase(path.parent)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dim", 10**30), ("dim", 2**40), ("n_layers", 10**12), ("n_heads", 48), ("n_heads", 16),
     ("n_kv_heads", 0), ("n_kv_heads", 10**12), ("n_kv_heads", "6"), ("multiple_of", 10**300),
     ("ffn_dim_multiplier", 1e300), ("norm_eps", 1e30), ("norm_eps", True), ("rope_theta", 1e300),
     ("vocab_size", 10**15), ("use_scaled_rope", "yes"), ("use_scaled_rope", 1), ("n_layer", 5),
     ("quantization_args", {"scheme": "int4"})],
)  # fmt: skip
def test_params_that_are_absurd(key: str, value: Any, world: Any) -> None:
    path = world.base() / "params.json"
    path.write_text(json.dumps({**world.params(), key: value}))
    with pytest.raises(CheckpointError, match=r"params.json|consolidated") as refused:
        MetaBase(path.parent)
    assert key in str(refused.value) or "expected" in str(refused.value)


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
