from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path

import pytest

from llama_adapter.checkpoints.tokenizers import convert_tokenizer, find_tokenizer
from llama_adapter.errors import CheckpointError

WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "instruction", "describes",
)  # fmt: skip
TEXTS = (
    "the quick fox",
    "Below is é an 12 instruction:\n\n### Response:",
    " two  spaces ",
    "tab\tand 世界 🙂",
    "",
)


def test_sentencepiece(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    own = sentencepiece.SentencePieceProcessor(str(sentencepiece_file))
    tokenizer = convert_tokenizer(sentencepiece_file, vocab_size=400, context_length=2048)
    tokenizer.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    for converted in (tokenizer, stored):
        assert (converted.bos_token_id, converted.eos_token_id) == (1, 2)
        assert converted.model_max_length == 2048
        for text in TEXTS:
            assert converted.encode(text) == [1, *own.encode(text)], text
            assert converted.decode(own.encode(text)) == own.decode(own.encode(text))


def bpe(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """Merge the pair of lowest rank until there is none: tiktoken's rule."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not pairs or min(pairs)[0] == 10**9:
            return [ranks[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    found = {bytes([byte]): byte for byte in range(256)}
    for word in WORDS:
        for stop in range(2, len(word) + 1):
            found.setdefault(word[:stop].encode(), len(found))
        found.setdefault(b" " + word[:1].encode(), len(found))
        for stop in range(2, len(word) + 1):
            found.setdefault(b" " + word[:stop].encode(), len(found))
    return found


def test_tiktoken(ranks: dict[bytes, int], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "tokenizer.model"
    path.write_text(
        "".join(f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in ranks.items())
    )
    vocab = len(ranks) + 256
    tokenizer = convert_tokenizer(path, vocab_size=vocab, context_length=8192)
    tokenizer.save_pretrained(tmp_path / "saved")
    for converted in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert len(converted) == vocab
        assert converted.bos_token_id == len(ranks)
        assert converted.convert_tokens_to_ids("<|eot_id|>") == len(ranks) + 9
        assert converted.convert_tokens_to_ids("<|start_header_id|>") == len(ranks) + 6
        expected = bpe(ranks, b"the") + bpe(ranks, b" quick") + bpe(ranks, b" zebra")
        assert converted.encode("the quick zebra") == [len(ranks), *expected]
        for text in TEXTS:
            assert converted.decode(converted.encode(text), skip_special_tokens=True) == text
    later = convert_tokenizer(path, vocab_size=vocab, context_length=131072)
    assert later.convert_tokens_to_ids("<|eom_id|>") == len(ranks) + 8
    assert len(later) == vocab


def test_it_stands_beside_or_above_the_base(tmp_path: Path) -> None:
    base = tmp_path / "7B"
    base.mkdir()
    assert find_tokenizer(base) is None
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer(base) == tmp_path / "tokenizer.model"
    (base / "tokenizer.model").touch()
    assert find_tokenizer(base) == base / "tokenizer.model"


def test_neither_kind(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x00\x01\x02 not a model")
    with pytest.raises(CheckpointError, match="neither a sentencepiece model nor a tiktoken"):
        convert_tokenizer(path, vocab_size=10, context_length=8)


def test_more_tokens_than_embeddings(sentencepiece_file: Path) -> None:
    with pytest.raises(CheckpointError, match="has 400 tokens, the base has embeddings for 113"):
        convert_tokenizer(sentencepiece_file, vocab_size=113, context_length=8)
