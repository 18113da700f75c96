from __future__ import annotations

import base64
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.checkpoints import import_released
from llama_adapter.checkpoints.tokenizers import convert_tokenizer, find_tokenizer
from llama_adapter.errors import CheckpointError

SENTENCES = (
    "the quick brown fox jumps over lazy dogs Below is an instruction that describes task "
    "Write response completes request Generate caption of this image"
)
WORDS = SENTENCES.split()
TEXTS = (
    "the quick fox",
    "Below is é an 12 instruction:\n\n### Response:",
    " two  spaces ",
    "tab\tand 世界 🙂",
    "",
)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE model with byte fallback and Meta's special pieces."""
    import sentencepiece

    root = tmp_path_factory.mktemp("spm")
    chooser = random.Random(0)
    lines = [" ".join(chooser.choices(WORDS, k=12)) for _ in range(300)]
    (root / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"),
        model_prefix=str(root / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return root / "tokenizer.model"


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


def test_an_adapter_with_text(
    sentencepiece_file: Path, make_world: Any, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """With a tokenizer above the base the whole chain from words and pictures to words runs."""
    from PIL import Image
    from transformers import AutoTokenizer

    from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor

    world = make_world(vocab=400)
    (world.root / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    report = import_released(
        world.save_released("v2-multimodal-bias"),
        base=world.base("7B"),
        vision=world.save_clip(),
        out=tmp_path / "out",
    )
    assert not any("tokenizer" in warning for warning in report.warnings)
    processor = LlamaAdapterProcessor.from_pretrained(tmp_path / "out")
    assert (processor.template, processor.channel_order) == ("alpaca", "bgr")
    red = Image.new("RGB", (40, 30), (255, 0, 0))
    inputs = processor("Generate caption of this image", images=red)
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    # red arrives in the last channel: the released models saw blue there
    assert inputs["pixel_values"][0, 2].mean() > inputs["pixel_values"][0, 0].mean()
    text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert text.startswith("Below is an instruction that describes a task.")
    of_base = AutoTokenizer.from_pretrained(tmp_path / "out" / "base")
    for text in TEXTS:
        assert of_base.encode(text) == processor.tokenizer.encode(text)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.language_model.config.eos_token_id == 2
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.decode(tokens[0]), str)
    red.save(tmp_path / "red.png")
    done = cli("chat", tmp_path / "out", "--image", tmp_path / "red.png", "--prompt",
               "the quick", "--max-new-tokens", 2, "--json")  # fmt: skip
    assert done.status == 0, done.stderr


def test_without_a_tokenizer_commands_say_what_is_missing(
    world: Any, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    report = import_released(
        world.save_released("v2-chat"), base=world.base(), out=tmp_path / "out"
    )
    assert any("has no tokenizer" in warning for warning in report.warnings)
    done = cli("chat", tmp_path / "out", "--prompt", "hello")
    assert done.status == 2
    assert "processor_config.json" in done.stderr or "tokenizer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
