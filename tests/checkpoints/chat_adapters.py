"""Adapters that merge fully, on small random bases of several families, with small tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXT = ["the model answers the question of the user"] * 9
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def byte_level(pre: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def with_byte_tokens() -> PreTrainedTokenizerFast:
    """As LLaMA 1 and 2 have it: words begin with `▁`, unknown letters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat_adapter(
    out: Path,
    config: Any,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    **adapter: Any,
) -> LlamaAdapterForConditionalGeneration:
    """An adapter with random scales, biases and norms, and nothing that does not merge."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    base.save_pretrained(out / "base")
    model = LlamaAdapterForConditionalGeneration.from_base(
        str(out / "base"),
        config=LlamaAdapterConfig.preset("v2-chat", **{"prompt_length": 0, **adapter}),
    )
    with torch.no_grad():
        for parameter in model.group_parameters("language"):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(out / "adapter")
    LlamaAdapterProcessor(None, tokenizer or byte_level(), template="alpaca").save_pretrained(
        out / "adapter"
    )
    return model
