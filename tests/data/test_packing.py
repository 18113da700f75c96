"""Packed rows: the same loss and gradients as one sample a row, without the padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.files import open_source, stream_of, write_alpaca, write_pairs
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llama_adapter import (
    LlamaAdapterConfig,
    LlamaAdapterForConditionalGeneration,
    LlamaAdapterProcessor,
)
from llama_adapter.config import IGNORE_INDEX
from llama_adapter.data import Source
from llama_adapter.data.packing import OPEN_ROWS, Padding, assemble, pack
from llama_adapter.data.truncation import SampleEncoder
from llama_adapter.model import answer_mask
from llama_adapter.processing.batching import EncodedSample

SHAPE = {
    "vocab_size": 800,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # large numbers, so that what a token attends to shows in its logits
    "initializer_range": 0.2,
}
BASES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    # every layer but one sees only the last 16 tokens
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
}


def adapted(
    base: str, *, attention: str = "sdpa", **settings: Any
) -> LlamaAdapterForConditionalGeneration:
    """A tiny real model with an adapter whose every number does something."""
    model_class, config_class, changes = BASES[base]
    torch.manual_seed(0)
    language_model = model_class(config_class(**SHAPE, **changes)).eval()
    language_model.set_attn_implementation(attention)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )
    small = {"prompt_length": 3, "visual_prompt_length": 3, "projector": "linear", **settings}
    config = LlamaAdapterConfig.preset("v2", **small)
    model = LlamaAdapterForConditionalGeneration.from_base(language_model, tower, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def prepare(source: Source, processor: LlamaAdapterProcessor) -> list[EncodedSample]:
    encoder = SampleEncoder(processor, row_length=256)
    return [encoder.encode_sample(source[i], 0, 1) for i in range(len(source))]


def loss_and_gradients(
    model: LlamaAdapterForConditionalGeneration, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    named = dict(model.adapter.named_parameters())
    return loss.detach(), {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


def assert_same(
    model: LlamaAdapterForConditionalGeneration, left: dict[str, Tensor], right: dict[str, Tensor]
) -> None:
    loss, gradients = loss_and_gradients(model, left)
    other_loss, other_gradients = loss_and_gradients(model, right)
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == other_gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-5, atol=1e-5)


def rows_of(
    samples: list[EncodedSample], processor: LlamaAdapterProcessor, padding: Padding
) -> dict[str, Tensor]:
    rows = [[sample] for sample in samples]
    if padding == "packed":
        tokens = np.array([len(sample.encoded) for sample in samples])
        laid = pack(np.arange(len(samples)), tokens, row_length=256)
        assert len(laid) < len(samples) / 2
        rows = [[samples[n] for n in laid[row]] for row in range(len(laid))]
    return assemble(rows, processor, padding=padding, row_length=256)


@pytest.fixture
def short_processor(toy_tokenizer: Any, image_processor: Any) -> LlamaAdapterProcessor:
    return LlamaAdapterProcessor(image_processor, toy_tokenizer, template="toy")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("base", BASES)
def test_packed_instructions_equal_padded_ones(
    base: str, attention: str, short_processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    source = open_source("alpaca", "instruction", path=write_alpaca(tmp_path / "a.json", 12))
    samples = prepare(source, short_processor)
    model = adapted(base, attention=attention)
    packed = rows_of(samples, short_processor, "packed")
    assert_same(model, packed, rows_of(samples, short_processor, "padded"))
    assert_same(model, packed, rows_of(samples, short_processor, "max_length"))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("llama", {}),
        ("llama", {"visual_layers": 2}),
        ("llama", {"fusion": "late"}),
        ("qwen3", {}),
        ("gemma3", {"visual_layers": 2}),
    ],
)
def test_packed_captions_equal_padded_ones(
    base: str, settings: Any, short_processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    """Each caption reads its own picture, though many share a row."""
    source = open_source("pairs", "caption", path=write_pairs(tmp_path, 12))
    samples = prepare(source, short_processor)
    model = adapted(base, **settings)
    packed = rows_of(samples, short_processor, "packed")
    assert packed["image_index"].ndim == 2
    assert_same(model, packed, rows_of(samples, short_processor, "padded"))


@pytest.mark.parametrize("attention", ["all", "own"])
def test_packed_captions_read_through_slots(
    attention: str, toy_tokenizer: Any, image_processor: Any, tmp_path: Path
) -> None:
    processor = LlamaAdapterProcessor(
        image_processor,
        toy_tokenizer,
        template="toy",
        visual_scope="placeholders",
        placeholder_text="<|slot_0|><|slot_1|>",
    )
    source = open_source("pairs", "caption", path=write_pairs(tmp_path, 12))
    samples = prepare(source, processor)
    model = adapted("llama", visual_scope="placeholders", placeholder_attention=attention)
    packed = rows_of(samples, processor, "packed")
    assert int(packed["visual_mask"].sum()) == 2 * len(samples)
    assert_same(model, packed, rows_of(samples, processor, "padded"))


def test_pictures_and_texts_may_share_a_row(
    short_processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    captions = open_source("pairs", "caption", path=write_pairs(tmp_path, 6))
    texts = open_source("alpaca", "instruction", path=write_alpaca(tmp_path / "a.json", 6))
    pairs = zip(prepare(captions, short_processor), prepare(texts, short_processor), strict=True)
    samples = [sample for pair in pairs for sample in pair]
    model = adapted("llama")
    packed = rows_of(samples, short_processor, "packed")
    assert_same(model, packed, rows_of(samples, short_processor, "padded"))


def test_joined_rows_are_the_same_batch(processor: LlamaAdapterProcessor, tmp_path: Path) -> None:
    source = open_source("pairs", "caption", path=write_pairs(tmp_path, 8))
    batch = next(stream_of(source, processor, "caption", rows=3))
    joined = batch.joined()
    assert joined.inputs["input_ids"].shape == (1, 3 * 256)
    assert_same(adapted("llama"), dict(batch.inputs), dict(joined.inputs))


def test_no_label_is_learnt_across_samples(
    processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    source = open_source("alpaca", "instruction", path=write_alpaca(tmp_path / "a.json", 12))
    batch = next(stream_of(source, processor, "instruction", row_length=512))
    starts = batch.inputs["position_ids"] == 0
    assert int(starts.sum()) >= len(batch.sample_ids) > 2
    assert (batch.inputs["labels"][starts] == IGNORE_INDEX).all()
    assert batch.answer_tokens == int((batch.inputs["labels"] != IGNORE_INDEX).sum())


def test_rows_are_full_and_hold_every_sample_once() -> None:
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(4.8, 0.8, 5000).astype(int), 20, 1024)
    rows = pack(rng.permutation(5000), tokens, row_length=1024)
    assert sorted(rows.numbers.tolist()) == list(range(5000))
    sizes = np.array([tokens[rows[row]].sum() for row in range(len(rows))])
    assert sizes.max() <= 1024
    assert sizes.mean() / 1024 > 0.97
    assert len(rows) > OPEN_ROWS


@pytest.mark.parametrize("base", BASES)
def test_logits_are_made_where_a_label_stands(
    base: str, short_processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    source = open_source("alpaca", "instruction", path=write_alpaca(tmp_path / "a.json", 12))
    packed = rows_of(prepare(source, short_processor), short_processor, "packed")
    assert len(packed["input_ids"]) > 1
    model = adapted(base)
    places = answer_mask(packed["labels"])
    logits = model(**packed, use_cache=False, logits_to_keep=places).logits
    answer_tokens = int((packed["labels"] != IGNORE_INDEX).sum())
    assert logits.shape[:2] == (1, answer_tokens)
    everywhere = model(**packed, use_cache=False).logits
    torch.testing.assert_close(logits[0], everywhere[places], rtol=1e-5, atol=1e-5)
    assert_same(model, packed, {**packed, "logits_to_keep": places})


def test_rows_without_an_answer_give_loss_zero() -> None:
    model = adapted("llama")
    labels = torch.full((2, 8), IGNORE_INDEX)
    loss = model(torch.ones_like(labels), labels=labels, logits_to_keep=answer_mask(labels)).loss
    loss.backward()
    assert loss == 0


def test_the_comparison_would_notice(
    short_processor: LlamaAdapterProcessor, tmp_path: Path
) -> None:
    """Attention across samples, or another's picture, moves the loss far beyond 1e-5."""
    source = open_source("pairs", "caption", path=write_pairs(tmp_path, 12))
    packed = rows_of(prepare(source, short_processor), short_processor, "packed")
    model = adapted("llama")
    through = torch.arange(256).expand_as(packed["position_ids"])
    another = (packed["image_index"] + 1).clamp(max=11)
    losses = [
        model(**packed | changed, use_cache=False).loss
        for changed in ({}, {"position_ids": through}, {"image_index": another})
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert abs(losses[0] - losses[2]) > 1e-3
