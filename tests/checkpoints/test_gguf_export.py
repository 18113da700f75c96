"""A GGUF file holds the merged model: every weight, every bias, the tokenizer, the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType, dequantize
from tests.checkpoints.chat_adapters import LLAMA3, SMALL, byte_level, chat_adapter
from tokenizers import pre_tokenizers
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.gguf_export import NAME, export_gguf
from llama_adapter.checkpoints.merging import merge_into_base
from llama_adapter.errors import CheckpointError


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True),
        MistralConfig(**SMALL, sliding_window=16),
        Qwen2Config(**SMALL),
    ],
    ids=["llama", "llama3", "mistral", "qwen2"],
)
def test_every_weight_and_bias_is_there(config: Any, tmp_path: Path) -> None:
    model = chat_adapter(tmp_path, config)
    report = export_gguf(tmp_path / "adapter", out=tmp_path / "out")
    assert report.file == tmp_path / "out" / NAME
    found = tensors(report.file)
    _, biases = merge_into_base(model)
    stored = model.language_model.state_dict()
    for name, bias in biases.items():
        stored[f"model.{name.replace('.attention.', '.self_attn.')}"] = bias
    for name, ours in (
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("blk.1.attn_v.bias", "model.layers.1.self_attn.v_proj.bias"),
        ("blk.0.attn_output.bias", "model.layers.0.self_attn.o_proj.bias"),
        ("blk.0.ffn_gate.bias", "model.layers.0.mlp.gate_proj.bias"),
        ("blk.0.ffn_down.bias", "model.layers.0.mlp.down_proj.bias"),
        ("blk.1.ffn_up.bias", "model.layers.1.mlp.up_proj.bias"),
        ("blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        np.testing.assert_array_equal(found[name], stored[ours].numpy(), err_msg=name)
    for part in ("weight", "bias"):
        ours = stored[f"model.layers.0.self_attn.k_proj.{part}"].unflatten(0, (2, 2, 4))
        # pairs that rotate together are neighbors in llama.cpp, and half a head apart with us
        expected = ours.transpose(1, 2).flatten(0, 2).numpy()
        np.testing.assert_array_equal(found[f"blk.0.attn_k.{part}"], expected)
    assert ("output.weight" in found) == (not config.tie_word_embeddings)
    assert len(found) == len(stored) - config.tie_word_embeddings + ("rope_freqs.weight" in found)


def test_settings_of_the_file(tmp_path: Path) -> None:
    chat_adapter(tmp_path, MistralConfig(**SMALL, sliding_window=16))
    found = fields(export_gguf(tmp_path / "adapter", out=tmp_path / "out").file)
    assert found["general.architecture"] == "llama"
    assert found["llama.context_length"] == 16  # longer texts would leave Mistral's window
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.rope.dimension_count"] == 8
    assert "Below is an instruction" in found["tokenizer.chat_template"]
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert len(found["tokenizer.ggml.tokens"]) == SMALL["vocab_size"]
    assert found["tokenizer.ggml.token_type"][:3] == [TokenType.CONTROL] * 3
    assert found["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED


def test_llama_3_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, rope_parameters=LLAMA3)
    model = chat_adapter(tmp_path, config)
    found = tensors(export_gguf(tmp_path / "adapter", out=tmp_path / "out").file)
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    used = model.language_model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(plain / found["rope_freqs.weight"], used, rtol=1e-6)
    assert found["rope_freqs.weight"].max() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_and_vectors_do_not(dtype: torch.dtype, tmp_path: Path) -> None:
    chat_adapter(tmp_path, LlamaConfig(**SMALL), dtype=dtype)
    reader = GGUFReader(export_gguf(tmp_path / "adapter", out=tmp_path / "out").file)
    half = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    for tensor in reader.tensors:
        expected = half if len(tensor.shape) > 1 else "F32"
        assert tensor.tensor_type == GGMLQuantizationType[expected], tensor.name


def test_released_chat_file_with_sentencepiece(
    world: Any, sentencepiece_file: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    object.__setattr__(world, "vocab", 400)
    base = world.base()
    (base / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    import_released(world.save_released("v2-chat"), base=base, out=tmp_path / "chat")
    done = cli("export", tmp_path / "chat", "--out", tmp_path / "out", "--format", "gguf", "--json")
    assert done.status == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["file"] == str(tmp_path / "out" / NAME)
    found = fields(Path(said["file"]))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    # what sentencepiece merges first has the highest score
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(sentencepiece_file))
    merged = [i for i in range(400) if types[i] == TokenType.NORMAL and len(model.IdToPiece(i)) > 1]
    ours = sorted(merged, key=lambda i: -found["tokenizer.ggml.scores"][i])
    assert ours == sorted(merged, key=lambda i: -model.GetScore(i))


def test_what_does_not_merge_is_refused(tmp_path: Path) -> None:
    chat_adapter(tmp_path, LlamaConfig(**SMALL), prompt_length=2)
    with pytest.raises(CheckpointError, match="the static prompts cannot be merged"):
        export_gguf(tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Gemma2Config(**SMALL), "model_type 'gemma2', expected llama or mistral or qwen2"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "hidden_act 'gelu', expected silu"),
        (
            LlamaConfig(
                **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "rope_type 'dynamic'",
        ),
    ],
)
def test_bases_that_llama_cpp_computes_otherwise_are_named(
    config: Any, says: str, tmp_path: Path
) -> None:
    chat_adapter(tmp_path, config)
    with pytest.raises(CheckpointError, match=says):
        export_gguf(tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pre", "says"),
    [
        (pre_tokenizers.Whitespace(), "it prepares texts by Whitespace"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split("q", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
            ),
            "it prepares texts by Split, ByteLevel",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_named(pre: Any, says: str, tmp_path: Path) -> None:
    chat_adapter(tmp_path, LlamaConfig(**SMALL), tokenizer=byte_level(pre))
    with pytest.raises(CheckpointError, match=says):
        export_gguf(tmp_path / "adapter", out=tmp_path / "out")
