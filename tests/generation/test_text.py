"""The pieces of a streamed answer make up its text, whatever its tokens are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_adapter.generation.text import TextStream
from llama_adapter.processing.processor import LlamaAdapterProcessor


def byte_level() -> Any:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> Any:
    """A few letters are tokens, and every byte of others."""
    tokens = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "é"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return backend


def processor_of(backend: Any) -> LlamaAdapterProcessor:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return LlamaAdapterProcessor(None, tokenizer)


PROCESSORS = {make.__name__: processor_of(make()) for make in (byte_level, byte_fallback)}


@pytest.mark.parametrize("kind", PROCESSORS)
@given(text=st.text("ab é日😀", max_size=40))
def test_characters_of_several_tokens_are_streamed_whole(kind: str, text: str) -> None:
    processor = PROCESSORS[kind]
    tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(processor, ())
    streamed = "".join(map(stream.push, tokens)) + stream.finish(tokens)
    assert streamed == text.strip()
