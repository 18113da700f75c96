"""Meta's tokenizer files as Hugging Face tokenizers: sentencepiece (LLaMA 1, 2), tiktoken (3)."""

from __future__ import annotations

import base64
import binascii
import string
from pathlib import Path
from typing import Any

from tokenizers import normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from llama_adapter.errors import CheckpointError
from llama_adapter.files import read_bytes
from llama_adapter.pretrained import explain

FILE_NAME = "tokenizer.model"


def find_tokenizer(directory: Path) -> Path | None:
    """`tokenizer.model` next to the weights or one folder above, as Meta ships it."""
    for folder in (directory, directory.resolve().parent):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def convert_tokenizer(
    path: Path, *, vocab_size: int, context_length: int
) -> PreTrainedTokenizerBase:
    """The tokenizer in a file of Meta's for a base with `vocab_size` tokens.

    Raises CheckpointError if the file is neither kind or has more tokens than the base.
    """
    content = read_bytes(path, error=CheckpointError)
    ranks = _read_tiktoken(content)
    try:
        if ranks is None:
            tokenizer = _from_sentencepiece(path, content, context_length)
        else:
            if len(ranks) > vocab_size:
                raise _too_large(path, len(ranks), vocab_size)
            specials = _llama3_specials(vocab_size - len(ranks), is_later=context_length > 8192)
            tokenizer = _from_tiktoken(path, ranks, specials, context_length)
    except CheckpointError:
        raise
    except Exception as fault:  # odd pieces make the libraries raise whatever they like
        raise CheckpointError(f"{path} makes no tokenizer: {explain(fault)}") from fault
    if len(tokenizer) > vocab_size:
        raise _too_large(path, len(tokenizer), vocab_size)
    return tokenizer


def _too_large(path: Path, found: int, expected: int) -> CheckpointError:
    return CheckpointError(f"{path} has {found} tokens, the base has embeddings for {expected}")


def _from_sentencepiece(path: Path, content: bytes, context_length: int) -> PreTrainedTokenizerBase:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path} is neither a sentencepiece model nor a tiktoken file"
        ) from error
    ids = range(model.GetPieceSize())
    vocab = {model.IdToPiece(i): i for i in ids}
    # control and byte pieces never result from a merge
    atomic = {model.IdToPiece(i) for i in ids if model.IsControl(i) or model.IsByte(i)}
    scores = {piece: model.GetScore(i) for piece, i in vocab.items() if piece not in atomic}
    specials = {
        "unk_token": model.IdToPiece(model.unk_id()),
        "bos_token": model.IdToPiece(model.bos_id()),
        "eos_token": model.IdToPiece(model.eos_id()),
    }
    backend: Any = LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab, scores, skip_tokens=atomic),
        add_bos_token=True,
        **specials,
    ).backend_tokenizer
    # sentencepiece puts a space before every text; transformers' class not where one is already
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )


def _read_tiktoken(content: bytes) -> dict[bytes, int] | None:
    """Tokens and ranks of a tiktoken file: one base64 token and its rank per line."""
    ranks: dict[bytes, int] = {}
    lines = 0
    allowed = set(string.printable.encode())
    if not set(content[:4096]) <= allowed:
        return None
    try:
        for line in content.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
                lines += 1
    except (ValueError, binascii.Error):
        return None
    has_all = sorted(ranks.values()) == list(range(lines))
    return ranks if ranks and has_all else None


class _RankedConverter(TikTokenConverter):
    """transformers' converter, fed with ranks that are read already."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        super().__init__(vocab_file="")
        self.ranks = ranks

    def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:  # noqa: ARG002
        return self.ranks


def _from_tiktoken(
    path: Path, ranks: dict[bytes, int], specials: list[str], context_length: int
) -> PreTrainedTokenizerBase:
    backend: Any = _RankedConverter(ranks).converted()
    backend.add_special_tokens(specials)
    bos = specials[0]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, backend.token_to_id(bos))],
            ),
        ]
    )
    if backend.token_to_id(bos) != len(ranks):
        raise CheckpointError(f"{path}: ranks are not 0 to {len(ranks) - 1}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=specials[1],
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _llama3_specials(count: int, *, is_later: bool) -> list[str]:
    """The special tokens that follow the ranks, by Meta's list for 3.0 or for later versions."""

    def reserved(number: int) -> str:
        return f"<|reserved_special_token_{number}|>"

    header = ["<|start_header_id|>", "<|end_header_id|>"]
    if is_later:
        named = ["<|begin_of_text|>", "<|end_of_text|>", reserved(0), reserved(1),
                 "<|finetune_right_pad_id|>", reserved(2), *header, "<|eom_id|>", "<|eot_id|>",
                 "<|python_tag|>"]  # fmt: skip
        following = 3
    else:
        named = ["<|begin_of_text|>", "<|end_of_text|>", *map(reserved, range(4)), *header,
                 reserved(4), "<|eot_id|>"]  # fmt: skip
        following = 5
    more = max(0, count - len(named))
    return (named + [reserved(n) for n in range(following, following + more)])[: max(count, 2)]
