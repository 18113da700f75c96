"""The guide's arithmetic of memory, against what rows, adapters and images really hold."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.generation.passes import Chunk, RowModel
from llama_adapter.model.stack import AdapterStack, RowReads

LAYERS, HEADS, KV_HEADS, SIZE, HIDDEN, MLP = 4, 4, 2, 16, 64, 96
HALF, FULL = 2, 4
"""Bytes of bfloat16 and of float32."""


def test_memory_is_what_the_guide_says() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = SiglipVisionModel(
        SiglipVisionConfig(**size, num_attention_heads=2, image_size=8, patch_size=4)
    ).eval()
    stack = AdapterStack(base, capacity=3, image_capacity=5)
    for name in ("a", "b"):  # one alone has merged weights as well
        model = LlamaAdapterForConditionalGeneration.from_base(
            base, vision, LlamaAdapterConfig.preset("v2"), seed=0
        )
        model.disable_adapters()
        stack.add(name, model.adapter, vision)
    stack.encode("a", torch.zeros(1, 3, 8, 8))
    rows = RowModel(base, stack, rows=2, length=10)

    row = bytes_of(rows.cache._tensors()) / (2 * 11)  # with a place for what fills passes up
    assert row == 2 * LAYERS * KV_HEADS * SIZE * HALF

    tables = [t for m in stack._modules.values() for t in getattr(m[3], "_tables", {}).values()]
    outputs = LAYERS * (2 * HIDDEN + 2 * KV_HEADS * SIZE + 2 * MLP + HIDDEN)
    norms = (2 * LAYERS + 1) * HIDDEN
    assert bytes_of(tables) / 4 == FULL * (2 * outputs + norms)

    [length, layers] = [10, LAYERS - 1]
    assert bytes_of(prompts(stack._static)) / 4 == layers * 2 * length * HEADS * SIZE * HALF
    assert bytes_of(prompts(stack._images)) / 6 == 2 * 20 * HEADS * SIZE * HALF

    stack.attach()
    chunks = [Chunk(start=0, tokens=[1], reads=RowReads(adapter=i)) for i in (1, 2)]
    with torch.inference_mode():
        rows.run(0, chunks)
    assert bytes_of([*stack.selection._gathered.values()]) / 2 == FULL * (2 * outputs + norms)
    [(_, reads)] = stack._reads
    kept = [table for tables in reads.gathered.values() for table in tables]
    assert bytes_of(kept) / 2 == layers * 2 * length * HEADS * SIZE * HALF


def prompts(bank: Any) -> list[torch.Tensor]:
    return [table for tables in bank._tables.values() for table in tables]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
