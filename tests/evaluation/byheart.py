"""A real two-layer model that learns one text by heart, so that what it says is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def fresh(tokenizer: Any, folder: Path) -> LlamaForCausalLM:
    """A model of random numbers, and its tokenizer in the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM(config)


def learn(tokenizer: Any, folder: Path, *, after: str, say: str, steps: int = 300) -> Path:
    """Save a model that goes on after one text with another, and then ends."""
    model = fresh(tokenizer, folder)
    pieces = [tokenizer(text, return_tensors="pt").input_ids for text in (after, say)]
    text = torch.cat([*pieces, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        # behind other tokens and at many places, so that what it says does not hang on the prompt
        before = torch.randint(0, len(tokenizer), (8, 100), generator=generator)
        batch = torch.cat([before, text.expand(8, -1)], dim=1)
        labels = batch.index_fill(1, torch.arange(100), -100)
        places = torch.randint(0, 1500, (8, 1), generator=generator)
        position_ids = places + torch.arange(batch.shape[1])
        loss = model(input_ids=batch, position_ids=position_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    model.save_pretrained(folder)
    return folder
